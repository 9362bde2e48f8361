"""What is said where the compiled libraries are missing."""

import pytest

from mpq.cli.main import main
from mpq.core import libraries


@pytest.fixture
def _nothing_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "HOME", tmp_path)
    libraries.path_of.cache_clear()
    yield
    libraries.path_of.cache_clear()


@pytest.mark.usefixtures("_nothing_compiled")
def test_the_first_command_says_once_what_missing_libraries_cost(caplog):
    assert main(["completion", "bash"]) == 0
    assert [text.split(":")[0] for text in caplog.messages] == [
        "mpq was installed without its compiled kernels",
        "mpq was installed without its compiled rounding",
    ]
    assert "300 times slower" in caplog.text
    assert "C compiler" in caplog.text
    main(["completion", "bash"])
    assert len(caplog.messages) == 2


def test_libraries_that_are_there_are_found_in_silence(caplog):
    if libraries.path_of(libraries.KERNELS) is None:
        pytest.skip("installed without a compiler")
    caplog.clear()
    libraries.path_of.cache_clear()
    assert libraries.path_of(libraries.KERNELS).endswith((".so", ".pyd"))
    assert not caplog.messages
