"""A package missing from pyproject's list works in a clone but is missing from the wheel."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_folder_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 on
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    top = {folder: ROOT / folder for folder in ("search", "sensitivity", "proxies", "exporters")}
    inside = [path.parent.relative_to(ROOT).parts for path in (ROOT / "mpq").rglob("__init__.py")]
    found = {".".join(parts) for parts in inside if not (len(parts) > 1 and parts[1] in top)}
    for name, folder in top.items():
        found |= {
            ".".join(("mpq", name, *path.parent.relative_to(folder).parts)) for path in folder.rglob("__init__.py")
        }
    assert set(settings["packages"]) == found
