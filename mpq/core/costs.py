"""Costs of a layer in a scheme: stored bytes and bit operations."""

from mpq.core.cache import head_bytes, stored_bytes
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme

FLOAT_ACTIVATION_BITS = 16  # activations that are not quantized run in a 16-bit float


def weight_bytes(scheme: Scheme, rows: int, cols: int) -> int:
    """Stored bytes of a (rows, cols) weight, including scales and padding; of a token's keys or values."""
    return rows * head_bytes(scheme.weight, cols) if scheme.cached else scheme.weight.nbytes(rows, cols)


def file_bytes(layer: Layer, scheme: Scheme) -> int:
    """Stored bytes of a layer in a checkpoint, which holds no keys and values."""
    return 0 if layer.is_cached else weight_bytes(scheme, layer.rows, layer.cols)


def cache_bytes(layer: Layer, scheme: Scheme, context: int, batch: int = 1) -> int:
    """Bytes that keys or values take after `context` tokens of each of `batch` texts; 0 for a weight."""
    if not (layer.is_cached and scheme.cached):
        return 0
    return batch * layer.rows * stored_bytes(scheme.weight, layer.cols, layer.tokens(context))


def bitops(scheme: Scheme, macs: int) -> float:
    """Bit operations of one sample: multiply-accumulates x weight bits x activation bits (HAWQ-V3, section 3.3).

    Floats count with all their bits, as in FLIQS (arXiv 2308.03290): bf16 : e4m3 : e2m1 = 16 : 4 : 1.
    """
    activation = FLOAT_ACTIVATION_BITS if scheme.activation is None else scheme.activation.grid.bits
    return float(macs) * scheme.weight.code_bits * activation


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bits: int, parameter_bytes: int = 4) -> int:
    """Bytes of cached keys and values that one token adds to a model.

    Below 16 bits, each head's codes fill whole bytes and carry `parameter_bytes` for scale and zero (two float16).

    >>> kv_bytes_per_token(32, 32, 128, 16) / kv_bytes_per_token(32, 32, 128, 4)  # Llama-2-7B
    3.764705882352941
    """
    head = -(-head_dim * bits // 8) + (parameter_bytes if bits < 16 else 0)
    return 2 * layers * kv_heads * head
