"""The classes of a vLLM quantization method (vLLM 0.33), around `mpq.integrations.vllm`.

They are module-level classes because vLLM sends its configuration to other processes by name.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from mpq.core.errors import MpqError
from mpq.exporters.folder import CHECKSUMS, check_texts, read_checksums
from mpq.exporters.mpq.checkpoint import METHOD, VERSION
from mpq.integrations.vllm import Cut, Part, ServedWeight, embedding_named, named_layers, parts_of

log = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class MpqConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` that `mpq.exporters.mpq.checkpoint` writes."""

    def __init__(self, layers: dict[str, Any], version: int = VERSION) -> None:
        super().__init__()
        if version != VERSION:
            raise MpqError(f"the checkpoint has version {version}, this mpq reads {VERSION}: update mpq")
        self.layers = named_layers(layers)
        self.digests: dict[str, str] = {}

    def get_name(self) -> str:
        """Name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types that the kernels compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: the reference runs everywhere."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json suffices."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MpqConfig":
        """Build from config.json's `quantization_config`."""
        if config.get("cache"):
            log.warning("vLLM uses its own cache type: this checkpoint's formats of keys and values are ignored")
        return cls(config["layers"], config["version"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers to vLLM's names."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Read the tensors' checksums when the checkpoint is a local folder."""
        folder = Path(model_name)
        if (folder / CHECKSUMS).is_file():
            checksums = read_checksums(folder)
            check_texts(folder, checksums)
            for noted in checksums.values():
                self.digests.update(noted if isinstance(noted, dict) else {})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Our method for the allocation's layers, vLLM's for others."""
        if isinstance(layer, VocabParallelEmbedding):
            prefix = embedding_named(prefix, self.layers, layer.org_vocab_size, layer.embedding_dim)
        parts = parts_of(prefix, self.layers, self.packed_modules_mapping)
        if parts and isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return MpqLinearMethod(parts, self.digests)
        inside = next((name for name in self.layers if name.startswith(f"{prefix}.")), None)
        if inside is not None and any(word in type(layer).__name__ for word in ("MoE", "Experts")):
            raise MpqError(f"vLLM fuses the experts of {prefix}, which mpq's kernels do not support: exclude {inside}")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class MpqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Linear layers, embeddings and output layers that compute from packed weights."""

    def __init__(self, parts: tuple[Part, ...], digests: dict[str, str]) -> None:
        self.parts, self.digests = parts, digests

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Create parameters for the stored tensors, `layer.weight.packed` and so on."""
        sizes = tuple(output_partition_sizes)
        if len(self.parts) == 1:  # fused on disk, or not fused at all
            sizes = (sum(sizes),)
        rank, ranks = (int(getattr(layer, name, default)) for name, default in (("tp_rank", 0), ("tp_size", 1)))
        padded = isinstance(layer, VocabParallelEmbedding)
        cut = Cut(sizes, input_size_per_partition, rank, ranks, padded)
        layer.weight = ServedWeight(self.parts, cut, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Arrange the loaded tensors for the device."""
        weight: Any = layer.weight
        place = next(weight.parameters(), None)
        weight.settle("cpu" if place is None else place.device, self.digests)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with this rank's rows."""
        weight: Any = layer.weight
        output: Tensor = weight.product(x, bias)
        return output

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows of this rank's table."""
        weight: Any = layer.weight
        rows: Tensor = weight.rows(input_)
        return rows
