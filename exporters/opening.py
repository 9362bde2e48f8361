"""Opening folders of any target: ours compute from packed weights, others from dequantized weights.

GPTQ, compressed-tensors, ModelOpt and MLX folders, ours or other tools', are read by the readers that check our
exports; GGUF files by transformers. Layers then hold dequantized weights and round their inputs where the scheme says.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, expect
from mpq.core.layer import Layer
from mpq.exporters.configurations import read_configuration, tool_of
from mpq.exporters.folder import ALLOCATION, CHECKSUMS, read_allocation, read_checked_json, read_checksums, read_json
from mpq.exporters.gguf.reader import checked_tensors, tensor_types
from mpq.exporters.holding import FLOAT
from mpq.exporters.mpq import checkpoint
from mpq.exporters.mpq.skeleton import build_skeleton
from mpq.exporters.shards import Shards
from mpq.generation.serving import serve_cache
from mpq.network.layers import find_layers, matrix_to_weight
from mpq.quantized import InputRounding, round_inputs
from mpq.rounding.codes import COPY_DTYPES
from mpq.sources.networks import Network, open_network

READERS = {
    "gptq": "mpq.exporters.gptq:read",
    "compressed-tensors": "mpq.exporters.compressed_tensors:read",
    "modelopt": "mpq.exporters.modelopt:read",
    "mlx": "mpq.exporters.mlx:read",
}


@dataclass(frozen=True, eq=False)
class Opened:
    """A folder's model, and the allocation that it was written in."""

    model: nn.Module
    allocation: Allocation
    kind: str  # "mpq", "gptq", ..., "gguf", "transformers"
    network: Network | None = None  # with tokenizer and sizes, if available


def load(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> nn.Module:
    """The model of an exported folder, in evaluation mode: `mpq.load`.

    Our own checkpoints compute from packed weights (`mpq.exporters.mpq.checkpoint.load`). Folders of other targets and
    other tools, and GGUF files, compute from dequantized weights with the same values, for measuring them.

    Args:
        folder: what `mpq.export` or another quantizer wrote.
        model: the same architecture with any weights, for our checkpoints that do not say how to build it.
        device: where to.
        trust: whether the folder may name a function of the user's own to be imported and called.

    Raises:
        MpqError: the folder cannot be read, is incomplete or altered, or the model differs.
    """
    if kind_of(folder) == "mpq":
        return checkpoint.load(folder, model=model, device=device, trust=trust)
    return open_any(folder, device=device, trust=trust).model


def open_any(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", trust: bool = False) -> Opened:
    """The folder's model, on the device, and its allocation; MpqError as `load`."""
    path, kind = Path(folder), kind_of(folder)
    if kind == "mpq":  # arranged for the device as it is read
        return Opened(checkpoint.load(path, device=device, trust=trust), read_allocation(path), kind)
    opened = _opened(path, kind)
    opened.model.to(device)
    return opened


def _opened(path: Path, kind: str) -> Opened:
    folder = path if path.is_dir() else path.parent
    if (folder / CHECKSUMS).is_file():
        _check_exported(folder, kind)
    if kind == "gguf":
        network = open_network(str(path))
        layers = find_layers(network.model)
        return Opened(network.model, _recorded(path) or _of_types(path, layers), kind, network)
    if kind == "transformers":
        network = open_network(str(path))
        layers = find_layers(network.model)
        return Opened(network.model, Allocation(layers, (_own_format(network.model),) * len(layers)), kind, network)
    return _dequantized(path, kind)


def _check_exported(folder: Path, kind: str) -> None:
    """MpqError when a text, or a tensor of a GGUF file, is not as it was exported; other tensors are checked as they
    are read.
    """
    checksums = read_checksums(folder)
    for name in ("config.json", ALLOCATION):
        if name in checksums:
            read_checked_json(folder / name, checksums)
    if kind == "gguf" and any(name.endswith(".gguf") for name in checksums):
        for _ in checked_tensors(folder):
            pass


def kind_of(folder: str | os.PathLike[str]) -> str:
    """The kind of a folder; MpqError if mpq does not read it."""
    expect(folder, (str, os.PathLike), "a folder's name")
    path = Path(folder)
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    if not path.is_dir():
        raise MpqError(f"{path} is not a folder: expected one written by mpq.export")
    if not (path / "config.json").is_file():
        if next(path.glob("*.gguf"), None) is not None:
            return "gguf"
        if next(path.glob("*.onnx"), None) is not None:
            raise MpqError(
                f"{path} holds a graph, which ONNX Runtime runs and mpq does not: export to mpq to measure it"
            )
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None and isinstance(config.get("quantization"), dict):
        return "mlx"
    if method is None:
        return "transformers" if "model_type" in config else "mpq"  # its loader reports what is missing
    if method != "mpq" and method not in list(READERS):  # a damaged config may have a list here
        raise MpqError(
            f"{path} has weights of {method!r}, which mpq does not read: expected {', '.join(READERS)} or mpq"
        )
    return str(method)


def _own_format(model: nn.Module) -> str:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(name for name, known in COPY_DTYPES.items() if known == dtype)


def _dequantized(path: Path, kind: str) -> Opened:
    config = read_json(path / "config.json")
    if (config.get("quantization_config") or {}).get("checkpoint_format", "gptq") != "gptq":
        raise MpqError(f"{path} has GPTQ's second layout, whose zero points mpq does not read: save it as gptq")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    with _stored(path) as (names, tensor):
        model = build_skeleton(plain, path, trust=False, stored=names)
        layers = find_layers(model)
        allocation = _recorded(path) or _described(path, kind, layers, names)
        state: dict[str, Tensor] = {}
        known = {layer.name: layer for layer in allocation.layers}
        prefixes = {f"{name}.": name for name in known if not allocation.scheme_of[name].weight.is_float_copy}
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in prefixes.values()}
        for name in names:
            owner = prefixes.get(name.rpartition(".")[0] + ".")
            if owner is None or name.endswith(".bias"):
                state[name] = tensor(name)
            else:
                parts[owner][name.rpartition(".")[2]] = tensor(name)
    module, _, function = READERS[kind].partition(":")
    read = getattr(import_module(module), function)
    for name, tensors in parts.items():
        scheme, layer = allocation.scheme_of[name], model.get_submodule(name)
        try:
            numbers, _ = read(scheme, tensors)
            if numbers.shape != (known[name].rows, known[name].cols):
                raise ValueError(f"numbers of {tuple(numbers.shape)}")
            weight = matrix_to_weight(numbers, layer)
        except (KeyError, RuntimeError, ValueError) as error:
            raise MpqError(
                f"{path}: layer {name} is not stored as {scheme.name} ({error!r}): is it damaged?"
            ) from error
        state[f"{name}.weight"] = weight.to(layer.weight.dtype)  # type: ignore[arg-type]
        _round(layer, scheme, tensors.get("input_scale"))
    _put(model, state, path)
    serve_cache(model, allocation.cache)
    return Opened(model.eval(), allocation, kind)


def _round(layer: nn.Module, scheme: Any, static: Tensor | None) -> None:
    """Round a layer's inputs by its scheme, with the file's static scale if there is one."""
    if static is None or scheme.activation is None or scheme.activation.granularity != "tensor":
        round_inputs([layer], scheme)
    else:
        layer.register_forward_pre_hook(InputRounding(scheme.activation, float(static)), with_kwargs=True)


def _put(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a model without storage its tensors, and tied ones to those that share them."""
    own = model.state_dict()
    missing, unexpected = model.load_state_dict(
        {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()},
        strict=False, assign=True,
    )  # fmt: skip
    tie: Callable[[], None] | None = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    empty = [name for name in missing if model.state_dict()[name].is_meta]
    for name in (*empty, *unexpected):
        what = f"has no tensor {name}, which" if name in empty else f"holds the tensor {name}, which"
        raise MpqError(f"{path} {what} the model {'needs' if name in empty else 'does not have'}")


def _recorded(path: Path) -> Allocation | None:
    """The allocation.json beside the weights."""
    folder = path if path.is_dir() else path.parent
    return read_allocation(folder) if (folder / ALLOCATION).is_file() and (folder / CHECKSUMS).is_file() else None


def _described(path: Path, kind: str, layers: tuple[Layer, ...], stored: Collection[str]) -> Allocation:
    """The schemes in config.json of layers that are stored with more than a weight and a bias."""
    if kind == "modelopt":
        raise MpqError(f"{path} has no allocation.json: mpq reads only ModelOpt folders of its own")
    text = json.dumps(read_json(path / "config.json"))
    owners = {owner for owner, _, part in (name.rpartition(".") for name in stored) if part not in ("weight", "bias")}
    coded = tuple(layer for layer in layers if layer.name in owners)
    if not coded:
        raise MpqError(f"{path} names a quantization and holds no quantized layer: is it damaged?")
    schemes = read_configuration(tool_of(text), text, coded).scheme_of
    return Allocation(layers, tuple(schemes[one.name].name if one.name in schemes else FLOAT for one in layers))


def _of_types(path: Path, layers: tuple[Layer, ...]) -> Allocation:
    file = path if path.is_file() else sorted(path.glob("*.gguf"))[0]
    lines = (f"^{name.replace('.', chr(92) + '.')}$={kind}" for name, kind in tensor_types(file).items())
    return read_configuration("llama-quantize", "\n".join(lines), layers)


@contextmanager
def _stored(path: Path) -> Iterator[tuple[tuple[str, ...], Callable[[str], Tensor]]]:
    """The names of a folder's tensors and a function that reads one, verified if the folder has checksums."""
    if (path / CHECKSUMS).is_file():
        with Shards(path, read_checksums(path)) as shards:
            yield tuple(shards), shards.read
        return
    with ExitStack() as stack:
        home: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise MpqError(f"{file} is cut or damaged ({error})") from error
            home.update(dict.fromkeys(opened.keys(), opened))
        if not home:
            raise MpqError(f"{path} holds no safetensors file: expected the weights of a model")
        yield tuple(home), partial(_tensor, home)


def _tensor(home: Mapping[str, Any], name: str) -> Tensor:
    tensor: Tensor = home[name].get_tensor(name)
    return tensor
