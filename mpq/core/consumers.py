"""Programs that read a target's files, with the versions that were measured."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Consumer:
    """A program with which a target's rules were measured.

    Attributes:
        name: for display.
        packages: names on PyPI, any of which provides it.
        first: earliest measured version, a prefix ("0.32" includes 0.32.4).
        last: latest measured version, likewise.
        found: result of the measurement, in a few words.
        device: where it ran; "" where only its reader was called.
    """

    name: str
    packages: tuple[str, ...]
    first: str
    last: str
    found: str
    device: str = "CPU"

    @property
    def versions(self) -> str:
        """The range in words."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    def covers(self, number: str) -> bool:
        """Whether a version is in the range.

        >>> vllm = Consumer("vLLM", ("vllm",), "0.32", "0.33", "")
        >>> vllm.covers("0.33.1"), vllm.covers("0.34.0"), vllm.covers("0.9")
        (True, False, False)
        """
        lowest, highest = _numbers(self.first), _numbers(self.last)
        own = _numbers(number)
        return lowest <= own[: len(lowest)] and own[: len(highest)] <= highest

    def installed(self) -> str:
        """The version in this environment; "" where there is none."""
        for package in self.packages:
            try:
                return version(package)
            except PackageNotFoundError:
                continue
        return ""

    def objection(self) -> str:
        """A warning when the installed version was not measured; "" when it was or none is installed."""
        number = self.installed()
        if not number or self.covers(number):
            return ""
        return f"{self.name} {number} is installed, while its rules here were measured with {self.versions}"


def _numbers(text: str) -> tuple[int, ...]:
    """
    >>> _numbers("2026.4.1rc2+cpu")
    (2026, 4, 1)
    """
    parts = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
