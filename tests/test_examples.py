"""Every example runs; a notebook is run as the script of its cells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXPECTED = {
    "quickstart.py": "packed differs from simulated",
    "llama.py": "mpq, packed",
    "cnn_finetune.py": "fine-tuned",
    "custom_metric.py": "12 layers at",
    "few_bits_training.py": "NVFP4           accuracy",
    "one_shot.py": "12 layers at",
    "other_quantizers.py": "ours for gptqmodel",
    "frontier.ipynb": "Allocation(12 layers",
}


def test_every_example_is_run():
    assert {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name, tmp_path):
    script = FOLDER / name
    if script.suffix == ".ipynb":
        cells = json.loads(script.read_text(encoding="utf-8"))["cells"]
        script = tmp_path / "notebook.py"
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        script.write_text("\n".join(code), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = [str(tmp_path / "out")] if name in ("quickstart.py", "llama.py", "cnn_finetune.py", "one_shot.py") else []
    done = subprocess.run([sys.executable, str(script), *folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
