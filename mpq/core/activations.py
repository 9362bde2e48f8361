"""A layer's inputs in an activation format: quantized on the fly, with scales of the moment."""

from torch import Tensor, nn

from mpq.core.formats import Format
from mpq.core.rounding import fake_quantize


def fake_quantize_inputs(module: nn.Module, inputs: Tensor, format: Format) -> Tensor:
    """The inputs as the format holds them, in their own shape and type.

    Rows are tokens: the features of one position, channels for a convolution. Groups run along a row.
    """
    channels = inputs.ndim - len(module.kernel_size) - 1 if isinstance(module, (nn.Conv1d, nn.Conv2d)) else -1
    tokens = inputs.movedim(channels, -1)
    rounded = fake_quantize(tokens.reshape(-1, tokens.shape[-1]), format).reshape(tokens.shape)
    return rounded.movedim(-1, channels).to(inputs.dtype)
