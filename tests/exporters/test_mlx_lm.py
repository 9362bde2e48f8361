"""mlx-lm loads our folders and gives our perplexity. Needs MPQ_MLX_PYTHON, a Python with mlx-lm (0.32, CPU)."""

import os

import pytest
import torch

from experiments.peers.served import served
from experiments.peers.served import simulated as computed
from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.rules import MLX_MODELS
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from tests.exporters.architectures import model_of

PYTHON = os.environ.get("MPQ_MLX_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MPQ_MLX_PYTHON names no Python with mlx-lm")
TOKENS = torch.randint(3, 96, (2, 48), generator=seeded(5))
HELD = (*TARGETS["mlx"].schemes, "fp4-e2m1-g16-se4m3")


@pytest.mark.parametrize("kind", MLX_MODELS)
def test_every_architecture_has_the_simulated_perplexity(kind, tmp_path):
    model = model_of(kind)
    layers = find_layers(model)
    allocation = Allocation(layers, tuple(HELD[i % len(HELD)] for i in range(len(layers))))
    folder = export(model, allocation, tmp_path / "out", to="mlx")
    simulated = simulate(model, allocation, trainable=False)
    theirs, ours = served(str(PYTHON), "mlx", folder, TOKENS, timeout=120), computed(simulated, TOKENS)
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=0.002)
    assert (ours.tops == theirs.tops).float().mean() >= 0.97
