"""Bundled conversations for instruction-tuned models (prose, dialogue, code), formatted by their chat template."""

import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from typing import Any

from mpq.core.errors import MpqError

Turn = dict[str, str]
PROSE = 600  # least characters of a passage of prose
SPOKEN = re.compile(r'"([^"]{12,300})"')
CODE = {  # modules of this package whose functions are used as questions
    "calibration": ("sizes", "patterns", "mix", "costs", "frontier", "problem", "latency", "reading"),
    "evaluation": ("allocation", "files", "layer", "registry", "hardware", "table"),
}
FUNCTION = re.compile(r'^def (\w+)\(.*?\).*?:\n    """(.+?)"?"?"?\n.*?(?=^\S|\Z)', re.M | re.S)


def conversations(use: str) -> list[list[Turn]]:
    """Conversations of two turns for "calibration" or "evaluation", of the three kinds in turn."""
    kinds = [list(kind(use)) for kind in (_prose, _dialogue, _code)]
    count = max(map(len, kinds))
    return [kind[index % len(kind)] for index in range(count) for kind in kinds if index < 4 * len(kind)]


def chat_text(tokenizer: Any, use: str) -> str:
    """All conversations, formatted by the model's chat template.

    Raises:
        MpqError: a template that fails on a question and an answer.
    """
    try:
        return "".join(tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations(use))
    except Exception as error:  # templates are programs and may raise anything
        raise MpqError(f"the model's chat template fails ({error}): name other data, as --dataset novels") from error


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) and hasattr(tokenizer, "apply_chat_template")


def _paragraphs(use: str) -> list[str]:
    return (files(__package__) / f"tiny_lm_{use}.txt").read_text("utf-8").splitlines()


def _prose(use: str) -> Iterator[list[Turn]]:
    passages, passage = [], ""
    for paragraph in _paragraphs(use):
        passage = f"{passage}\n{paragraph}".strip()
        if len(passage) >= PROSE:
            passages.append(passage)
            passage = ""
    for first, second in zip(passages[::2], passages[1::2], strict=False):
        yield _turns(f"Continue this passage.\n\n{first}", second)


def _dialogue(use: str) -> Iterator[list[Turn]]:
    spoken = [" ".join(SPOKEN.findall(paragraph)) for paragraph in _paragraphs(use)]
    for said, answer in pairwise(spoken):
        if said and answer:
            yield _turns(said, answer)


def _code(use: str) -> Iterator[list[Turn]]:
    for module in CODE[use]:
        source = (files("mpq.core") / f"{module}.py").read_text("utf-8")
        for match in FUNCTION.finditer(source):
            question = f"Write a Python function `{match[1]}`: {match[2].strip()}"
            yield _turns(question, f"```python\n{match[0].strip()}\n```")


def _turns(question: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
