"""A custom metric: a function from a task to scores and standard errors, registered by an entry point.

In a package, `[project.entry-points."mpq.metrics"] relative = "my_package:METRIC"` makes `--metric relative` work.
Here the registry is given the entry directly.
"""

import numpy as np

import mpq
from mpq.core.registry import Metric
from mpq.network.layers import weight_matrix
from mpq.sensitivity import METRICS
from mpq.sensitivity.task import Scores, Task, score_weight_errors


def relative(task: Task) -> Scores:
    """Squared weight error over squared weights, for each layer and scheme; no data is read."""

    def score(layer, difference):
        weight = weight_matrix(task.module(layer)).detach().float()
        return float(difference.square().sum() / weight.square().sum()), 0.0

    return score_weight_errors(task, score)


METRIC = Metric("relative", relative, "relative squared weight error")
METRICS.entries["relative"] = METRIC

source = mpq.open_source("tiny-cnn", nsamples=8)
formats = ["int2-g32", "int4-g32", "int8-channel"]
table = mpq.profile(source.model, source.calibration, source.loss_fn, formats, metric="relative")
assert np.isfinite(table.scores).all()
print(mpq.allocate(table, bits=4.5).allocation)
