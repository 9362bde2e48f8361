"""Mixed-precision quantization search: per-layer number formats, the whole size/quality frontier, packed weights.

Verbs: `profile`, `frontier`, `allocate`, `simulate`, `quantize`, `finetune`, `export`, `load`, `evaluate`. Nouns:
`Format`, `Scheme`, `SensitivityTable`, `Problem`, `Frontier`, `Allocation`, `Source`, `Finetuning`, `Objective`. Names
are imported when they are first used.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpq.moved import Moved

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation as Allocation
    from mpq.core.errors import MpqError as MpqError
    from mpq.core.formats import Format as Format
    from mpq.core.formats import parse_format as parse_format
    from mpq.core.frontier import Frontier as Frontier
    from mpq.core.problem import Problem as Problem
    from mpq.core.problem import build_problem as build_problem
    from mpq.core.scheme import Scheme as Scheme
    from mpq.core.scheme import parse_scheme as parse_scheme
    from mpq.core.table import SensitivityTable as SensitivityTable
    from mpq.evaluation import evaluate as evaluate
    from mpq.exporters import export as export
    from mpq.exporters.opening import load as load
    from mpq.finetuning import finetune as finetune
    from mpq.lowprecision.layercast import layercast as layercast
    from mpq.quantized import simulate as simulate
    from mpq.search import frontier_of as frontier
    from mpq.search.choice import allocate as allocate
    from mpq.sensitivity.profile import profile as profile
    from mpq.sources import Source as Source
    from mpq.sources import open_source as open_source
    from mpq.training.objective import Objective as Objective
    from mpq.training.settings import Finetuning as Finetuning
    from mpq.verbs import quantize as quantize

_HOMES = {
    "Allocation": "mpq.core.allocation:Allocation",
    "Finetuning": "mpq.training.settings:Finetuning",
    "Format": "mpq.core.formats:Format",
    "Frontier": "mpq.core.frontier:Frontier",
    "MpqError": "mpq.core.errors:MpqError",
    "Objective": "mpq.training.objective:Objective",
    "Problem": "mpq.core.problem:Problem",
    "Scheme": "mpq.core.scheme:Scheme",
    "SensitivityTable": "mpq.core.table:SensitivityTable",
    "Source": "mpq.sources:Source",
    "allocate": "mpq.search.choice:allocate",
    "build_problem": "mpq.core.problem:build_problem",
    "evaluate": "mpq.evaluation:evaluate",
    "export": "mpq.exporters:export",
    "finetune": "mpq.finetuning:finetune",
    "frontier": "mpq.search:frontier_of",
    "layercast": "mpq.lowprecision.layercast:layercast",
    "load": "mpq.exporters.opening:load",
    "open_source": "mpq.sources:open_source",
    "parse_format": "mpq.core.formats:parse_format",
    "parse_scheme": "mpq.core.scheme:parse_scheme",
    "profile": "mpq.sensitivity.profile:profile",
    "quantize": "mpq.verbs:quantize",
    "simulate": "mpq.quantized:simulate",
}
__version__ = "0.1.0"
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # PyTorch's threads else spin for milliseconds after each operation: beside a busy job that takes twice the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # turns before a waiting thread sleeps; read when torch is loaded
sys.meta_path.insert(0, Moved())  # first: an old package would find its new files itself
__all__ = [
    "Allocation", "Finetuning", "Format", "Frontier", "MpqError", "Objective", "Problem", "Scheme",
    "SensitivityTable", "Source", "allocate", "build_problem", "evaluate", "export", "finetune", "frontier",
    "layercast", "load", "open_source", "parse_format", "parse_scheme", "profile", "quantize", "simulate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("search", "proxies", "lowprecision"):
        return import_module(f"mpq.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mpq' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
