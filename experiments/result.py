"""The RESULT line of every script: a figure, its goal, and whether it was reached."""


def result(name: str, value: float, goal: str, reached: bool, note: str = "") -> str:
    """`RESULT name value goal ok|short`, and a note; name and goal have no spaces, for example ">=0.95"."""
    words = (name.replace(" ", "_"), f"{value:.4g}", goal.replace(" ", "_"), "ok" if reached else "short", note)
    return " ".join(("RESULT", *words)).rstrip()
