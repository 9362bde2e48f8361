"""Metadata of what takes a scheme, for tables, costs and searches: a layer without its weights, or cached vectors."""

from dataclasses import dataclass

from mpq.core.errors import MpqError

KEYS, VALUES = "keys", "values"  # kinds of what an attention layer caches


@dataclass(frozen=True)
class Layer:
    """One weight, which takes one scheme; or the keys or the values that an attention layer caches.

    The weight is a matrix: one row per output channel (per token in an embedding), and
    cols = input channels / conv groups * kernel positions. Of keys and values, a row is a head and cols its width.

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
    window: int = 0  # tokens of keys or values that are kept; 0 for all

    def __post_init__(self) -> None:
        for name in self.names:
            if "\r" in name:
                raise MpqError(f"invalid layer name {name!r} with a carriage return: rename the module")

    @property
    def is_cached(self) -> bool:
        """Whether it is keys or values, not a weight."""
        return self.kind in (KEYS, VALUES)

    @property
    def params(self) -> int:
        """Number of weights; of keys and values, numbers of a token."""
        return self.rows * self.cols

    def tokens(self, context: int) -> int:
        """Tokens that are kept of a text of `context`."""
        return min(context, self.window) if self.window else context

    @property
    def names(self) -> tuple[str, ...]:
        """All modules that hold this weight."""
        return (self.name, *self.aliases)
