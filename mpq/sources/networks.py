"""Models by name, and the recipe from which each can be built again without its weights."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError, nearest_names
from mpq.models import BUNDLED, bundled_model, tokenizer
from mpq.network.experts import unstack
from mpq.sources.extras import import_object, need

log = logging.getLogger(__name__)

HF_CLASSES = {"ForCausalLM": "AutoModelForCausalLM", "ForImageClassification": "AutoModelForImageClassification"}


@dataclass(frozen=True, eq=False)
class Network:
    """A model in evaluation mode, and what its data must be like."""

    name: str
    model: nn.Module
    kind: str | None  # "accuracy", "perplexity", or None: the data tells
    recipe: Mapping[str, Any]
    tokenizer: Any = None
    encode: Callable[[str], list[int]] | None = None  # text to tokens
    context: int | None = None  # longest sequence
    mean: tuple[float, ...] = field(default=())  # of the channels of images in [0, 1]; () when not normalized
    std: tuple[float, ...] = field(default=())


def open_network(name: str) -> Network:
    """The model called `name`; see `mpq.sources.open_source` for the names.

    Raises:
        MpqError: no such model, with the nearest names; a missing extra; a factory that gives no model.
    """
    if name in BUNDLED:
        return _bundled(name)
    if name.startswith("timm:"):
        return _timm(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise MpqError(f"the folder {name} has no config.json: expected a Hugging Face model")
        return _transformers(name)
    if ":" in name:
        return _factory(name)
    if "/" not in name and "did you mean" in nearest_names(name, BUNDLED):
        raise MpqError(f"unknown model {name!r}: {nearest_names(name, BUNDLED)}")
    return _transformers(name)


def skeleton(recipe: Mapping[str, Any]) -> nn.Module:
    """The model of a recipe with weights still to be loaded, float32, in evaluation mode.

    Raises:
        MpqError: an unknown kind of recipe, or a missing extra.
    """
    kind = recipe.get("kind")
    if kind == "bundled" and recipe.get("name") in BUNDLED:
        model: nn.Module = BUNDLED[recipe["name"]].build()
    elif kind == "transformers":
        transformers = need("transformers", "hf", "Hugging Face models")
        options = {key: value for key, value in recipe["config"].items() if key not in ("dtype", "torch_dtype")}
        config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        model = unstack(getattr(transformers, recipe["class"]).from_config(config, dtype=torch.float32))
    elif kind == "timm":
        model = need("timm", "timm", "timm models").create_model(recipe["name"], pretrained=False)
    elif kind == "factory":
        model = _made_by(recipe["path"])
    else:
        raise MpqError(f"no model can be built from the recipe {dict(recipe)!r}: expected one of an mpq checkpoint")
    return model.eval()


def _bundled(name: str) -> Network:
    model, about = bundled_model(name), BUNDLED[name]
    pieces = tokenizer() if about.kind == "perplexity" else None
    return Network(
        name, model, about.kind, {"kind": "bundled", "name": name}, pieces, pieces.encode if pieces else None
    )


def _transformers(name: str) -> Network:
    transformers = need("transformers", "hf", f"Hugging Face models such as {name!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        known = f"{nearest_names(name, BUNDLED)}; else a folder, a hub id, timm:NAME or package.module:factory"
        raise MpqError(f"unknown model {name!r}: {known} ({_first_line(error)})") from error
    architecture = (config.architectures or ["?"])[0]
    class_name = next((name for ending, name in HF_CLASSES.items() if architecture.endswith(ending)), None)
    if class_name is None:
        raise MpqError(f"{name} is a {architecture}: expected a causal language model or an image classifier")
    try:
        model = unstack(getattr(transformers, class_name).from_pretrained(name, dtype=torch.float32))
    except OSError as error:
        raise MpqError(f"the weights of {name} cannot be loaded: {_first_line(error)}") from error
    recipe = {"kind": "transformers", "class": class_name, "config": json.loads(config.to_json_string(use_diff=False))}
    if class_name == "AutoModelForImageClassification":
        mean, std = _normalization(name, transformers)
        return Network(name, model.eval(), "accuracy", recipe, mean=mean, std=std)
    context = getattr(config, "max_position_embeddings", None)
    try:
        tokens = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        log.warning("%s comes without a tokenizer (%s): give its data as tokens", name, _first_line(error))
        return Network(name, model.eval(), "perplexity", recipe, context=context)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokens(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return Network(name, model.eval(), "perplexity", recipe, tokens, encode, context)


def _normalization(name: str, transformers: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels that an image model wants; () for both where it does not say."""
    try:
        about, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return (), ()
    return tuple(about.get("image_mean") or ()), tuple(about.get("image_std") or ())


def _timm(name: str) -> Network:
    timm = need("timm", "timm", "timm models")
    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        raise MpqError(f"timm has no model {model_name!r}: {nearest_names(model_name, timm.list_models())}")
    try:
        model = timm.create_model(model_name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise MpqError(f"the weights of {name} cannot be loaded: {_first_line(error)}") from error
    about = timm.data.resolve_model_data_config(model)
    recipe = {"kind": "timm", "name": model_name}
    return Network(name, model.eval(), "accuracy", recipe, mean=tuple(about["mean"]), std=tuple(about["std"]))


def _factory(name: str) -> Network:
    return Network(name, _made_by(name), None, {"kind": "factory", "path": name})


def _made_by(path: str) -> nn.Module:
    made = import_object(path)()
    if not isinstance(made, nn.Module):
        raise MpqError(f"{path} gave a {type(made).__name__}: expected a torch.nn.Module")
    return made.eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
