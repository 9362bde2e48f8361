"""README.md of an output folder: what it holds, how it was made, its quality and what runs it."""

import logging
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from mpq.core.cache_formats import CacheFormats
from mpq.core.files import write_atomically
from mpq.core.registry import Target
from mpq.report import HEADINGS, Row

log = logging.getLogger(__name__)

NAME = "README.md"
MARK = "<!-- written by mpq; edits are lost when the folder is written again -->"


def write_card(
    folder: Path,
    *,
    title: str,
    target: Target,
    rows: Sequence[Row],
    words: Sequence[str],
    settings: Mapping[str, object],
    cache: CacheFormats | None = None,
) -> None:
    """Write the page; a README.md that mpq did not write is kept, with a warning."""
    path = folder / NAME
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        log.warning("%s exists and was not written by mpq: not changed", path)
        return
    command = target.serving(".", cache)
    run = f"\n## Run\n\n```sh\n{command}\n```\n" if command else ""
    made = "".join(f"- {name}: {value}\n" for name, value in settings.items())
    table = f"{_table(rows)}\n" if rows else ""
    report = ", `report.html` shows more" if (folder / "report.html").exists() else ""
    text = (
        f"{MARK}\n# {title}\n\nQuantized layer by layer for {target.readers or target.name}; `allocation.json` says "
        f"which format each layer has{report}.\n{run}\n## Quality on unseen data\n\n{table}{' '.join(words)}\n\n"
        f"## How it was made\n\n{made}"
    )
    with write_atomically(path) as draft:
        draft.write_text(text, "utf-8", "backslashreplace")


def circumstances(model: nn.Module, seconds: float) -> dict[str, object]:
    """Versions, command, device and seconds."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ours = sys.modules["mpq"].__version__
    program = "mpq" if Path(sys.argv[0]).stem == "__main__" else Path(sys.argv[0]).name  # python -m mpq.cli
    return {
        "versions": f"mpq {ours}, torch {torch.__version__}, Python {platform.python_version()}",
        "command": shlex.join([program, *sys.argv[1:]]),
        "device": f"{device}, {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": f"{seconds:.0f}",
    }


def _table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row[:-1] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
