"""mpq as a quantization method of transformers: after importing this module, `from_pretrained` reads our checkpoints.

The model computes from packed weights through torch.ops.mpq, and `save_pretrained` writes it again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpq.exporters.folder import CHECKSUMS, check_texts, read_checksums
from mpq.exporters.mpq.checkpoint import METHOD, VERSION, layers_of
from mpq.generation.serving import serve_cache
from mpq.kernels.layout import empty
from mpq.kernels.weight import PackedWeight
from mpq.network.prepare import bake
from mpq.quantized import checked_layers, put_packed


@register_quantization_config(METHOD)
class MpqConfig(QuantizationConfigMixin):
    """The `quantization_config` that `mpq.exporters.mpq.checkpoint` writes."""

    def __init__(
        self,
        version: int = VERSION,
        rounding: str = "",
        layers: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        cache: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version, self.rounding, self.layers, self.tied = version, rounding, dict(layers or {}), dict(tied or {})
        self.cache = dict(cache or {})


@register_quantizer(METHOD)
class MpqQuantizer(HfQuantizer):
    """Replaces layers by packed modules before loading, and sets their layout for the device afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if folder is not None and (folder / CHECKSUMS).is_file():  # `save_pretrained` writes none
            check_texts(folder, read_checksums(folder))
        allocation, dtypes = layers_of(vars(self.quantization_config))
        ties = dict(getattr(model, "all_tied_weights_keys", {}))
        for layer, scheme in checked_layers(bake(model), allocation):
            put_packed(model, layer, scheme, empty(scheme.weight, layer.rows, layer.cols, "meta"), dtypes[layer.name])
            for alias in layer.aliases:  # transformers ties parameters only: the module is shared again after loading
                del model.get_submodule(alias).weight
                ties.pop(f"{alias}.weight", None)
        model.all_tied_weights_keys = ties

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        allocation, _dtypes = layers_of(vars(self.quantization_config))
        for layer in allocation.layers:
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, PackedWeight)
            weight.arrange()
            for alias in layer.aliases:
                model.get_submodule(alias).weight = weight
        serve_cache(model, allocation.cache)

    def get_new_dtype(self, converter: Any, param: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
        """Every tensor keeps the type of the file: casting a scale to the model's type would change it."""
        return None

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are constants."""
        return False
