"""NVIDIA ModelOpt's auto_quantize on ResNet-20, run by the Python of an environment that has it: JSON on stdout.

PYTHON -m experiments.peers.peer_modelopt BITS IMAGES
"""

import json
import sys
import time

import modelopt.torch.quantization as mtq
import torch
from torch.nn import functional

from experiments.models.reference_models import cifar10_calibration, resnet

CHOICES = (2, 3, 4, 8)


def weights_only(bits: int) -> dict:
    """Signed integers by output channel, activations unquantized."""
    weight = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}}
    return {"quant_cfg": [weight, {"quantizer_name": "*input_quantizer", "enable": False}], "algorithm": "max"}


def main() -> None:
    torch.set_num_threads(1)
    model, batches = resnet(20), list(cifar10_calibration(int(sys.argv[2]), 32))
    start = time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": float(sys.argv[1])},
        quantization_formats=[weights_only(bits) for bits in CHOICES],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: functional.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    seconds = time.perf_counter() - start
    chosen = {
        name.removesuffix(".quant_recipe"): next((bits for bits in CHOICES if f"bits: {bits}." in str(recipe)), 16)
        for name, recipe in state["best"]["recipe"].items()
    }
    print("\n" + json.dumps({"seconds": seconds, "bits": chosen}))


if __name__ == "__main__":
    main()
