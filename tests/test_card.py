from mpq.card import MARK, write_card
from mpq.exporters.targets import TARGETS
from mpq.report import Row

ROW = Row("original", "", "5 MB", "perplexity 26", "", "", "", "", "")


def card(folder):
    write_card(
        folder, title="m at 4 bits", target=TARGETS["vllm"], rows=[ROW], words=["Good."], settings={"command": "mpq"}
    )
    return (folder / "README.md").read_text()


def test_the_page_says_what_runs_the_folder_and_how_good_it_is(tmp_path):
    text = card(tmp_path)
    assert "vllm serve .\n" in text
    assert "| original |  | 5 MB | perplexity 26 |" in text
    assert "- command: mpq" in text
    assert card(tmp_path) == text


def test_a_page_of_the_users_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert card(tmp_path) == "mine"
    assert not MARK.startswith("mine")
