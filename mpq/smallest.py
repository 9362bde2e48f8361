"""The smallest model whose measured divergence is within a limit, found by measuring points of the frontier."""

import logging
import math
from collections.abc import Callable

from mpq.acceptance import Acceptance, candidate_of
from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier
from mpq.evaluation import DIVERGE
from mpq.measuring import Measurer

log = logging.getLogger(__name__)

MEASURES = 12  # points of the frontier that are measured in one search
CLOSE = 0.005  # share of the size; narrower brackets are not refined
ATTEMPTS = 3  # finished models: gains of polishing and tuning are spent on fewer bytes
SLACK = 0.95  # share of the limit that counts as used up


def check_limit(limit: float, kind: str) -> None:
    """MpqError for an invalid limit, or a kind of quality without a divergence."""
    if not math.isfinite(limit) or limit <= 0:
        raise MpqError(f"invalid limit {limit:g} of the KL divergence: expected a number above 0, such as 0.05")
    if kind not in DIVERGE:
        raise MpqError("a limit of the KL divergence needs a model with logits: give bits or a size instead")


def within_limit(limit: float, accepted: float, measured: float) -> str:
    """One sentence: whether the limit holds, on acceptance data and on the report's data."""
    side = (
        "within the limit too"
        if measured <= limit
        else f"above it: ask for about {limit * accepted / measured:.2g} to keep it"
    )
    return (
        f"The smallest model found with a KL divergence of at most {limit:g} on acceptance data ({accepted:.4g}); on "
        f"unseen data it is {measured:.4g}, {side}."
    )


def smallest(frontier: Frontier, limit: float, measurer: Measurer, finish: Callable[[float], Acceptance]) -> Acceptance:
    """The finished choice of fewest bytes whose KL divergence from the original on acceptance data is within a limit.

    The frontier's points are measured after rounding alone. If finishing (`finish`, for a size in bytes of the layers)
    lowers the divergence further, the next attempt uses a larger limit.

    Raises:
        MpqError: the largest allocation diverges more.
    """
    known: dict[int, float] = {}

    def divergence(index: int) -> float:
        if index not in known:
            candidate = candidate_of(f"point {index}", frontier.allocation(index), measurer)
            known[index] = math.inf if candidate is None else candidate.harm()
        return known[index]

    best: Acceptance | None = None
    allowed = limit
    for _ in range(ATTEMPTS):
        index = _first_within(frontier, allowed, divergence)
        if index is None:
            if best is None and allowed <= limit:
                raise MpqError(
                    f"the largest allocation has a KL divergence of {divergence(len(frontier) - 1):.3g}, above the "
                    f"limit of {limit:g}: raise the limit, or add formats with more bits"
                )
            break
        accepted = finish(float(frontier.costs[index]))
        reached = accepted.chosen.harm()
        log.info("KL %.4g at %.3f bits, limit %g", reached, accepted.chosen.allocation.bits, limit)
        if reached <= limit and (best is None or accepted.chosen.allocation.size < best.chosen.allocation.size):
            best = accepted
        if SLACK * limit <= reached <= limit:
            break
        allowed *= limit / reached
    if best is None:
        raise MpqError(f"no finished model has a KL divergence within {limit:g}: raise the limit")
    return best


def _first_within(frontier: Frontier, limit: float, divergence: Callable[[int], float]) -> int | None:
    """The first point whose measured divergence is within the limit; None if the last point's is not.

    Regula falsi between a point outside and one inside; predicted losses determine where to measure next.
    """
    below, within = -1, len(frontier) - 1
    if divergence(within) > limit:
        return None
    ratio = 1.0  # measured to predicted
    for turn in range(MEASURES):
        if within - below <= 1 or (
            below >= 0 and frontier.costs[within] - frontier.costs[below] < CLOSE * frontier.costs[within]
        ):
            break
        guess = int((-frontier.losses).searchsorted(-limit / ratio)) if turn % 3 < 2 else (below + within) // 2
        guess = min(max(guess, below + 1), within - 1)
        measured = divergence(guess)
        if measured <= limit:
            within = guess
        else:
            below = guess
        if math.isfinite(measured) and measured > 0 and frontier.losses[guess] > 0:
            ratio = measured / float(frontier.losses[guess])
    return within
