"""Setting the formats in which a model caches keys and values."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.network.cached import PointHook, find_cached, hook_hosts, points
from mpq.network.calibration import next_token_loss
from mpq.quantized import CacheRounding


def serve_cache(model: nn.Module, formats: CacheFormats | None) -> list[RemovableHandle]:
    """Make a model cache keys and values in these formats in its `forward` and `generate`; returns the hooks.

    Models of transformers store them packed (`mpq.generation.packed_cache.PackedCache`), in place of any empty cache
    passed in; others round them at their cache points.
    """
    if formats is None:
        return []
    model.cache_formats = formats  # type: ignore[assignment]
    rounding = CacheRounding(formats)
    placed = [point.register_forward_hook(PointHook(name, rounding)) for name, point in points(model).items()]
    return hook_hosts(model, partial(_packed_cache, formats)) + placed


def serve_format(model: nn.Module, name: str) -> None:
    """Make a language model cache all keys and values in one format, as `serve_cache` does.

    Raises:
        MpqError: an unknown format, or a model that has cache formats or no cache.
    """
    present = cache_formats_of(model)
    if present is not None:
        raise MpqError(
            f"the model already has cache formats ({', '.join(sorted(set(present.names)))}): leave out the format"
        )
    device = next(iter(model.state_dict().values())).device
    sample = torch.zeros(1, 2, dtype=torch.long, device=device)
    serve_cache(model, CacheFormats.uniform(find_cached(model, sample, next_token_loss), name))


def _packed_cache(formats: CacheFormats, config: Any) -> Any:
    from mpq.generation.packed_cache import PackedCache

    return PackedCache(config, formats)


def cache_formats_of(model: nn.Module) -> CacheFormats | None:
    """The formats that `serve_cache` gave a model; None leaves keys and values in floating point."""
    formats = getattr(model, "cache_formats", None)
    return formats if isinstance(formats, CacheFormats) else None
