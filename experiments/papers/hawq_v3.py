"""HAWQ-V3's integer programs for ResNet-18 and ResNet-50 as problems, from the authors' published inputs.

The inputs and configurations in hawq_v3_ilp.json are from HAWQ (Zhen-Dong/HAWQ), under the MIT licence.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mpq.core.layer import Layer
from mpq.core.problem import Problem

PUBLISHED = Path(__file__).with_name("hawq_v3_ilp.json")
BITS = (4, 8)
COSTS = ("size", "bops", "latency")


def read_published(path: Path) -> dict[str, Any]:
    """The authors' arrays and configurations, by network."""
    published = json.loads(path.read_text(encoding="utf-8"))
    return {net: published[net] for net in ("resnet18", "resnet50")}


def hawq_v3_problem(net: dict[str, Any], name: str) -> Problem:
    """The problem of the published configuration `name`, such as "size_0.25": a cost and its limit.

    The limit is a fraction of the way from all 4 bits (0) to all 8 bits (1). Schemes are in the order of BITS; tied
    layers are one group.
    """
    number = len(net["parameters"])
    groups = [tuple(pair) for pair in net["tied"]]
    groups += [(i,) for i in range(number) if not any(i in pair for pair in net["tied"])]
    groups.sort()
    trace = np.array(net["hutchinson_trace"])
    losses = trace[:, None] * np.array([net["delta_w_sq_4bit"], net["delta_w_sq_8bit"]]).T
    costs = {
        "size": np.array(net["parameters"])[:, None] * [0.5, 1.0],
        "bops": np.array(net["bops"])[:, None] * [1 / 64, 1 / 16],
        "latency": np.array([net["latency_int4"], net["latency_int8"]]).T,
    }
    summed = {key: np.array([cost[list(group)].sum(0) for group in groups]) for key, cost in costs.items()}
    by_group = np.array([losses[list(group)].sum(0) for group in groups])
    cost, fraction = name.split("_")
    low, high = summed[cost].sum(0)
    layers = tuple(Layer(f"layer{i}", "conv2d", 1, 1) for i in range(number))
    return Problem(
        layers, ("int4", "int8"), tuple(groups), by_group, np.zeros_like(by_group), summed,
        {cost: low + float(fraction) * (high - low)}, "hessian",
    )  # fmt: skip


def published_choices(problem: Problem, bits: list[int]) -> np.ndarray:
    """Scheme index per group of a published configuration, its bits in layer order."""
    return np.array([BITS.index(bits[group[0]]) for group in problem.groups])
