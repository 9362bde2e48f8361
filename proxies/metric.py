"""A proxy as a sensitivity metric: "proxy:FORMULA", or "proxy:NAME" of a proxy in the registry."""

import numpy as np

from mpq.core.errors import MpqError
from mpq.proxies import PROXIES
from mpq.proxies.collect import collect
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.formulas import parse
from mpq.proxies.programs import Program, formula, inputs_of
from mpq.sensitivity.task import Metric, Scores, Task

SAMPLES = 2**16  # elements of a layer: more than evolution takes, so that sums are close or exact


def proxy_named(text: str) -> Program:
    """The proxy of this name, or the one that the formula spells."""
    return parse(PROXIES[text.strip()][0] if text.strip() in PROXIES else text)


def proxy_metric(text: str) -> Metric:
    """The metric of a formula or a known proxy; its scores are on the proxy's scale.

    Raises:
        MpqError: the text is neither; when called: a score that is not finite (naming the layer).
    """
    program = proxy_named(text)

    def metric(task: Task, *, samples: int = SAMPLES) -> Scores:
        """Scores of the proxy; standard errors are not known and given as 0.

        Args:
            task: model, data, layers and schemes.
            samples: maximum elements of a layer's matrix to compute from.
        """
        for scheme in task.schemes:
            if scheme.activation is not None:
                raise MpqError(f"proxies score weight formats only, not {scheme.name}: take the metric 'loss' for it")
        known = task.journal.recall(formula(program))
        shape = (len(task.layers), len(task.schemes))
        if known is None:
            statistics = collect(task, sorted(inputs_of(program)), samples, {})
            known = Evaluator(statistics).finite_table(program).flatten().tolist()
            task.journal.note(formula(program), known)
        return np.array(known, dtype=np.float64).reshape(shape), np.zeros(shape)

    return metric
