"""A model's state besides quantized weights, as exporters store it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation, check_allocation
from mpq.core.errors import MpqError
from mpq.quantized import checked_layers


def other_state(model: nn.Module, allocation: Allocation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors beside the layers' weights, each stored once, and for every further name of one its first name.

    A parameter that is a layer's weight under another name is named with the layer's "<name>.weight".

    Raises:
        MpqError: the model's state holds something else than tensors.
    """
    packed = {f"{name}.weight" for layer in check_allocation(allocation).layers for name in layer.names}
    tensors: dict[str, Tensor] = {}
    layers = [layer for layer, _ in checked_layers(model, allocation)]
    weights = {id(model.get_submodule(layer.name).weight): f"{layer.name}.weight" for layer in layers}
    tied = {
        name: weights[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights and name not in packed
    }
    packed |= tied.keys()
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue
        if not isinstance(tensor, Tensor):
            raise MpqError(f"the model's state {name} is a {type(tensor).__name__}: only tensors can be exported")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.data_ptr() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        tensors[name] = tensor
    return tensors, tied


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def model_config(model: nn.Module) -> dict[str, Any]:
    """The Hugging Face config of a model that has one, else its class alone; any earlier quantization left out."""
    own: Any = getattr(model, "config", None)
    config: dict[str, Any] = json.loads(own.to_json_string()) if hasattr(own, "to_json_string") else {}
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    return config


def write_config(folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """config.json, and generation_config.json where the model has one."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
