"""Measurements of search experiments, appended to a file one number a line, so that they can be run in pieces."""

import csv
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "search.csv"
HEADINGS = ("part", "case", "search", "seed", "measure", "value")

Rows = dict[tuple[str, str, str, int], dict[str, float]]  # (part, case, search, seed): value by measure


def append(path: Path, part: str, case: str, search: str, seed: int, measures: Mapping[str, float]) -> None:
    """Append the measurements of one run in whole lines, so that two runs may share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        text = [",".join((part, case, search, str(seed), name, f"{value:.6g}")) for name, value in measures.items()]
        stream.write("\n".join([",".join(HEADINGS)] * new + text) + "\n")


def read(path: Path) -> Rows:
    """All rows; of repeated runs only the last."""
    rows: Rows = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                key = (row["part"], row["case"], row["search"], int(row["seed"]))
                rows.setdefault(key, {})[row["measure"]] = float(row["value"])
    return rows
