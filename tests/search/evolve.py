"""A worker of a shared study, as a process: python evolve.py STORAGE TRIALS LOG SECONDS [COUNT FILE].

All evaluations but the first COUNT wait until FILE exists.
"""

import os
import sys
import time
from dataclasses import replace

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from problems import make_problem

from mpq.search.evolution import evolution


def problem_within(share=0.4, seed=1, layers=8):
    problem = make_problem(seed, layers)
    cost = np.where(np.isfinite(problem.losses), problem.costs["size"], np.nan)
    low, high = np.nanmin(cost, 1).sum(), np.nanmax(cost, 1).sum()
    return replace(problem, budgets={"size": float(low + share * (high - low))})


def true_loss(allocation, share=1.0):
    """The predicted loss plus a term that depends on every layer's scheme, and noise on a part of the data."""
    text = " ".join(allocation.schemes)
    bend = 1 + 0.8 * np.sin(sum(ord(letter) * (i % 7 + 1) for i, letter in enumerate(text)))
    noise = 1 + (1 - share) * 0.1 * np.cos(len(text) + sum(map(ord, text)))
    return float(allocation.loss * bend * noise)


def main():
    storage, trials, log, seconds, *gate = sys.argv[1:]
    count = 0

    def evaluate(allocation, share):
        nonlocal count
        with open(log, "a") as stream:
            stream.write(f"{os.getpid()} {' '.join(allocation.schemes)}\n")
        count += 1
        while gate and count > int(gate[0]) and not os.path.exists(gate[1]):
            time.sleep(0.02)
        time.sleep(float(seconds))
        return true_loss(allocation, share)

    evolution(problem_within(), evaluate=evaluate, trials=int(trials), storage=storage, heartbeat=0.5)


if __name__ == "__main__":
    main()
