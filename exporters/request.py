"""The request to an exporter: a model, its allocation, and further inputs of some targets."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.exporters.shards import SHARD
from mpq.exporters.verify import Inputs, Run, runner
from mpq.network.ranges import Ranges
from mpq.quantized import Moments, quantized_layers
from mpq.rounding.reference import Quantized
from mpq.rounding.store import Rounder

SideFiles = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """The argument of every exporter; each reads the fields that its files need.

    Attributes:
        model: unchanged; one layer at a time is rounded.
        allocation: layers and schemes.
        folder: created if missing. Files of an earlier export are replaced, other files never.
        method: rounding method, by name or as a rounder, with `second_moments` of the inputs if it needs them.
        recipe: how to build the model without weights, as `mpq.sources` gives it with a model: {"kind": "bundled",
            "name": "tiny-lm"}, {"kind": "factory", "path": "package.module:factory"}. Read by mpq alone, and not
            needed for transformers models.
        shard: largest bytes of one file's tensors.
        inputs: what the model is called with (a tensor, a tuple of arguments, a mapping of keyword arguments), or a
            function that runs the model it is given. onnx traces with a tensor or a tuple of them; mpq compares the
            model that it reads back with the simulated one on them, layer by layer, and without them every weight and
            every other tensor alone.
        run: a function that runs the model for that comparison, where `inputs` are for tracing.
        ranges: of the layers' inputs (`mpq.network.ranges.input_ranges`), for activations of one scale a tensor.
        tokenizer: of transformers, which gguf writes into its file.
        side_files: files to copy into the folder: those of a tokenizer or a processor.
    """

    model: nn.Module
    allocation: Allocation
    folder: str | os.PathLike[str]
    method: str | Rounder = "mse"
    second_moments: Moments | None = None
    recipe: Mapping[str, Any] | None = None
    shard: int = SHARD
    inputs: Inputs | None = None
    run: Run | None = None
    ranges: Ranges | None = None
    tokenizer: Any = None
    side_files: SideFiles = ()

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def rounding(self) -> str:
        """Name of the rounding method, for provenance."""
        return self.method if isinstance(self.method, str) else self.method.name

    @property
    def comparison(self) -> Run | None:
        """Runs a model on the inputs of the comparison; None without inputs."""
        given = self.inputs if self.run is None else self.run
        return None if given is None else runner(given)

    def rounded(self) -> Iterator[tuple[Layer, Scheme, Quantized]]:
        """The layers, rounded one at a time."""
        return quantized_layers(self.model, self.allocation, self.method, self.second_moments)
