"""gptqmodel's own kernel on our tensors, wherever gptqmodel is installed (it was run at 7.7, on a CPU)."""

import pytest
import torch

from mpq.core.formats import parse_format
from mpq.exporters.gptq import gptq_tensors
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize, quantize

pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", ["g32", "g64", "g128", "channel"])
def test_gptqmodel_reads_our_weights(bits, size):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    format = parse_format(f"int{bits}-{size}")
    quantized = quantize(torch.randn(96, 256, generator=seeded(0, bits)), format)
    reader = TorchLinear(
        bits=bits, group_size=format.group_size or -1, sym=True, desc_act=False, in_features=256, out_features=96
    )
    tensors = gptq_tensors(pack(quantized))
    assert all(getattr(reader, name).shape == tensor.shape for name, tensor in tensors.items())
    assert all(getattr(reader, name).dtype == tensor.dtype for name, tensor in tensors.items())
    reader.load_state_dict(tensors, strict=False)
    convert_gptq_v1_to_v2_format_module(reader, bits, torch.int32)
    found = reader.eval().dequantize_weight().t().float()
    torch.testing.assert_close(found, dequantize(quantized), rtol=2**-11, atol=1e-6)  # the product is float16 there
