from mpq import frontier
from mpq.card import MARK, write_card
from mpq.core.layer import Layer
from mpq.core.table import SensitivityTable
from mpq.exporters.targets import TARGETS
from mpq.plots import Prediction
from mpq.report import Row, write_report

ROW = Row("original", "", "5 MB", "perplexity 26", "", "", "", "", "")


def card(folder, command="mpq"):
    settings = {"command": command}
    write_card(folder, title="m at 4 bits", target=TARGETS["vllm"], rows=[ROW], words=["Good."], settings=settings)
    return (folder / "README.md").read_text()


def test_the_card_states_the_program_and_the_quality(tmp_path):
    text = card(tmp_path)
    assert "vllm serve .\n" in text
    assert "| original |  | 5 MB | perplexity 26 |" in text
    assert "- command: mpq" in text
    assert card(tmp_path) == text


def test_a_readme_of_the_user_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert card(tmp_path) == "mine"
    assert not MARK.startswith("mine")


def test_undecodable_names_are_escaped(tmp_path):
    """Names of files need not be UTF-8."""
    assert "- command: mpq -o \\udcff" in card(tmp_path, "mpq -o \udcff")
    table = SensitivityTable((Layer("a", "linear", 8, 8),), ("int4-channel",), [[1.0]], [[0.0]], "fisher")
    best = frontier(table)
    write_report(
        tmp_path / "report.html", title="\udcff", table=table, frontier=best, allocation=best.allocation(0),
        predictions=[Prediction("a", 1.0, 1.1, 0.1)], rows=[ROW], words=["Good."],
    )  # fmt: skip
    assert "<title>\\udcff" in (tmp_path / "report.html").read_text()
