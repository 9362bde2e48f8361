"""Old module names import the moved modules, with a warning."""

import importlib
import subprocess
import sys

import pytest

from mpq.moved import MOVED


@pytest.mark.parametrize("name", ["mpq.core.calibration", "mpq.core.methods.gptq", "mpq.core.rounding", "mpq.generate"])
def test_an_old_name_is_the_module_itself(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=MOVED[name]):
        module = importlib.import_module(name)
    assert module is importlib.import_module(MOVED[name])
    assert module.__spec__.name == module.__name__ == MOVED[name]


def test_names_come_from_an_old_module_in_a_new_process():
    code = (
        "from mpq.core.calibration import next_token_loss; from mpq.core.layers import find_layers; import mpq.search"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_unknown():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mpq.core.nothing")
