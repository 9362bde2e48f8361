"""Predicted loss of each layer in each format: one metric, one file; `mpq.sensitivity.profile.profile` makes the
table. Plugins add metrics through the entry-point group "mpq.metrics".
"""

from typing import TYPE_CHECKING

from mpq.core.errors import MpqError, nearest_names
from mpq.core.registry import Metric, Registry

if TYPE_CHECKING:
    from mpq.sensitivity.task import Metric as Function

DEFAULT_METRIC = "kl-curvature"
GRANULARITIES = ("layer", "row")  # unit that has one format

# Functions take a Task and options, and give scores and standard errors.
METRICS: Registry[Metric] = Registry(
    Metric,
    "metric",
    "mpq.metrics",
    [
        Metric(
            "hessian",
            "mpq.sensitivity.hessian:hessian",
            "mean Hessian trace x squared error (HAWQ-V2)",
            activations=True,
            second_order=True,
        ),
        Metric(
            "eigenvalue",
            "mpq.sensitivity.eigenvalue:eigenvalue",
            "top Hessian eigenvalue / weights x squared error (HAWQ)",
            second_order=True,
        ),
        Metric("fisher", "mpq.sensitivity.fisher:fisher", "diagonal Fisher information x squared weight errors"),
        Metric(
            "output",
            "mpq.sensitivity.output:output",
            "squared output error weighted by output gradients",
            activations=True,
        ),
        Metric(
            "gptq",
            "mpq.sensitivity.output:gptq",
            "squared output error, tr(dW X X^T dW^T), GPTQ's objective",
            activations=True,
        ),
        Metric(
            "kronecker", "mpq.sensitivity.kronecker:kronecker", "Kronecker-factored curvature (K-FAC)", activations=True
        ),
        Metric(
            "kl-curvature",
            "mpq.sensitivity.kl_curvature:kl_curvature",
            "curvature of the KL divergence, coherent over what shares a label",
            activations=True,
            rows="mpq.sensitivity.kl_curvature:kl_curvature_by_rows",
        ),
        Metric(
            "gradient",
            "mpq.sensitivity.gradient:gradient",
            "squared gradient x output change (ModelOpt)",
            activations=True,
        ),
        Metric(
            "quadratic",
            "mpq.sensitivity.gradient:quadratic",
            "Gauss-Newton's whole quadratic form of each error",
            activations=True,
        ),
        Metric(
            "curvature",
            "mpq.sensitivity.curvature:curvature",
            "Hessian trace distributed as the layer's inputs are",
            second_order=True,
        ),
        Metric(
            "linearity",
            "mpq.sensitivity.linearity:linearity",
            "slope of the loss under noise x relative error (HIGGS)",
            compares_losses=True,
        ),
        Metric(
            "loss",
            "mpq.sensitivity.loss:loss",
            "measured loss change, one layer at a time: exact and slow",
            activations=True,
            measured=True,
            compares_losses=True,
        ),
        Metric(
            "divergence",
            "mpq.sensitivity.predicted:divergence",
            "measured KL divergence from the unquantized model",
            activations=True,
            measured=True,
            compares_losses=True,
        ),
        Metric(
            "wrong",
            "mpq.sensitivity.predicted:wrong",
            "measured change of the share of wrong predictions",
            activations=True,
            measured=True,
            compares_losses=True,
        ),
        Metric(
            "proxy",
            "mpq.proxies.metric:proxy_metric",
            "a formula over layer statistics, or a known proxy's name",
            family=True,
        ),
    ],
)


def metric_named(name: str) -> "Function":
    """The metric of this name, built in or a plugin's; MpqError with the known names otherwise."""
    return METRICS.named(name).load()


def check_granularity(granularity: str, metric: str) -> None:
    """MpqError for an unknown granularity, or one that the metric does not score."""
    if granularity not in GRANULARITIES:
        raise MpqError(f"unknown granularity {granularity!r}: {nearest_names(granularity, GRANULARITIES)}")
    if granularity == "row" and not METRICS.named(metric).rows:
        known = " or ".join(name for name in METRICS if METRICS[name].rows)
        raise MpqError(f"the metric {metric} does not score rows: take {known}, or the granularity 'layer'")
