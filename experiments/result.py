"""The line that says whether a figure reached its goal, the same from every script."""


def result(name: str, value: float, goal: str, reached: bool, note: str = "") -> str:
    """`RESULT name value goal ok|short`, and a note; name and goal have no spaces, `goal` is such as ">=0.95"."""
    words = (name.replace(" ", "_"), f"{value:.4g}", goal.replace(" ", "_"), "ok" if reached else "short", note)
    return " ".join(("RESULT", *words)).rstrip()
