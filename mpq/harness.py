"""Tasks of lm-evaluation-harness on folders of quantized models: `mpq eval OUT --tasks`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpq.core.errors import MpqError
from mpq.core.reading import reading
from mpq.exporters.opening import open_any
from mpq.sources import names_in, open_network
from mpq.sources.extras import need
from mpq.sources.networks import tokenizer_in


@dataclass(frozen=True)
class TaskResult:
    """One metric of a task."""

    task: str
    metric: str  # with its filter, as "exact_match,strict-match"; without one where there is none
    value: float
    error: float | None  # standard error, where the harness gives one
    fewshot: int

    def __str__(self) -> str:
        error = "" if self.error is None else f" +- {self.error:.4f}"
        return f"{self.task} ({self.fewshot}-shot): {self.metric} {self.value:.4f}{error}"


def evaluate_tasks(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> tuple[TaskResult, ...]:
    """Run tasks of lm-evaluation-harness on the model of a folder.

    Args:
        folder: what `mpq.load` reads, of a language model of transformers.
        tasks: names known to the harness, and .yaml files of custom tasks.
        fewshot: examples before each question; left out, the task's own number.
        limit: questions of each task; left out, all.
        batch_size: requests at a time; left out, 8.
        seed: of the draw of examples.
        device: where to.
        trust: as in `mpq.load`.

    Raises:
        MpqError: the harness is not installed, an unknown task, a folder without tokenizer or of another kind of model.
    """
    harness = need("lm_eval", "tasks", "tasks of lm-evaluation-harness")
    names, folders = _named(tasks)
    manager = need("lm_eval.tasks", "tasks", "tasks").TaskManager(
        include_path=folders or None, include_defaults=len(folders) == 0 or len(names) > len(_files(tasks))
    )
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise MpqError(f"lm-evaluation-harness has no task {name!r}: see its list, or name a .yaml file")
    model, tokenizer = _language_model(folder, trust)
    wrapped = need("lm_eval.models.huggingface", "tasks", "tasks").HFLM(
        pretrained=model.to(device), tokenizer=tokenizer, batch_size=batch_size or 8, device=device
    )
    try:
        answers = harness.simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, num_fewshot=fewshot, limit=limit, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, bootstrap_iters=1000,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, ConnectionError) as error:
        raise MpqError(f"lm-evaluation-harness cannot run {', '.join(names)}: {error}") from error
    return _results(answers)


def _files(tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if task.endswith((".yaml", ".yml"))]


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tasks' names, and the folders of custom tasks."""
    names, folders = [], []
    for task in tasks:
        if task not in _files(tasks):
            names.append(task)
            continue
        with reading(task, "task of lm-evaluation-harness", "name its file"):
            described = yaml.load(Path(task).read_text(encoding="utf-8"), yaml.BaseLoader)
        name = described.get("task") if isinstance(described, Mapping) else None
        if not isinstance(name, str):
            raise MpqError(f"{task} does not name its task: expected a line such as 'task: mine'")
        names.append(name)
        folders.append(str(Path(task).resolve().parent))
    return names, folders


def _language_model(folder: str | os.PathLike[str], trust: bool) -> tuple[Any, Any]:
    opened = open_any(folder, trust=trust)
    tokenizer = opened.network.tokenizer if opened.network is not None else tokenizer_in(Path(folder))
    if tokenizer is None:
        name, _, untrusted = names_in(opened.allocation.provenance, trust)
        tokenizer = open_network(name, untrusted).tokenizer if name is not None else None
    if not (hasattr(opened.model, "generate") and callable(tokenizer)):
        raise MpqError(
            f"{folder} is not a language model of transformers with its tokenizer, which lm-evaluation-harness needs"
        )
    return opened.model, tokenizer


def _results(answers: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    results = []
    for task, values in answers["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, str | bool) or not isinstance(value, int | float):
                continue
            if metric in ("sample_len", "sample_count"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered in ("", "none") else key
            shots = int(answers.get("n-shot", {}).get(task, 0))
            results.append(TaskResult(task, name, float(value), error if isinstance(error, float) else None, shots))
    return tuple(results)
