from mpq.card import MARK, write_card
from mpq.exporters.targets import TARGETS
from mpq.report import Row

ROW = Row("original", "", "5 MB", "perplexity 26", "", "", "", "", "")


def card(folder):
    write_card(
        folder, title="m at 4 bits", target=TARGETS["vllm"], rows=[ROW], words=["Good."], settings={"command": "mpq"}
    )
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
