"""Data of a calibration: prompts and their labels, from outcome tables or from logged traffic.

Shapes: N prompts, K pools cheapest first, U units.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, Curve, route
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic, off_policy
from depo_gateway.training.evaluation.contamination import fitted_share, unseen_prompts, warn_of_contamination
from depo_gateway.training.evaluation.group_option import chosen_groups
from depo_gateway.training.evaluation.logged_traffic import LoggedTraffic
from depo_gateway.training.evaluation.off_policy import Integers, Logs
from depo_gateway.training.evaluation.predictions import resolve_pools, served_text
from depo_gateway.training.outcomes.table import check_cut_off, examples_of, read_tables

FITTING_SHARE = 1 / 3  # of the units, where the others test a guarantee: a Platt fit has only two parameters
POLICIES_AT_ONCE = 32  # memory of N x POLICIES_AT_ONCE x 11 numbers for two pools


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """N prompts with their labels. Those of one unit, a conversation, are not independent of one another."""

    examples: Sequence[Example]  # `task`: the group by which the checkpoint scores
    texts: Sequence[tuple[str, str]]  # as estimator.text.extract_text() gives them
    labels: Mapping[str, Array]  # by head, (N, K), NaN where there is none
    weights: Array  # (N,) for fitting probabilities; 0: the label's probability of being observed is unknown
    tokens: Array  # (N,) of prompt and answer; 1 each where there is no count
    unit: Integers  # (N,) 0 to U - 1
    traffic: LoggedTraffic | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """(N,) by which the checkpoint scores."""
        return tuple(example.task for example in self.examples)

    @property
    def observed(self) -> Array:
        """Labels of quality (N, K)."""
        return self.labels["quality"]


@dataclass(frozen=True, slots=True)
class GuaranteeSplit:
    """The prompts that fit probabilities and the grid, and those that test a guarantee; no unit is in both."""

    fitting: NDArray[np.bool_]  # (N,)
    testing: NDArray[np.bool_]  # (N,) with every pool's label, one a unit


def read_calibration_data(args: argparse.Namespace, runtime: Runtime) -> CalibrationData:
    """The rows of --outcomes, or the labelled traffic of --records.

    Prompts that the checkpoint was fitted on are left out, unless --include-fitted: its predictions for those are too
    confident. Raises ValueError where none is left.
    """
    pools = resolve_pools(args.pools, runtime.manifest)
    if args.records is not None:
        traffic = logged_traffic.read_traffic(
            args.records, args.since, args.newest, runtime.pools, runtime.manifest.text
        )
        return traffic_calibration_data(traffic.select(_unfitted(args, traffic.examples(), runtime)))
    rows = read_tables(args.outcomes)
    check_cut_off(rows, pools, "calibrate", args.allow_cut_off)
    read = examples_of(rows, pools)
    groups = chosen_groups([example.task for example in read], args.groups, runtime.manifest, "calibrate")
    read = [dataclasses.replace(example, task=group) for example, group in zip(read, groups, strict=True)]
    examples = [example for example, kept in zip(read, _unfitted(args, read, runtime), strict=True) if kept]
    labels = labels_by_head(examples, runtime.pools, runtime.manifest.heads)
    texts = [served_text(runtime.manifest.text, example.prompt, example.context) for example in examples]
    count = len(examples)
    return CalibrationData(examples, texts, labels, np.ones(count), np.ones(count), np.arange(count))


def _unfitted(args: argparse.Namespace, examples: Sequence[Example], runtime: Runtime) -> NDArray[np.bool_]:
    """Which examples (N,) to calibrate on; says on stderr how many are left out, or what including them does."""
    if args.include_fitted:
        warn_of_contamination("calibrate", fitted_share(examples, runtime.manifest))
        return np.ones(len(examples), np.bool_)
    unseen = unseen_prompts(examples, runtime.manifest)
    if left_out := sum(unseen.left_out().values()):
        sys.stderr.write(
            f"depo-train calibrate: {left_out} of {len(examples)} prompts are left out, because the checkpoint was"
            " fitted on them or may have been; --include-fitted includes them\n"
        )
    return unseen.kept


def traffic_calibration_data(traffic: LoggedTraffic) -> CalibrationData:
    """Labelled traffic as calibration data, weighted by off_policy.propensity_weights.

    Every record counts in shares; one whose propensity is not meaningful has weight 0 unless it has all labels.
    """
    weights = np.where(np.isnan(traffic.observed).any(1), 0.0, 1.0)
    logs = traffic.logs(np.zeros_like(traffic.observed))
    usable, _ = off_policy.usable_records(logs)
    selected = off_policy.select_records(logs, usable)
    weights[np.flatnonzero(traffic.free)[usable]] = off_policy.propensity_weights(selected)
    examples = traffic.examples()
    labels = {"quality": traffic.observed, "token_confidence": traffic.token}
    return CalibrationData(examples, traffic.texts, labels, weights, traffic.tokens, traffic.conversation, traffic)


def split_for_guarantee(data: CalibrationData, fitted: NDArray[np.bool_], seed: int = 0) -> GuaranteeSplit:
    """A random split by unit. Prompts that the checkpoint was fitted on, `fitted` (N,), are not used for testing.

    Raises ValueError where no other prompt has every pool's label.
    """
    complete = np.asarray(~np.isnan(data.observed).any(1))
    if data.observed.shape[1] < 2:
        raise ValueError("a loss target needs a checkpoint of two pools or more; this one has one")
    units = int(data.unit.max()) + 1
    order = np.random.default_rng(seed).permutation(units)
    fitting = np.isin(data.unit, order[: round(units * FITTING_SHARE)])
    candidates = np.flatnonzero(complete & ~fitting & ~fitted)
    _, first = np.unique(data.unit[candidates], return_index=True)
    testing = np.zeros(len(complete), np.bool_)
    testing[candidates[first]] = True
    if not testing.any() or not fitting.any():
        raise ValueError(
            "a loss target needs prompts with labels of every pool, which the checkpoint was not fitted on: an outcome"
            " table, or shadowed records"
        )
    return GuaranteeSplit(fitting, testing)


def with_off_policy_curves(
    calibrated: Calibration, data: CalibrationData, quality_NK: Array, deciding: Array
) -> Calibration:
    """The calibration with off-policy estimates as its curves' quality, where logs support every threshold.

    Args:
        quality_NK: predicted, which the estimates correct. deciding: (N, K) what routing goes by.
    """
    if data.traffic is None:
        return calibrated
    logs = data.traffic.logs(quality_NK)
    usable, _ = off_policy.usable_records(logs)
    logs, deciding = off_policy.select_records(logs, usable), deciding[data.traffic.free][usable]
    if not len(logs.pool):
        return calibrated
    curves = {rule: _estimated(curve, rule, logs, deciding) for rule, curve in calibrated.curves.items()}
    return dataclasses.replace(calibrated, curves=curves)


def _estimated(curve: Curve, rule: str, logs: Logs, deciding: Array) -> Curve:
    last = np.full(len(logs.pool), logs.observed.shape[1] - 1)
    routes = [*(route(deciding, rule, threshold) for threshold in curve.thresholds), last]
    chunks = [
        np.stack(routes[start : start + POLICIES_AT_ONCE], 1) for start in range(0, len(routes), POLICIES_AT_ONCE)
    ]
    values = np.concatenate([off_policy.estimate(logs, chunk, resamples=1).doubly_robust.point for chunk in chunks])
    if np.isnan(values).any():
        return curve
    *quality, all_large = values.clip(0.0, 1.0).tolist()
    return dataclasses.replace(curve, quality=tuple(quality), all_large=all_large)
