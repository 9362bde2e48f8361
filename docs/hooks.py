"""Tables of names, printed by the registries themselves: `{{ metrics }}` in a page becomes the table of metrics."""

from typing import Any

from mpq.exporters.measured import table
from mpq.exporters.targets import TARGETS
from mpq.rounding import METHODS
from mpq.search import SEARCHES
from mpq.sensitivity import METRICS

TABLES = {"metrics": METRICS, "searches": SEARCHES, "targets": TARGETS, "roundings": METHODS}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in."""
    for name, registry in TABLES.items():
        markdown = markdown.replace("{{ " + name + " }}", registry.markdown())
    return markdown.replace("{{ readers }}", table(TARGETS.values()))
