"""How much a loss rises when a layer takes a format: one metric, one file; `mpq.sensitivity.profile.profile` makes the
table. Plugins add metrics through the entry-point group "mpq.metrics".
"""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mpq.core.errors import MpqError, nearest_names

if TYPE_CHECKING:
    from mpq.sensitivity.task import Metric

MEASURED = ("loss", "divergence", "wrong")  # a forward pass over the data for each layer and scheme
SECOND_DERIVATIVES = ("hessian", "eigenvalue", "curvature")
DEFAULT_METRIC = "kronecker"

# name: (module:function, what it is); functions take a Task and options, and give scores and standard errors.
METRICS: dict[str, tuple[str, str]] = {
    "hessian": ("mpq.sensitivity.hessian:hessian", "mean Hessian trace x squared error (HAWQ-V2)"),
    "eigenvalue": ("mpq.sensitivity.eigenvalue:eigenvalue", "top Hessian eigenvalue / weights x squared error (HAWQ)"),
    "fisher": ("mpq.sensitivity.fisher:fisher", "diagonal Fisher information x squared weight errors"),
    "output": ("mpq.sensitivity.output:output", "squared output error weighted by output gradients"),
    "gptq": ("mpq.sensitivity.output:gptq", "squared output error, tr(dW X X^T dW^T), GPTQ's objective"),
    "kronecker": ("mpq.sensitivity.kronecker:kronecker", "Kronecker-factored curvature (K-FAC)"),
    "kl-curvature": (
        "mpq.sensitivity.kl_curvature:kl_curvature",
        "curvature of the KL divergence, coherent over what shares a label",
    ),
    "gradient": ("mpq.sensitivity.gradient:gradient", "squared gradient x output change (ModelOpt)"),
    "quadratic": ("mpq.sensitivity.gradient:quadratic", "Gauss-Newton's whole quadratic form of each error"),
    "curvature": ("mpq.sensitivity.curvature:curvature", "Hessian trace spread as the layer's inputs are"),
    "linearity": ("mpq.sensitivity.linearity:linearity", "slope of the loss under noise x relative error (HIGGS)"),
    "loss": ("mpq.sensitivity.loss:loss", "measured loss change, one layer at a time: exact and slow"),
    "divergence": ("mpq.sensitivity.predicted:divergence", "measured KL divergence from the unquantized model"),
    "wrong": ("mpq.sensitivity.predicted:wrong", "measured change of the share of wrong predictions"),
}

# prefix: (module:function, what it is); "prefix:TEXT" is the metric that the function makes of TEXT.
FAMILIES: dict[str, tuple[str, str]] = {
    "proxy": ("mpq.proxies.metric:proxy_metric", "proxy:FORMULA, or proxy:NAME of a known proxy"),
}


def metric_named(name: str) -> "Metric":
    """The metric called `name`, ours or a plugin's; MpqError with the known names when there is none."""
    plugins = {entry.name: entry for entry in entry_points(group="mpq.metrics")}
    if name in METRICS:
        module, _, function = METRICS[name][0].partition(":")
        metric: Metric = getattr(import_module(module), function)
        return metric
    family, colon, text = name.partition(":")
    if colon and family in FAMILIES:
        module, _, function = FAMILIES[family][0].partition(":")
        made: Metric = getattr(import_module(module), function)(text)
        return made
    if name in plugins:
        plugin: Metric = plugins[name].load()
        return plugin
    raise MpqError(f"unknown metric {name!r}: {nearest_names(name, [*METRICS, *plugins])}")
