"""PyTorch's threads sleep soon after an operation, unless the user decides otherwise."""

import os
import subprocess
import sys

import pytest

SHOW = "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("imports", "variables", "expected"),
    [
        ("import mpq", {}, "10000"),
        ("import mpq", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import mpq", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import sys; sys.modules['torch'] = None; import mpq", {}, "None"),  # loaded: it has read the environment
    ],
)
def test_threads_spin_briefly_unless_the_user_decides(imports, variables, expected):
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", imports + SHOW], env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected
