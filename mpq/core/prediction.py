"""Name of the sum of a table's scores: a predicted loss, unless the metric has a scale of its own."""

PROXY = "proxy:"


def predicts_loss(metric: str) -> bool:
    """Whether a metric's scores are losses; a proxy's only rank allocations.

    >>> predicts_loss("hessian"), predicts_loss("proxy:size")
    (True, False)
    """
    return not metric.startswith(PROXY)


def prediction_name(metric: str) -> str:
    """Name of what the metric gives: "predicted loss increase", or "score" for a proxy's own scale."""
    return "predicted loss increase" if predicts_loss(metric) else "score"
