"""Compare a folder with what vLLM's ModelOpt reader expects; run in an environment with vLLM (0.32).

    PYTHON vllm_modelopt.py FOLDER

Creates the parameters that vLLM would load each quantized layer into, from both configurations of the folder, and
compares them with the file's tensors. Prints JSON: the algorithm of each layer, and the differences.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.model_executor import parameter
from vllm.model_executor.layers.quantization import modelopt

parameter.get_tensor_model_parallel_rank = lambda: 0
parameter.get_tensor_model_parallel_world_size = lambda: 1


def parameters(config: modelopt.ModelOptMixedPrecisionConfig, name: str, shape: tuple[int, int]) -> tuple[str, dict]:
    algorithm = config._resolve_quant_algo(name)
    own = getattr(config, modelopt.LINEAR_ALGOS[algorithm][1])
    spec, context, _ = modelopt.resolve(algorithm, own, name)
    layer = torch.nn.Module()
    shapes = modelopt.Shapes([shape[0]], shape[1], torch.bfloat16)
    for key, role in ((spec.weight, modelopt.WEIGHT), (spec.activation, modelopt.ACT)):
        if key is not None:
            modelopt.SCHEME_FOR[key].create_weights(layer, role, context, shapes, lambda *_: None)
    return algorithm, {key: (tuple(part.shape), part.dtype) for key, part in layer.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    legacy = json.loads((folder / "hf_quant_config.json").read_text())
    algorithms, wrong = {}, []
    with safe_open(folder / "model.safetensors", "pt") as file:
        for entry in (described, legacy):
            chosen = modelopt.ModelOptMixedPrecisionConfig.override_quantization_method(entry, None)
            config = modelopt.ModelOptMixedPrecisionConfig.from_config(entry)
            if chosen != "modelopt_mixed":
                wrong.append(f"taken as {chosen}")
            for name in described["quantized_layers"]:
                if config.is_layer_excluded(name):
                    wrong.append(f"{name} is excluded")
                weight = file.get_tensor(f"{name}.weight")
                size = len(weight), weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
                algorithms[name], expected = parameters(config, name, size)
                for key, (shape, dtype) in expected.items():
                    tensor = file.get_tensor(f"{name}.{key}")
                    actual = (tuple(tensor.shape) or (1,), tensor.dtype)
                    if actual != (shape, dtype):
                        wrong.append(f"{name}.{key} is {actual}, wanted {(shape, dtype)}")
                for key in file.keys():  # noqa: SIM118
                    stem, _, end = key.rpartition(".")
                    if stem == name and end not in expected:
                        wrong.append(f"{key} has no place")
    print(json.dumps({"algorithms": algorithms, "wrong": wrong}))


if __name__ == "__main__":
    main()
