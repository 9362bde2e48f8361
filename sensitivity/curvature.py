"""Hessian trace distributed over a layer's weights by its inputs' second moment: HAWQ's scale with GPTQ's form."""

from torch import Tensor

from mpq.core.layer import Layer
from mpq.sensitivity.hessian import floored, hessian_traces
from mpq.sensitivity.output import output_statistics
from mpq.sensitivity.task import Scores, Task, score_weight_errors


def curvature(
    task: Task, *, min_probes: int = 2, max_probes: int = 16, target: float = 0.2, settle: float = 0.7
) -> Scores:
    """Predicted loss increase 1/2 * Tr(H_i) * tr(dW A dW^T) / (rows * tr(A)), A = E[x x^T], of every layer and scheme.

    The Hessian block is modelled as a multiple of I (x) A, the shape of GPTQ's objective (arXiv 2210.17323,
    equation 1), with the trace that Hutchinson's probes measure (HAWQ-V2, arXiv 1911.03852). Against the mean trace
    times ||dW||^2, errors along directions that the inputs rarely take cost less, and those along their mean more;
    against the output error, layers are put on one scale, the loss. An embedding's A counts how often each token is
    looked up.

    Args:
        task: model, data, layers and schemes.
        min_probes, max_probes, target, settle: of the trace's stopping rule, see `hessian`.
    """
    traces = hessian_traces(task, min_probes=min_probes, max_probes=max_probes, target=target, settle=settle)
    means = floored(traces)
    statistics = output_statistics(task, weighted=False)
    index = {layer.name: i for i, layer in enumerate(task.layers)}

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        i, shape = index[layer.name], statistics[layer.name]
        share = shape.error(difference.cpu()) / shape.trace() if shape.trace() > 0 else 0.0
        return 0.5 * float(means[i]) * share, 0.5 * float(traces.errors[i]) * share

    return score_weight_errors(task, score)
