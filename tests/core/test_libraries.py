"""Messages where the compiled libraries are missing."""

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
def test_missing_libraries_are_reported_once(caplog):
    assert main(["completion", "bash"]) == 0
    assert [text.split(":")[0] for text in caplog.messages] == [
        "mpq was installed without its compiled kernels",
        "mpq was installed without its compiled rounding",
    ]
    assert "300 times slower" in caplog.text
    assert "C compiler" in caplog.text
    main(["completion", "bash"])
    assert len(caplog.messages) == 2


def test_present_libraries_are_not_reported(caplog):
    if libraries.path_of(libraries.KERNELS) is None:
        pytest.skip("installed without a compiler")
    caplog.clear()
    libraries.path_of.cache_clear()
    assert libraries.path_of(libraries.KERNELS).endswith((".so", ".pyd"))
    assert not caplog.messages
