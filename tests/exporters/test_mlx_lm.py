"""mlx-lm itself loads our folders and computes our numbers. Wants MPQ_MLX_PYTHON, a Python with mlx-lm (0.32, CPU)."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.exporters.rules import MLX_MODELS
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import mean_loss, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from tests.exporters.architectures import model_of

PYTHON = os.environ.get("MPQ_MLX_PYTHON")
SCRIPT = Path(__file__).parents[2] / "experiments" / "peers" / "mlx_perplexity.py"
pytestmark = pytest.mark.skipif(not PYTHON, reason="MPQ_MLX_PYTHON names no Python with mlx-lm")
TOKENS = torch.randint(3, 96, (2, 48), generator=seeded(5))
HELD = (*TARGETS["mlx"].schemes, "fp4-e2m1-g16-se4m3")


@pytest.mark.parametrize("kind", MLX_MODELS)
def test_every_architecture_gives_our_perplexity(kind, tmp_path):
    model = model_of(kind)
    layers = find_layers(model)
    allocation = Allocation(layers, tuple(HELD[i % len(HELD)] for i in range(len(layers))))
    folder = export(model, allocation, tmp_path / "out", to="mlx")
    simulated = simulate(model, allocation, trainable=False)
    (tmp_path / "windows.json").write_text(json.dumps(TOKENS.tolist()))
    command = [str(PYTHON), str(SCRIPT), str(folder), str(tmp_path / "windows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    answer = json.loads(done.stdout)
    ours = math.exp(mean_loss(simulated, [TOKENS], next_token_loss))
    assert answer["perplexity"] == pytest.approx(ours, rel=0.002)
    with torch.no_grad():
        tops = simulated(TOKENS).logits.argmax(-1)
    assert (tops == torch.tensor(answer["tops"])).float().mean() >= 0.97
