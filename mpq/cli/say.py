"""What commands print of their results."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.frontier import Frontier


def summary(frontier: "Frontier", allocation: "Allocation") -> str:
    """One sentence on the chosen allocation."""
    proof = "proven optimal" if frontier.gap == 0 else f"within {100 * frontier.gap:.2g} % of the optimum"
    if "measured_loss" in allocation.provenance:
        proof = f"measured loss increase {allocation.provenance['measured_loss']:.4g}"
    return (
        f"{allocation.bits:.4f} bits per weight, {allocation.total:,} bytes in all, predicted loss increase "
        f"{allocation.loss:.4g} +- {allocation.error:.1g} ({allocation.metric}), {proof}"
    )
