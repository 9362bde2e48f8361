"""A dynamic loss scale: halved when gradients leave their format's range, doubled while they do not."""

from dataclasses import dataclass

from torch import Tensor

START, LARGEST = 2.0**16, 2.0**24
GROW_AFTER = 200  # products whose gradients stay within the format
KEPT = 0.5  # share of the largest magnitude that rounding must keep; clipping by rounded scales keeps 0.75 and more


@dataclass
class DynamicScale:
    """The loss scale of one layer's gradients; it starts high and backs off in a few products."""

    value: float = START
    within: int = 0  # products since the last change

    def update(self, exact: Tensor, rounded: Tensor) -> None:
        """Update from scaled gradients before and after rounding: values that are not finite count as clipped."""
        if not bool(rounded.abs().amax() >= KEPT * exact.abs().amax()):
            self.value, self.within = self.value / 2, 0
            return
        self.within += 1
        if self.within == GROW_AFTER:
            self.value, self.within = min(self.value * 2, LARGEST), 0
