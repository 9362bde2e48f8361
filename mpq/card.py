"""README.md of an output folder: what it holds, how it was made, its quality and what runs it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """Write the page; one of the same name that is not ours stays, with a warning."""
    path = folder / NAME
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        log.warning("%s is there already and not mpq's: left as it is", path)
        return
    command = target.serving(".", cache)
    run = f"\n## Run\n\n```sh\n{command}\n```\n" if command else ""
    made = "".join(f"- {name}: {value}\n" for name, value in settings.items())
    text = (
        f"{MARK}\n# {title}\n\nQuantized layer by layer for {target.readers or target.name}; `allocation.json` says "
        f"which format each layer has, `report.html` shows more.\n{run}\n## Quality on unseen data\n\n{_table(rows)}\n"
        f"{' '.join(words)}\n\n## How it was made\n\n{made}"
    )
    with write_atomically(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row[:-1] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
