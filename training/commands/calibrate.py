"""`depo-train calibrate`: probabilities from logits, thresholds for targets; a new version of a checkpoint.

Use rows that the checkpoint was not fitted on: on its own fitting rows it looks surer and better than it is. What the
rows have too few labels for stays as it was.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.calibration import apply_calibration
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import calibration_data, logged_traffic
from depo_gateway.training.evaluation.calibration_data import Split
from depo_gateway.training.evaluation.contamination import fitted_share, known_of, warn_of_fitted
from depo_gateway.training.evaluation.predictions import logits_of_texts
from depo_gateway.training.evaluation.report import finite
from depo_gateway.training.evaluation.risk_control import Guarantee, grid, guarantee
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.evaluation.targets import (
    guaranteed,
    name_of_loss,
    parse_costs,
    parse_target,
    summary,
    thresholds_of,
    told,
)
from depo_gateway.training.fitting.calibration import calibrate, curves, kept

DELTA = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged_traffic.add_source(parser, "rows it was not fitted on")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="large-share=0.3, quality=0.98 (of all-large), cost=0.4, loss=0.02 (below all-large at most, guaranteed)",
    )
    parser.add_argument("--costs", nargs="+", default=[], metavar="NAME=X", help="each pool's cost, for a cost target")
    parser.add_argument(
        "--delta", type=float, default=DELTA, metavar="X",
        help=f"a guaranteed loss may be exceeded with this probability (default {DELTA:g})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the new version goes")
    parser.add_argument(
        "--publish", action="store_true", help="let `current` beside --out name it: gateways that watch take it up"
    )


def run(args: argparse.Namespace) -> int:
    """The command: the checkpoint with a new calibration, its parent on record."""
    checkpoint.ensure_free(args.out)
    logged_traffic.check_source(args)
    targets = [parse_target(target) for target in args.target]
    losses = [value for name, value in targets if name == "loss"]
    if not 0 < args.delta < 1:
        raise ValueError(f"--delta is {args.delta:g}; it must lie between 0 and 1")
    place = checkpoint.resolve(args.checkpoint)
    runtime = Runtime.load(place, threads=os.cpu_count() or 1)
    names, costs = runtime.pools, parse_costs(args.costs, runtime.pools)
    if costs is None and any(name == "cost" for name, _ in targets):
        raise ValueError(f"a cost target needs --costs {' '.join(f'{pool}=X' for pool in runtime.pools)}")
    rows = calibration_data.gather(args, runtime)
    tested = calibration_data.held_back(rows, known_of(rows.examples, runtime.manifest)) if losses else None
    warn_of_fitted("calibrate", fitted_share(rows.examples, runtime.manifest))
    full, cheap = logits_of_texts(runtime, rows.texts)
    weights = rows.weights if tested is None else np.where(tested.fitting, rows.weights, 0.0)
    calibrated = calibrate(
        full, cheap, rows.observed, rows.token, weights, names, runtime.calibration, np.ones(len(weights))
    )
    quality, _ = apply_calibration(calibrated.stages["full"], full)
    by_tokens = dataclasses.replace(calibrated, curves=curves(quality, rows.observed, rows.tokens, names))
    calibrated = calibration_data.with_logs(calibrated, rows, quality)
    guarantees = {} if tested is None else guarantees_of(quality, rows.observed, tested, losses, args.delta)
    found = thresholds_of(calibrated, targets, costs, by_tokens) | guaranteed(guarantees)
    calibrated = dataclasses.replace(calibrated, targets=found)
    manifest, files = checkpoint.load_checkpoint(place)
    files[checkpoint.CALIBRATION] = calibration.dumps(calibrated)
    on = {"examples": len(rows.texts)}
    proofs = {name: {rule: dataclasses.asdict(one) for rule, one in by.items()} for name, by in guarantees.items()}
    metrics = {**manifest.metrics, "calibrated_on": on, **({"guarantees": finite(proofs)} if proofs else {})}
    written = checkpoint.write_checkpoint(
        args.out, files, manifest.base, manifest.pools, manifest.text, metrics, parent=manifest.version
    )
    sys.stdout.write(
        kept(rows.observed, rows.token, names, weights)
        + summary(calibrated, quality, rows.observed, by_curve=rows.traffic is not None)
        + told(guarantees, names[-1])
    )
    if args.publish:
        checkpoint.publish(args.out)
    sys.stdout.write(f"{args.out}: checkpoint {written.version}\n")
    return 0


def guarantees_of(
    quality_NK: Array, observed_NK: Array, split: Split, losses: Sequence[float], delta: float
) -> dict[str, dict[str, Guarantee]]:
    """{"loss=0.02@0.95": {rule: Guarantee}}: each by itself, so choose rule and loss before looking at the others."""
    tested = split.testing
    return {
        name_of_loss(epsilon, delta): {
            rule: guarantee(
                quality_NK[tested], observed_NK[tested], rule, grid(quality_NK[split.fitting], rule), epsilon, delta
            )
            for rule in calibration.RULES
        }
        for epsilon in losses
    }
