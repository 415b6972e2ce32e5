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

from estimator import calibration, checkpoint
from estimator.calibration import Calibration, Curve, Stage, apply, fit_platt
from estimator.runtime import Runtime
from training import evidence, logged
from training.evidence import Split
from training.fitted import fitted_share, known_of, warn_of_fitted
from training.guarantee import Guarantee, grid, guarantee
from training.measure import Array
from training.report import finite
from training.scored import logits_of_texts
from training.targets import guaranteed, name_of_loss, parse_costs, parse_target, summary, thresholds_of, told

DELTA = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged.add_source(parser, "rows it was not fitted on")
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
    logged.check_source(args)
    targets = [parse_target(target) for target in args.target]
    losses = [value for name, value in targets if name == "loss"]
    if not 0 < args.delta < 1:
        raise ValueError(f"--delta is {args.delta:g}; it must lie between 0 and 1")
    place = checkpoint.resolve(args.checkpoint)
    runtime = Runtime.load(place, threads=os.cpu_count() or 1)
    names, costs = runtime.pools, parse_costs(args.costs, runtime.pools)
    if costs is None and any(name == "cost" for name, _ in targets):
        raise ValueError(f"a cost target needs --costs {' '.join(f'{pool}=X' for pool in runtime.pools)}")
    rows = evidence.gather(args, runtime)
    tested = evidence.held_back(rows, known_of(rows.examples, runtime.manifest)) if losses else None
    warn_of_fitted("calibrate", fitted_share(rows.examples, runtime.manifest))
    full, cheap = logits_of_texts(runtime, rows.texts)
    weights = rows.weights if tested is None else np.where(tested.fitting, rows.weights, 0.0)
    calibrated = calibrate(
        full, cheap, rows.observed, rows.token, weights, names, runtime.calibration, np.ones(len(weights))
    )
    quality, _ = apply(calibrated.stages["full"], full)
    by_tokens = dataclasses.replace(calibrated, curves=curves(quality, rows.observed, rows.tokens, names))
    calibrated = evidence.with_logs(calibrated, rows, quality)
    guarantees = {} if tested is None else guarantees_of(quality, rows.observed, tested, losses, args.delta)
    found = thresholds_of(calibrated, targets, costs, by_tokens) | guaranteed(guarantees)
    calibrated = dataclasses.replace(calibrated, targets=found)
    manifest, files = checkpoint.load(place)
    files[checkpoint.CALIBRATION] = calibration.dumps(calibrated)
    on = {"examples": len(rows.texts)}
    proofs = {name: {rule: dataclasses.asdict(one) for rule, one in by.items()} for name, by in guarantees.items()}
    metrics = {**manifest.metrics, "calibrated_on": on, **({"guarantees": finite(proofs)} if proofs else {})}
    written = checkpoint.write(
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


def calibrate(
    full: Array,
    cheap: Array,
    t_NK: Array,
    d_NK: Array,
    weights: Array,
    pools: tuple[str, ...],
    parent: Calibration | None = None,
    counts: Array | None = None,
) -> Calibration:
    """Calibration from logits (N, K, 2) of both stages and labels, NaN where there is none.

    With a parent, what lacks labels keeps the parent's: a pool's token confidence by itself, but the qualities of all
    pools together, since they are compared with one another. `counts` (N,): what each prompt counts for in shares and
    in the quality of a curve, if that is not its weight.
    """
    stages = {}
    for name, logits in (("full", full), ("cheap", cheap)):
        quality, token = (
            tuple(fit_platt(logits[:, k, head], labels_NK[:, k], weights) for k in range(len(pools)))
            for head, labels_NK in enumerate((t_NK, d_NK))
        )
        if parent is not None:
            before = parent.stages[name]
            if lacking(t_NK, weights, pools):
                quality = before.quality
            short = lacking(d_NK, weights, pools)
            token = tuple(
                old if pool in short else new
                for pool, old, new in zip(pools, before.token_confidence, token, strict=True)
            )
        stages[name] = Stage(quality, token)
    quality_NK, _ = apply(stages["full"], full)
    return Calibration(pools, stages, curves(quality_NK, t_NK, weights if counts is None else counts, pools))


def curves(quality_NK: Array, observed_NK: Array, counts: Array, pools: tuple[str, ...]) -> dict[str, Curve]:
    """Each rule's curve on prompts that count `counts` (N,)."""
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return {rule: calibration.curve(quality_NK, observed_NK, counts, rule) for rule in rules}


def lacking(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough(labels_NK[:, k], weights)]


def kept(observed_NK: Array, token_NK: Array, pools: tuple[str, ...], weights: Array | None = None) -> str:
    """What calibrate() left as it was, and why, a line each."""
    weights = np.ones(len(observed_NK)) if weights is None else weights
    why = f"fewer than {calibration.LABELS} labels, or all alike"
    lines = ""
    if short := lacking(observed_NK, weights, pools):
        lines += f"Quality of {', '.join(pools)} stays calibrated as it was: {why}, for {', '.join(short)}\n"
    if short := lacking(token_NK, weights, pools):
        lines += f"Token confidence of {', '.join(short)} stays calibrated as it was: {why}\n"
    return lines
