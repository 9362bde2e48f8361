import pytest
import torch

from mpq.core.formats import parse_format
from mpq.kernels.cpu import panels
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.rounding.reference import quantize


@pytest.mark.parametrize("name", ["int4-g32-asym", "int3", "int6-channel-asym", "nvfp4", "fp8-e4m3-channel"])
def test_arranging_in_pieces_equals_arranging_at_once(name, monkeypatch):
    packed = pack(quantize(torch.randn((300, 140), generator=seeded(0, name)), parse_format(name)))
    whole = panels.arrange(packed).tensors["panels"]
    monkeypatch.setattr(panels, "CODES_AT_A_TIME", 2 * 64 * 256)  # two panels at a time, or one
    pieces = panels.arrange(packed)
    assert torch.equal(pieces.tensors["panels"], whole)
    restored = panels.restore(pieces)
    assert all(torch.equal(restored.tensors[key], tensor) for key, tensor in packed.tensors.items())
