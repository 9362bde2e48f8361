"""Building a model's structure without its weights, from an exported folder."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mpq.core.errors import MpqError, first_line
from mpq.network.experts import unstack
from mpq.sources.extras import need
from mpq.sources.networks import decoded, skeleton


def build_skeleton(config: Mapping[str, Any], folder: Path, trust: bool, stored: Collection[str] = ()) -> nn.Module:
    """The model that `config` (a folder's config.json) describes; parameters may have no storage.

    A "recipe" is stored by `mpq.sources` with a model; one that names a user's factory is followed only if trusted.
    Without one, the first of "architectures" is a class of transformers; its experts stay stacked if they are in
    `stored`, the names of the folder's tensors.

    Raises:
        MpqError: the folder does not describe the model, or it needs trust or a package that is not installed.
    """
    try:
        with _EmptyOnMeta():
            model = _build(config, folder, trust, stored)
    except (RuntimeError, NotImplementedError):  # its constructor computes with its weights
        return _build(config, folder, trust, stored)
    filled = set(model.state_dict())
    if any(buffer.is_meta and name not in filled for name, buffer in model.named_buffers()):
        return _build(config, folder, trust, stored)  # the file does not hold this buffer: build it with its content
    return model


def describes_itself(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config.json describes the model: a recipe, or a class of transformers."""
    if config.get("recipe") is not None:
        return True
    names = config.get("architectures") or [""]
    return "model_type" in config and hasattr(need("transformers", "hf", f"a {names[0]}"), names[0])


def _build(config: Mapping[str, Any], folder: Path, trust: bool, stored: Collection[str]) -> nn.Module:
    recipe = config.get("recipe")
    if recipe is None or recipe.get("kind") == "transformers":
        return _transformers_model(config, folder, stored)
    if recipe.get("kind") == "factory" and not trust:
        raise MpqError(
            f"{folder} wants to import {recipe.get('path')} to build its model: "
            "if you know that code, load with trust=True (--trust), or pass the model itself (model=...)"
        )
    return skeleton(recipe)


def _transformers_model(config: Mapping[str, Any], folder: Path, stored: Collection[str]) -> nn.Module:
    names = config.get("architectures")
    if not names or "model_type" not in config:
        raise MpqError(f"{folder} does not describe its model: pass the model (model=...), whose weights are replaced")
    transformers = need("transformers", "hf", f"the model in {folder}, a {names[0]},")
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise MpqError(f"{folder} wants the class {names[0]}, which transformers {transformers.__version__} lacks")
    described = {key: decoded(value) for key, value in config.items() if key != "quantization_config"}
    try:
        model: nn.Module = cls._from_config(cls.config_class.from_dict(described))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):  # the constructor needs weights with content
        raise
    except Exception as error:  # a damaged config fails anywhere inside, in every way
        raise MpqError(f"the config in {folder} makes no {names[0]} ({first_line(error)}): is it damaged?") from error
    return unstack(model, keep=stored)


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty, of which layers make their parameters, allocates nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
