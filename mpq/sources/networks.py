"""Models by name, and recipes from which they are rebuilt without weights."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError, first_line, nearest_names
from mpq.models import BUNDLED, bundled_model, tokenizer
from mpq.network.experts import unstack
from mpq.sources.extras import import_object, need
from mpq.sources.stored_weights import check_stored_weights, folder_of

log = logging.getLogger(__name__)

# Files of a source folder needed beside the weights: tokenizers, chat templates, processors, generation.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
TOKENIZER_FILES = (SIDE_FILES[0], *SIDE_FILES[4:9])
PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
CHARACTERS = 2**20  # tokenized at once


@dataclass(frozen=True, eq=False)
class Network:
    """A model in evaluation mode, and the properties of its data."""

    name: str
    model: nn.Module
    kind: str | None  # "accuracy", "perplexity", "distance", "seq2seq", or None: decided by the data
    recipe: Mapping[str, Any]
    tokenizer: Any = None
    encode: Callable[[str], list[int]] | None = None  # text to tokens
    damage: str = ""  # why a tokenizer whose files are there cannot be loaded
    context: int | None = None  # longest sequence
    mean: tuple[float, ...] = field(default=())  # means of the channels of images in [0, 1]; () without normalization
    std: tuple[float, ...] = field(default=())
    size: tuple[int, int] | None = None  # height and width of images
    side_files: tuple[Path, ...] = ()  # tokenizer, processor and the like, to be written beside its weights


def open_network(name: str, untrusted: Collection[str] = ()) -> Network:
    """Open the model of this name; see `mpq.sources.open_source` for the names and `untrusted`.

    Raises:
        MpqError: an unknown model, with the nearest names; a missing extra; a factory that does not return a model.
    """
    if name in BUNDLED:
        return _bundled(name)
    if name.startswith("timm:"):
        return _timm(name)
    if name.endswith(".gguf"):
        return _gguf(Path(name))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            if files := sorted(Path(name).glob("*.gguf")):
                return _gguf(files[0])
            raise MpqError(f"the folder {name} has no config.json: expected a Hugging Face model or a GGUF file")
        return _transformers(name)
    if Path(name).is_file():
        raise MpqError(f"{name} is a file: name the folder that holds it, or a .gguf file")
    if ":" in name:
        return _factory(name, untrusted)
    if "/" not in name and "did you mean" in nearest_names(name, BUNDLED):
        raise MpqError(f"unknown model {name!r}: {nearest_names(name, BUNDLED)}")
    return _transformers(name)


def skeleton(recipe: Mapping[str, Any]) -> nn.Module:
    """Build the model of a recipe without its weights, float32, in evaluation mode.

    Raises:
        MpqError: an unknown kind of recipe, or a missing extra.
    """
    kind = recipe.get("kind")
    if kind == "bundled" and recipe.get("name") in BUNDLED:
        model: nn.Module = BUNDLED[recipe["name"]].build()
    elif kind == "transformers":
        transformers = need("transformers", "hf", "Hugging Face models")
        options = decoded(dict(recipe["config"]))
        config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        dtype = config.dtype or torch.float32
        model = unstack(getattr(transformers, recipe["class"])._from_config(config, dtype=dtype))
    elif kind == "timm":
        model = need("timm", "timm", "timm models").create_model(recipe["name"], pretrained=False)
    elif kind == "factory":
        model = _made_by(recipe["path"])
    else:
        raise MpqError(f"no model can be built from the recipe {dict(recipe)!r}: expected one of an mpq checkpoint")
    return model.eval()


def decoded(values: Any) -> Any:
    """JSON values of a config with the infinities that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(values, Mapping):
        if list(values) == ["__float__"]:
            return float(values["__float__"])
        return {name: decoded(value) for name, value in values.items()}
    return [decoded(value) for value in values] if isinstance(values, list) else values


def _bundled(name: str) -> Network:
    model, about = bundled_model(name), BUNDLED[name]
    pieces = tokenizer() if about.kind == "perplexity" else None
    return Network(
        name, model, about.kind, {"kind": "bundled", "name": name}, pieces, pieces.encode if pieces else None
    )


def _transformers(name: str, gguf: str | None = None) -> Network:
    """The model in a Hugging Face folder or of a hub id, in its own number type; `gguf` is a file in the folder."""
    transformers = need("transformers", "hf", f"Hugging Face models such as {name!r}")
    gguf_options = {} if gguf is None else {"gguf_file": gguf}
    config = config_of(name, gguf)
    kind, class_name = kind_of(config, transformers)
    if gguf is not None and kind != "perplexity":
        raise MpqError(f"{name}/{gguf} is a {class_name}: only language models are read from GGUF files")
    if gguf is None:
        check_stored_weights(name, config)
    try:
        loaded, report = getattr(transformers, class_name).from_pretrained(
            name, dtype="auto", output_loading_info=True, **gguf_options
        )
    except Exception as error:  # damaged files raise any exception
        raise MpqError(f"the weights of {name} cannot be loaded: {first_line(error)}") from error
    if extra := sorted(report["unexpected_keys"]):
        log.warning("%d tensors of %s have no place in %s, such as %s", len(extra), name, class_name, extra[0])
    if missing := sorted(report["missing_keys"]):
        raise MpqError(
            f"{name} lacks {len(missing)} tensors of {class_name}, such as {missing[0]}, which would be random: "
            "complete its files, or name the class that they hold under 'architectures' in config.json"
        )
    model = unstack(loaded).eval()
    recipe = {
        "kind": "transformers", "class": type(loaded).__name__,
        "config": json.loads(loaded.config.to_json_string(use_diff=False)),
    }  # fmt: skip
    return _described(Network(name, model, kind, recipe), config, gguf)


def config_of(name: str, gguf: str | None = None) -> Any:
    """transformers' config of a folder, a hub id, or a GGUF file in the folder; MpqError without one."""
    transformers = need("transformers", "hf", f"Hugging Face models such as {name!r}")
    gguf_options = {} if gguf is None else {"gguf_file": gguf}
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **gguf_options)
    except Exception as error:  # damaged files raise any exception
        known = f"{nearest_names(name, BUNDLED)}; else a folder, a hub id, timm:NAME or package.module:factory"
        raise MpqError(f"unknown model {name!r}: {known} ({first_line(error)})") from error


def network_in(folder: Path, model: nn.Module) -> Network:
    """A model of transformers that was loaded from a folder, with the data properties in the folder's files.

    Raises:
        MpqError: the folder holds no config that transformers knows, or a damaged tokenizer.
    """
    transformers = need("transformers", "hf", "Hugging Face models")
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MpqError(f"the config in {folder} cannot be read: {first_line(error)}") from error
    kind, _ = kind_of(config, transformers)
    return _described(Network(str(folder), model, kind, {}), config, None)


def _described(network: Network, config: Any, gguf: str | None) -> Network:
    """The network with tokenizer, sizes and side files of its folder or hub id."""
    transformers = need("transformers", "hf", "Hugging Face models")
    name, gguf_options = network.name, {} if gguf is None else {"gguf_file": gguf}
    network = replace(network, side_files=() if gguf else _side_files(name))
    if network.kind in ("accuracy", "distance") and _takes_images(network.model):
        about = _processing(name, transformers)
        mean, std = (tuple(about.get(key) or ()) for key in ("image_mean", "image_std"))
        return replace(network, mean=mean, std=std, size=_image_size(about, config))
    lengths = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    context = next((length for length in lengths if isinstance(length, int) and length > 0), None)  # XLNet says -1
    if getattr(config, "model_type", "") in PADDED_POSITIONS and context:
        context -= config.pad_token_id + 1  # positions start after the padding's
    try:
        tokens = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **gguf_options)
    except Exception as error:  # damaged files fail anywhere inside, in every way
        files = [file for file in network.side_files if file.name in TOKENIZER_FILES]
        if not files:
            log.warning("%s has no tokenizer (%s): give its data as tokens", name, first_line(error))
            return replace(network, context=context)
        reason = f"the tokenizer of {name} cannot be loaded from {files[0].name} ({first_line(error)})"
        log.warning("%s: give its data as tokens", reason)
        return replace(network, context=context, damage=reason)
    return replace(network, tokenizer=tokens, encode=encoder_of(tokens), context=context)


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to tokens, without special tokens; long texts in pieces, for tokenizers take much memory."""

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = start + CHARACTERS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            start = end
        return ids

    return encode


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder, None where there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    transformers = need("transformers", "hf", "tokenizers")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere inside, in every way
        raise MpqError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _gguf(path: Path) -> Network:
    """The dequantized language model of a GGUF file."""
    need("gguf", "gguf", "GGUF files")
    if not path.is_file():
        raise MpqError(f"no such file: {path}")
    log.warning("%s is already quantized: its dequantized weights are taken as the original model", path)
    network = _transformers(str(path.parent), path.name)
    return replace(network, name=str(path))


def kind_of(config: Any, transformers: Any) -> tuple[str, str]:
    """The measure of a model's quality, and its class in transformers."""
    auto = transformers.models.auto.modeling_auto
    class_name = (config.architectures or [""])[0]
    if class_name == "" and config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        class_name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    if not hasattr(transformers, class_name or "?"):
        raise MpqError(f"the model is a {class_name or config.model_type}: transformers has no such class")
    if class_name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not getattr(
        config, "is_encoder_decoder", False
    ):
        return "perplexity", class_name
    if class_name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "seq2seq", class_name
    if class_name.endswith("ForImageClassification"):
        return "accuracy", class_name
    return "distance", class_name


def _takes_images(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "pixel_values"


def _side_files(name: str) -> tuple[Path, ...]:
    """The `SIDE_FILES` beside the model's config."""
    folder = folder_of(name)
    return tuple(folder / file for file in SIDE_FILES if (folder / file).is_file())


def _processing(name: str, transformers: Any) -> Mapping[str, Any]:
    """Mean and deviation of an image model's processor; empty where it gives none."""
    try:
        about, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return dict(about)


def _image_size(about: Mapping[str, Any], config: Any) -> tuple[int, int] | None:
    """Height and width of a model's images, None where any size is accepted."""
    size: Any = about.get("crop_size") if about.get("do_center_crop") else about.get("size")
    size = size or getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if isinstance(size, int):
        size = (size, size)
    return (int(size[0]), int(size[1])) if size else None


def _timm(name: str) -> Network:
    timm = need("timm", "timm", "timm models")
    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        raise MpqError(f"timm has no model {model_name!r}: {nearest_names(model_name, timm.list_models())}")
    try:
        model = timm.create_model(model_name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise MpqError(f"the weights of {name} cannot be loaded: {first_line(error)}") from error
    about = timm.data.resolve_model_data_config(model)
    recipe = {"kind": "timm", "name": model_name}
    return Network(name, model.eval(), "accuracy", recipe, mean=tuple(about["mean"]), std=tuple(about["std"]))


def _factory(name: str, untrusted: Collection[str]) -> Network:
    return Network(name, _made_by(name, untrusted), None, {"kind": "factory", "path": name})


def _made_by(path: str, untrusted: Collection[str] = ()) -> nn.Module:
    made = import_object(path, untrusted)()
    if not isinstance(made, nn.Module):
        raise MpqError(f"{path} returned a {type(made).__name__}: expected a torch.nn.Module")
    return made.eval()
