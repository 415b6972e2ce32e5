"""`depo-train calibrate`: fits probabilities, and thresholds for targets, as a new version of a checkpoint.

Prompts that the checkpoint was fitted on are left out: its predictions for those are too confident. Outputs for which
the others have too few labels keep their calibration. Prompts that are unfamiliar to the checkpoint count in curves, as
routed at random, and not in probabilities.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, calibrate_quality
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic
from depo_gateway.training.evaluation.calibration_data import (
    CalibrationData,
    GuaranteeSplit,
    read_calibration_data,
    split_for_guarantee,
    with_off_policy_curves,
)
from depo_gateway.training.evaluation.contamination import fitted_on
from depo_gateway.training.evaluation.predictions import ServedLogits, text_logits
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.evaluation.risk_control import Guarantee, guarantee, threshold_grid
from depo_gateway.training.evaluation.targets import (
    guarantee_lines,
    guaranteed_thresholds,
    loss_target_name,
    parse_costs,
    parse_target,
    target_summary,
    thresholds_of,
)
from depo_gateway.training.evaluation.unfamiliar_prompts import deciding_quality, unfamiliar_message
from depo_gateway.training.fitting.calibration import calibrate, rule_curves, unchanged_message

Guarantees = Mapping[str, Mapping[str, Guarantee]]  # "loss=0.02@0.95" -> rule -> Guarantee
DELTA = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged_traffic.add_source_arguments(parser, "outcome tables")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument(
        "--include-fitted",
        action="store_true",
        help="include prompts that the checkpoint was fitted on, for which its predictions are too confident",
    )
    parser.add_argument(
        "--allow-cut-off",
        action="store_true",
        help="use tables although more than 10%% of a model's completions were cut off by --max-tokens",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="large-share=0.3, quality=0.98 (of all-large), cost=0.4, loss=0.02 (below all-large, guaranteed)",
    )
    parser.add_argument("--costs", nargs="+", default=[], metavar="NAME=X", help="each pool's cost, for a cost target")
    parser.add_argument(
        "--delta", type=float, default=DELTA, metavar="X",
        help=f"probability that a guaranteed loss is exceeded (default {DELTA:g})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the new version")
    parser.add_argument(
        "--publish", action="store_true", help="point `current` beside --out at it: gateways that watch load it"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 0; ValueError for the user's mistakes."""
    checkpoint.ensure_free(args.out)
    logged_traffic.check_source_arguments(args)
    targets = [parse_target(target) for target in args.target]
    losses = [value for name, value in targets if name == "loss"]
    if not 0 < args.delta < 1:
        raise ValueError(f"--delta is {args.delta:g}; it must lie between 0 and 1")
    place = checkpoint.resolve(args.checkpoint)
    runtime = Runtime.load(place, threads=os.cpu_count() or 1)
    costs = parse_costs(args.costs, runtime.pools)
    if costs is None and any(name == "cost" for name, _ in targets):
        raise ValueError(f"a cost target needs --costs {' '.join(f'{pool}=X' for pool in runtime.pools)}")
    data = read_calibration_data(args, runtime)
    split = split_for_guarantee(data, fitted_on(data.examples, runtime.manifest)) if losses else None
    logits = text_logits(runtime, data.texts, data.groups)
    weights = data.weights if split is None else np.where(split.fitting, data.weights, 0.0)
    weights = np.where(logits.unfamiliar, 0.0, weights)  # their predictions are the same for all
    calls = np.ones(len(weights))
    calibrated = calibrate(logits.full, logits.cheap, data.labels, weights, runtime.pools, runtime.calibration, calls)
    predicted = _served_quality(runtime, calibrated, logits, data)
    quality = deciding_quality(predicted, logits.unfamiliar)
    calibrated, by_tokens = (
        dataclasses.replace(calibrated, curves=rule_curves(quality, data.observed, counts, runtime.pools))
        for counts in (calls, data.tokens)
    )
    calibrated = with_off_policy_curves(calibrated, data, predicted, quality)
    guarantees = {} if split is None else _guarantees(quality, data.observed, split, losses, args.delta)
    thresholds = thresholds_of(calibrated, targets, costs, by_tokens) | guaranteed_thresholds(guarantees)
    calibrated = dataclasses.replace(calibrated, targets=thresholds)
    version = _write(place, args.out, calibrated, len(data.texts), guarantees)
    sys.stdout.write(
        unchanged_message(data.labels, runtime.pools, weights)
        + unfamiliar_message(logits.unfamiliar)
        + target_summary(
            calibrated, quality, data.observed, len(np.unique(data.unit)), by_curve=data.traffic is not None
        )
        + guarantee_lines(guarantees, runtime.pools[-1])
    )
    if args.publish:
        checkpoint.publish(args.out)
    sys.stdout.write(f"{args.out}: checkpoint {version}\n")
    return 0


def _served_quality(runtime: Runtime, calibrated: Calibration, logits: ServedLogits, data: CalibrationData) -> Array:
    """Quality (N, K) as the new version will serve it, from the logits of its parent.

    With familiarity these hold the parent's means, so that the prompts are scored again.
    """
    full = logits.full
    if calibrated.familiarity is not None:
        full = text_logits(dataclasses.replace(runtime, calibration=calibrated), data.texts, data.groups).full
    return calibrate_quality(calibrated.stages["full"], full)


def _write(place: Path, out: Path, calibrated: Calibration, count: int, guarantees: Guarantees) -> str:
    """Writes the checkpoint at `place` with the new calibration to `out`, as its child; returns the new version."""
    manifest, files = checkpoint.load_checkpoint(place)
    files[checkpoint.CALIBRATION] = calibration.dumps(calibrated)
    metrics = {**manifest.metrics, "calibrated_on": {"examples": count}}
    if guarantees:
        metrics["guarantees"] = nan_to_null(
            {name: {rule: dataclasses.asdict(one) for rule, one in by.items()} for name, by in guarantees.items()}
        )
    written = checkpoint.write_checkpoint(
        out, files, manifest.base, manifest.pools, manifest.text, metrics, manifest.version, manifest.heads
    )
    return written.version


def _guarantees(
    quality_NK: Array, observed_NK: Array, split: GuaranteeSplit, losses: Sequence[float], delta: float
) -> dict[str, dict[str, Guarantee]]:
    """Guarantees by target and rule. Each holds alone, not together: choose rule and loss beforehand."""
    tested = split.testing
    return {
        loss_target_name(epsilon, delta): {
            rule: guarantee(
                quality_NK[tested],
                observed_NK[tested],
                rule,
                threshold_grid(quality_NK[split.fitting], rule),
                epsilon,
                delta,
            )
            for rule in calibration.RULES
        }
        for epsilon in losses
    }
