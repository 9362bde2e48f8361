"""Metadata of a quantizable layer for tables, costs and searches, without its weights."""

from dataclasses import dataclass

from mpq.core.errors import MpqError


@dataclass(frozen=True)
class Layer:
    """One weight, which takes one scheme.

    The weight is a matrix: one row per output channel (per token in an embedding), and
    cols = input channels / conv groups * kernel positions.

    Raises:
        MpqError: a name with a carriage return, which CSV files cannot hold.
    """

    name: str  # the module's qualified name, "model.layers.0.self_attn.q_proj"
    kind: str  # "linear", "conv2d", "transformers-conv1d", "embedding", ...: `mpq.network.layers.BASES`
    rows: int
    cols: int
    macs: int = 0  # multiply-accumulates of one sample; 0 until counted
    tie: str = ""  # layers with the same tie are fused by serving kernels and share a scheme; "" for none
    aliases: tuple[str, ...] = ()  # other modules with the same Parameter (tied embeddings)

    def __post_init__(self) -> None:
        for name in self.names:
            if "\r" in name:
                raise MpqError(f"invalid layer name {name!r} with a carriage return: rename the module")

    @property
    def params(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    @property
    def names(self) -> tuple[str, ...]:
        """All modules that hold this weight."""
        return (self.name, *self.aliases)
