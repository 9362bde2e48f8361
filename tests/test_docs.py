"""The documentation's own code runs, and the tables of names are those of the registries."""

import re
import runpy
from pathlib import Path

import pytest
from small_cnn import images, small_cnn

import mpq
from mpq.exporters.measured import table
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import cross_entropy
from mpq.rounding import METHODS
from mpq.search import SEARCHES
from mpq.sensitivity import METRICS

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [code for code in found if "--8<--" not in code]


@pytest.fixture
def registries(monkeypatch):
    for registry in (METRICS, SEARCHES, TARGETS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))


def test_the_examples_of_extending_work(registries, tmp_path):
    for code in blocks("extending.md"):
        exec(code, {})
    table = mpq.profile(small_cnn(), images(), cross_entropy, ["int2-g32", "int4-g32"], metric="fisher", progress=False)
    allocation = mpq.frontier(table, search="uniform").allocation(0)
    assert set(allocation.schemes) == {"int4-g32"}
    written = mpq.export(small_cnn(), allocation, tmp_path, to="names")
    assert "int4-g32" in (written / "formats.json").read_text()


def test_the_guide_quantizes_a_custom_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "mpq": mpq,
        "model": small_cnn(),
        "calibration": images(),
        "evaluation": images(),
        "loss_fn": cross_entropy,
    }
    exec(next(block for block in blocks("guides.md") if "mpq.Source(" in block), names)
    assert names["outcome"].allocation.bits <= 4.25
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_pages_show_every_name():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["on_page_markdown"]((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    assert "{{" not in page
    for registry in (METRICS, SEARCHES, TARGETS, METHODS):
        assert all(f"| `{name}` |" in page for name in registry)


def test_every_file_named_by_paper_pages_exists():
    pages = sorted((ROOT / "docs" / "papers").glob("*.md"))
    assert len(pages) == 12
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    files = re.findall(r"(?<![\w/.])((?:sensitivity|search|proxies|mpq|tests|experiments)/[\w/.]*)", text)
    assert len(files) > 15
    assert not [name for name in files if not (ROOT / name.rstrip(".")).exists()]


def test_the_readme_states_measurements_with_versions():
    assert table(TARGETS.values()) in (ROOT / "README.md").read_text(encoding="utf-8")
