"""Golden checkpoints: `python -m tests.golden.make` writes those of the current version, once it is final.

A version's folders never change afterwards: every later mpq loads the same weights from them.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.layer import Layer
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import VERSION
from mpq.exporters.verify import numbers_digest
from mpq.kernels.weight import PackedWeight
from mpq.network.layers import find_layers

HOME = Path(__file__).parent
STORED = (
    "int2-g32", "int3-g64", "int4-g32", "int5-g32", "int6-g64", "int8-g32", "int4-g128-asym", "int3-g32-asym",
    "int4-channel", "int8", "nf4-g64", "fp4-e2m1-g32", "fp6-e3m2-channel", "fp8-e4m3", "fp8-e5m2-channel", "mxfp4",
    "mxfp6-e2m3", "mxfp8-e4m3", "mxint8", "nvfp4", "q2_k", "q3_k", "q4_k", "q6_k", "q4_1", "q5_1", "iq4_nl",
    "uint4-g64-mfp16", "fp32", "fp16", "bf16",
)  # fmt: skip
MIXED, ASSIGNED = "int2-g32/int4-g32@3.52", "01101100"


class Formats(nn.Module):
    """A layer of 2 x 256 weights for each kind of storage, and one of 8 x 64 for a mix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 2, bias=False) for _ in STORED])
        self.mixed = nn.Linear(64, 8)
        fill(self)

    def forward(self, inputs: Tensor) -> Tensor:  # (samples, 256) -> (samples, 2 * layers + 8)
        """All layers side by side."""
        return torch.cat([*(layer(inputs) for layer in self.layers), self.mixed(inputs[:, :64])], 1)


def fill(model: nn.Module) -> None:
    """Weights that are equal on any machine: exact fractions."""
    for place, parameter in enumerate(model.parameters()):
        numbers = torch.arange(parameter.numel(), dtype=torch.int64)
        values = ((numbers * 37 + place * 11) % 101 - 50) * ((numbers * 13 + place) % 7 + 1)
        parameter.data = (values.float() / 512).reshape(parameter.shape)


def cases() -> dict[str, tuple[nn.Module, Allocation, Tensor, dict[str, str] | None]]:
    """Model, allocation, inputs and recipe of each golden folder."""
    formats = Formats().eval()
    layers = find_layers(formats)
    allocation = Allocation(layers, (*STORED, MIXED), assignments={"mixed": ASSIGNED})
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    fill(llama)
    chosen = find_layers(llama)
    cached = tuple(Layer(f"cache.0.{kind}", kind, 1, 16) for kind in ("keys", "values"))
    schemes = tuple("int8-channel" if layer.kind == "embedding" else "int4-g32-asym" for layer in chosen)
    return {
        "formats": (formats, allocation, (torch.arange(512).reshape(2, 256) % 9 - 4) / 8,
                    {"kind": "factory", "path": "tests.golden.make:Formats"}),
        "llama": (llama, Allocation(chosen, schemes, cache=CacheFormats(cached, ("int8-token", "int4-token"))),
                  torch.arange(16).reshape(1, 16) * 5 % 32, None),
    }  # fmt: skip


def written(name: str, folder: Path) -> Path:
    """Write a golden folder by this version of mpq."""
    model, allocation, _, recipe = cases()[name]
    return export(model, allocation, folder, method="nearest", recipe=recipe)


def found(loaded: nn.Module, inputs: Tensor) -> dict[str, object]:
    """Digests of a loaded model's weights by layer, and its outputs."""
    digests = {
        name: numbers_digest(module.weight.dequantize())
        for name, module in loaded.named_modules()
        if isinstance(getattr(module, "weight", None), PackedWeight)
    }
    with torch.no_grad():
        output = loaded(inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return {"numbers": digests, "outputs": logits.flatten().tolist()}


def main() -> None:
    """Write the folders of this version; existing ones are kept."""
    from mpq.exporters.mpq.checkpoint import load

    for name, (_, _, inputs, _) in cases().items():
        folder = HOME / f"v{VERSION}" / name
        if folder.exists():
            print(f"{folder} is there: its content never changes")
            continue
        written(name, folder)
        values = found(load(folder, trust=True), inputs)
        (folder.parent / f"{name}.json").write_text(json.dumps(values, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
