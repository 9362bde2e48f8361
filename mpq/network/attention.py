"""nn.MultiheadAttention with projections that are layers: its fused weights take schemes like any other layer's."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED_WEIGHTS = ("in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS))


class SplitAttention(nn.MultiheadAttention):
    """Multi-head attention whose projections of queries, keys, values and outputs are linear layers.

    Computes what nn.MultiheadAttention does, without its fused kernels, which read weights past the layers.
    `in_proj_weight` and `in_proj_bias` are computed for code that reads them.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear  # type: ignore[assignment]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes and arguments of nn.MultiheadAttention; `is_causal` is a hint that `attn_mask` makes unnecessary."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, time = query.dim() == 3, 1 if self.batch_first and query.dim() == 3 else 0
        queries, keys, values = (
            self._by_head(projection(inputs), time)
            for projection, inputs in zip((self.q_proj, self.k_proj, self.v_proj), (query, key, value), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, queries, keys)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (queries * self.head_dim**-0.5) @ keys.transpose(-2, -1)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            output = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        output = output.transpose(1, 2).flatten(2)  # (samples, tokens, width)
        output = self.out_proj(output if time else output.transpose(0, 1) if batched else output[0])
        return output, weights if batched or weights is None else weights[0]

    def _by_head(self, projected: Tensor, time: int) -> Tensor:
        """(samples, heads, tokens, head width) of projections with the tokens along dimension `time`."""
        if projected.dim() == 2:
            projected = projected[None]
        elif time == 0:
            projected = projected.transpose(0, 1)
        return projected.view(*projected.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Both masks added: (samples or 1, heads or 1, queries or 1, keys); None without any."""
        masks = [_added(mask, queries.dtype) for mask in (attention, padding) if mask is not None]
        if attention is not None:
            shape = (-1, self.num_heads) if attention.dim() == 3 else (1, 1)
            masks[0] = masks[0].view(*shape, queries.shape[2], keys.shape[2])
        if padding is not None:
            masks[-1] = masks[-1].view(len(keys), 1, 1, keys.shape[2])
        return sum(masks[1:], masks[0]) if masks else None

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The fused weight (3 * width, width); None where queries, keys and values have several widths."""
        weights: list[Tensor] = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        return torch.cat(weights) if len({weight.shape for weight in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The fused bias (3 * width)."""
        biases: list[Tensor] = [self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]
        return None if biases[0] is None else torch.cat(biases)

    q_proj_weight = property(lambda self: self.q_proj.weight)
    k_proj_weight = property(lambda self: self.k_proj.weight)
    v_proj_weight = property(lambda self: self.v_proj.weight)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: minus infinity where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def splits(model: nn.Module, keep: Collection[str] = ()) -> list[nn.MultiheadAttention]:
    """The plain nn.MultiheadAttention modules: stored weights, torch's own forward, no further keys and values.

    Those with a parameter named in `keep` are left out, as are all of a model of transformers, whose readers know it by
    its own names.
    """
    if hasattr(getattr(model, "config", None), "to_json_string"):
        return []
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
        and _is_plain(module)
        and not any(f"{name}.{weight}".lstrip(".") in keep for weight in FUSED_WEIGHTS)
    ]


def _is_plain(module: nn.MultiheadAttention) -> bool:
    output = module.out_proj
    if "forward" in vars(module) or type(output) is not NonDynamicallyQuantizableLinear:
        return False
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return False
    weights = [module._parameters.get(name) for name in FUSED_WEIGHTS]
    stored = [output._parameters.get("weight"), *(weight for weight in weights if weight is not None)]
    count = 1 if module._qkv_same_embed_dim else len(PROJECTIONS)
    return len(stored) == 1 + count and all(type(one) is nn.Parameter and one.is_floating_point() for one in stored)


def split_attention(model: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """Make layers of the projections of the modules that `splits` names, in place; the model.

    Their weights are views of the fused ones.
    """
    made: dict[int, list[nn.Parameter]] = {}
    for module in splits(model, keep):
        _split(module, made)
    return model


def _split(module: nn.MultiheadAttention, made: dict[int, list[nn.Parameter]]) -> None:
    """Split one module; `made` are the parts of each fused parameter, which modules may share."""

    def parts(fused: Tensor) -> list[nn.Parameter]:
        if id(fused) not in made:
            made[id(fused)] = [nn.Parameter(part.detach(), fused.requires_grad) for part in fused.chunk(3)]
        return made[id(fused)]

    bias, fused = module._parameters["in_proj_bias"], module._parameters["in_proj_weight"]
    separate = [module._parameters[f"{name}_weight"] for name in PROJECTIONS]
    weights = separate if fused is None else parts(fused)
    biases: Sequence[nn.Parameter | None] = [None] * len(PROJECTIONS) if bias is None else parts(bias)
    output = module.out_proj
    for name in (*FUSED_WEIGHTS, "in_proj_bias"):
        del module._parameters[name]
    del module._modules["out_proj"]
    module.__class__ = SplitAttention
    module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from its fused kernel
    for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
        module.add_module(name, _linear(weight, bias))
    module.add_module("out_proj", _linear(output._parameters["weight"], output._parameters["bias"]))


def _linear(weight: nn.Parameter | None, bias: nn.Parameter | None) -> nn.Linear:
    assert weight is not None
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear._parameters.update(weight=weight, bias=bias)
    return linear
