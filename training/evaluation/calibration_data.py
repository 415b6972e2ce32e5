"""What a calibration stands on: prompts and their labels, from outcome tables or from logged traffic.

Shapes: N prompts, K pools cheapest first, U units.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import Calibration, Curve, route
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic, off_policy
from depo_gateway.training.evaluation.logged_traffic import Logged
from depo_gateway.training.evaluation.off_policy import Integers, Logs
from depo_gateway.training.evaluation.predictions import as_served, pools_of
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.outcomes.table import examples_of, labels, read_tables

FITTING = 1 / 3  # of the units set probabilities where the others test a guarantee: a Platt has two parameters
AT_ONCE = 32  # policies: memory of N x AT_ONCE x 11 numbers for two pools


@dataclass(frozen=True, slots=True)
class Evidence:
    """N prompts. Those of one unit, a conversation, are not independent of one another."""

    examples: Sequence[Example]
    texts: Sequence[tuple[str, str]]  # as estimator.text.extract_text() gives them
    observed: Array  # (N, K) quality, NaN where there is no label
    token: Array  # (N, K) token confidence
    weights: Array  # (N,) for probabilities; 0: its labels tell nothing of prompts like it
    tokens: Array  # (N,) of prompt and answer; 1 each where nobody counted
    unit: Integers  # (N,) 0 to U - 1
    traffic: Logged | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """What sets probabilities and the grid, and what tests a guarantee; no unit is in both."""

    fitting: NDArray[np.bool_]  # (N,)
    testing: NDArray[np.bool_]  # (N,) with every pool's label, one a unit


def gather(args: argparse.Namespace, runtime: Runtime) -> Evidence:
    """The rows of --outcomes, or the labelled traffic of --records."""
    pools = pools_of(args.pools, runtime.manifest)
    if args.records is not None:
        traffic = logged_traffic.read(args.records, args.since, args.newest, runtime.pools, runtime.manifest.text)
        return of_traffic(traffic)
    examples = examples_of(read_tables(args.outcomes), pools)
    observed, token = labels(examples, runtime.pools)
    texts = [as_served(runtime.manifest.text, example.prompt, example.context) for example in examples]
    count = len(examples)
    return Evidence(examples, texts, observed, token, np.ones(count), np.ones(count), np.arange(count))


def of_traffic(traffic: Logged) -> Evidence:
    """Every record counts in shares. Labels of every pool weigh 1, others one over their probability of being seen."""
    weights = np.where(np.isnan(traffic.observed).any(1), 0.0, 1.0)
    logs = traffic.logs(np.zeros_like(traffic.observed))
    keep, _ = off_policy.usable(logs)
    weights[np.flatnonzero(traffic.free)[keep]] = off_policy.weights(off_policy.subset(logs, keep))
    examples = traffic.examples()
    return Evidence(
        examples, traffic.texts, traffic.observed, traffic.token, weights, traffic.tokens, traffic.conversation, traffic
    )


def held_back(evidence: Evidence, fitted: NDArray[np.bool_], seed: int = 0) -> Split:
    """A split at random by unit. Prompts that the checkpoint was fitted on, `fitted` (N,), test nothing.

    Raises ValueError where no other prompt has every pool's label.
    """
    complete = np.asarray(~np.isnan(evidence.observed).any(1))
    if evidence.observed.shape[1] < 2:
        raise ValueError("a loss target needs a checkpoint of two pools or more; this one has one")
    units = int(evidence.unit.max()) + 1
    order = np.random.default_rng(seed).permutation(units)
    fitting = np.isin(evidence.unit, order[: round(units * FITTING)])
    candidates = np.flatnonzero(complete & ~fitting & ~fitted)
    _, first = np.unique(evidence.unit[candidates], return_index=True)
    testing = np.zeros(len(complete), np.bool_)
    testing[candidates[first]] = True
    if not testing.any() or not fitting.any():
        raise ValueError(
            "a loss target needs prompts with labels of every pool, which the checkpoint was not fitted on: an outcome"
            " table, or shadowed records"
        )
    return Split(fitting, testing)


def with_logs(calibrated: Calibration, evidence: Evidence, quality_NK: Array) -> Calibration:
    """Curves whose quality partial labels tell too, where logs support every threshold; else as they were."""
    if evidence.traffic is None:
        return calibrated
    logs = evidence.traffic.logs(quality_NK)
    keep, _ = off_policy.usable(logs)
    logs = off_policy.subset(logs, keep)
    if not len(logs.pool):
        return calibrated
    curves = {rule: _estimated(curve, rule, logs) for rule, curve in calibrated.curves.items()}
    return dataclasses.replace(calibrated, curves=curves)


def _estimated(curve: Curve, rule: str, logs: Logs) -> Curve:
    last = np.full(len(logs.pool), logs.observed.shape[1] - 1)
    routes = [*(route(logs.predicted, rule, threshold) for threshold in curve.thresholds), last]
    values = np.concatenate(
        [
            off_policy.estimate(logs, np.stack(routes[start : start + AT_ONCE], 1), resamples=1).doubly_robust.point
            for start in range(0, len(routes), AT_ONCE)
        ]
    )
    if np.isnan(values).any():
        return curve
    *quality, all_large = values.clip(0.0, 1.0).tolist()
    return dataclasses.replace(curve, quality=tuple(quality), all_large=all_large)
