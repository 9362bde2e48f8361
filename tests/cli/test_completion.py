"""The script of `mpq completion` completes commands and options in a real shell."""

import shutil
import subprocess

import pytest

from mpq.cli.main import main


def complete(script, *words):
    """Bash's completions of the last word."""
    line = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}"
    asked = f"{script}\n{line}; _mpq; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_and_their_options_are_completed(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete(script, "mpq", "quan") == ["quantize"]
    assert complete(script, "mpq", "quantize", "--bi") == ["--bits"]
    assert complete(script, "mpq", "formats", "--bi") == []
    assert complete(script, "mpq", "quantize", "out") == []  # files, by the shell's default


def test_an_unknown_shell_is_refused():
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "fish"])
