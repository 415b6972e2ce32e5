"""Benchmark of the report's first sentence on simulated tables whose truth is known.

    python benchmarks/report_intervals.py [--tables 200] [--prompts 769]

How often does the interval of the quality kept hold the truth, and how often does the cheaper threshold that the
sentence names truly lose more than 2 points of all-large's quality?
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import confidence, route
from depo_gateway.training.evaluation.headline import MAX_LOSS, Evidence, headline
from depo_gateway.training.evaluation.reported_routing import ReportedRouting
from depo_gateway.training.evaluation.threshold_sweep import differing_outcomes, sweep_outcomes

POOLS = ("small", "large")
ROUTING = ReportedRouting("gain", 0.85, "the benchmark", (1.0, 5.0))
LARGE, HARDEST = 0.95, 0.6  # the large pool's quality, and what the small one loses on the hardest prompt
POPULATION = 400_000  # prompts that stand for the truth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=769, help="of a table")
    args = parser.parse_args()
    everything = qualities(np.random.default_rng(123).uniform(size=POPULATION))
    holds, named, lost, saved = 0, 0, 0, []
    for seed in range(args.tables):
        chance = np.random.default_rng(1000 + seed)
        truth = qualities(chance.uniform(size=args.prompts))
        found = answer(truth, (chance.uniform(size=truth.shape) < truth).astype(float))
        kept, other = found["in_force"]["kept_quality"], found["alternative"]
        in_force = kept_quality(everything, ROUTING.threshold)
        holds += kept["low"] <= in_force <= kept["high"]
        if other is not None and other["direction"] == "cheaper":
            named += 1
            lost += in_force - kept_quality(everything, other["threshold"]) > MAX_LOSS
            saved.append(other["saved"])
    sys.stdout.write(
        f"{args.tables} tables of {args.prompts} prompts: the 95% interval of the quality kept holds the truth in"
        f" {holds / args.tables:.1%}; a cheaper threshold is named in {named / args.tables:.1%}, saves"
        f" {np.mean(saved) if saved else 0:.1%} in the mean, and truly loses more than {MAX_LOSS:.0%} in"
        f" {lost / args.tables:.1%}\n"
    )
    return 0


def qualities(hard: Array) -> Array:
    """True qualities (N, 2) of prompts that are `hard` (N,), from 0 to 1."""
    return np.stack([LARGE - HARDEST * hard, np.full(len(hard), LARGE)], 1)


def kept_quality(truth: Array, threshold: float) -> float:
    """The mean quality of routing at a threshold, relative to the large pool's."""
    pool = route(truth, ROUTING.rule, threshold)
    return float(truth[np.arange(len(pool)), pool].mean() / truth[:, -1].mean())


def answer(predicted: Array, observed: Array) -> dict[str, object]:
    """The report's headline on one table."""
    levels = np.round(np.quantile(confidence(predicted, ROUTING.rule)[:, 0], np.linspace(0, 1, 25)), 3)
    thresholds = np.unique(np.concatenate([[ROUTING.threshold], levels]))
    units, length = np.arange(len(observed)), np.ones(len(observed))
    sweep = sweep_outcomes(observed, predicted, length, ROUTING.rule, thresholds, units, ROUTING.costs)
    differing = differing_outcomes(observed, predicted, ROUTING.rule, ROUTING.threshold)
    return headline(Evidence(sweep, len(observed), differing=differing), ROUTING, predicted, length, POOLS)


if __name__ == "__main__":
    sys.exit(main())
