"""Sony's Model Compression Toolkit on ResNet-20, run by the Python of an environment that has it: JSON on stdout.

PYTHON -m experiments.peers.peer_mct BITS IMAGES
"""

import json
import sys
import time

import torch

for operator in ("nms", "qnms"):  # a torchvision built for GPUs needs them at import; nothing here calls them
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import model_compression_toolkit as mct  # noqa: E402
from model_compression_toolkit.target_platform_capabilities.constants import (  # noqa: E402
    KERNEL_ATTR,
    WEIGHTS_N_BITS,
)
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc  # noqa: E402
from torch import nn  # noqa: E402

from experiments.models.reference_models import cifar10_calibration, resnet  # noqa: E402

CHOICES = (2, 3, 4, 8)


def capabilities() -> object:
    """Their first platform with symmetric integers by output channel and unquantized activations."""
    base, _, default = (_weights_only(config) for config in _base_configs())
    choices = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: bits}}) for bits in reversed(CHOICES)]
    return tpc.generate_tpc(default_config=default, base_config=base, mixed_precision_cfg_list=choices, name="weights")


def _base_configs() -> tuple:
    base, choices, default = tpc.get_op_quantization_configs()
    return base, choices[0], default


def _weights_only(config: object) -> object:
    return config.clone_and_edit(enable_activation_quantization=False)


def main() -> None:
    torch.set_num_threads(1)
    bits, images = float(sys.argv[1]), int(sys.argv[2])
    model, batches = resnet(20), cifar10_calibration(images, 32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    numbers = sum(module.weight.numel() for module in layers.values())
    start = time.perf_counter()
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        model,
        lambda: ([inputs.numpy()] for inputs, _ in batches),
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=numbers * bits / 8),
        core_config=mct.core.CoreConfig(
            mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=images)
        ),
        target_platform_capabilities=capabilities(),
    )
    seconds = time.perf_counter() - start
    found = {
        name: module.weights_quantizers["weight"].num_bits
        for name, module in quantized.named_modules()
        if getattr(module, "weights_quantizers", None)
    }
    chosen = {name: found[key] for name in layers for key in found if key.startswith(name.replace(".", "_"))}
    print("\n" + json.dumps({"seconds": seconds, "bits": chosen}))


if __name__ == "__main__":
    main()
