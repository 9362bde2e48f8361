"""An export killed at any moment leaves a folder that the same export completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes: this system has none")
def test_the_next_export_completes_a_killed_one(tmp_path):
    script = Path(__file__).with_name("killed_exports.py")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    kills = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("fresh")]
    assert len(kills) == 2
    assert min(kills) >= 8
