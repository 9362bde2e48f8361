"""The compiled C libraries of the package; without a C compiler at its installation they are missing."""

import logging
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

HOME = Path(__file__).parents[1]
KERNELS, ROUNDING = "kernels/cpu", "rounding"
COSTS = {  # measured on two cores of an AMD EPYC with AVX-512
    KERNELS: "kernels: on CPUs packed layers run in plain PyTorch, some 300 times slower (one token through 4096 x "
    "1024 weights takes 22 to 25 ms instead of 0.05 to 0.08)",
    ROUNDING: "rounding: PyTorch computes the same, several times slower",
}
_log = logging.getLogger(__name__)


@cache
def path_of(room: str) -> str | None:
    """Where the library of `KERNELS` or `ROUNDING` stands; None, with one warning of the cost, where it is missing."""
    spec = PathFinder.find_spec("_native", [str(HOME / room)])
    if spec is None or spec.origin is None:
        advice = "install a wheel, or a C compiler and then mpq again"
        _log.warning("mpq was installed without its compiled %s; %s", COSTS[room], advice)
        return None
    return spec.origin


def warn_about_missing() -> None:
    """Warn of each library that is missing, once."""
    for room in COSTS:
        path_of(room)
