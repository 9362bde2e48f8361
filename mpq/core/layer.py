"""A quantizable layer as facts: what tables, costs and searches need to know of it, without its weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One weight that takes one scheme.

    The weight is seen as a matrix: one row per output channel (per token in an embedding), and
    cols = input channels / conv groups * kernel positions.
    """

    name: str  # the module's qualified name, "model.layers.0.self_attn.q_proj"
    kind: str  # "linear", "conv2d", "transformers-conv1d", "embedding", ...: `mpq.network.layers.BASES`
    rows: int
    cols: int
    macs: int = 0  # multiply-accumulates of one sample; 0 until counted
    tie: str = ""  # layers of one tie are fused by serving kernels and share a scheme; "" when alone
    aliases: tuple[str, ...] = ()  # other modules that hold the very same Parameter (tied embeddings)

    @property
    def params(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    @property
    def names(self) -> tuple[str, ...]:
        """All modules that hold this weight."""
        return (self.name, *self.aliases)
