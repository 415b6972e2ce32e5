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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from estimator import calibration, checkpoint
from estimator.calibration import Calibration, Stage, apply, fit_platt
from estimator.runtime import Runtime
from training.data import examples_of, labels, read_tables
from training.evaluate import fitted_share, logits_of, pools_of, warn_of_fitted
from training.measure import Array, at_thresholds, table

TARGETS = ("large-share", "quality", "cost")
MISSED = 0.01  # a share that differs more from the wanted one, or a quality that falls shorter of it, is told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    parser.add_argument(
        "--outcomes", nargs="+", type=Path, required=True, metavar="FILE", help="rows it was not fitted on"
    )
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="large-share=0.3, quality=0.98 (of all-large), cost=0.4",
    )
    parser.add_argument("--costs", nargs="+", default=[], metavar="NAME=X", help="each pool's cost, for a cost target")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the new version goes")
    parser.add_argument(
        "--publish", action="store_true", help="let `current` beside --out name it: gateways that watch take it up"
    )


def run(args: argparse.Namespace) -> int:
    """The command: the checkpoint with a new calibration, its parent on record."""
    checkpoint.ensure_free(args.out)
    targets = [parse_target(target) for target in args.target]
    place = checkpoint.resolve(args.checkpoint)
    runtime = Runtime.load(place, threads=os.cpu_count() or 1)
    pools = pools_of(args.pools, runtime.manifest)
    costs = parse_costs(args.costs, runtime.pools)
    if costs is None and any(name == "cost" for name, _ in targets):
        raise ValueError(f"a cost target needs --costs {' '.join(f'{pool}=X' for pool in runtime.pools)}")
    examples = examples_of(read_tables(args.outcomes), pools)
    warn_of_fitted("calibrate", fitted_share(examples, runtime.manifest))
    full, cheap = logits_of(runtime, [(example.prompt, example.context) for example in examples])
    names = runtime.pools
    observed_NK, token_NK = labels(examples, names)
    weights = np.ones(len(examples))
    calibrated = calibrate(full, cheap, observed_NK, token_NK, weights, names, runtime.calibration)
    calibrated = dataclasses.replace(calibrated, targets=thresholds_of(calibrated, targets, costs))
    manifest, files = checkpoint.load(place)
    files[checkpoint.CALIBRATION] = calibration.dumps(calibrated)
    metrics = {**manifest.metrics, "calibrated_on": {"examples": len(examples)}}
    written = checkpoint.write(
        args.out, files, manifest.base, manifest.pools, manifest.text, metrics, parent=manifest.version
    )
    sys.stdout.write(kept(observed_NK, token_NK, names) + summary(calibrated, full, observed_NK))
    if args.publish:
        checkpoint.publish(args.out)
    sys.stdout.write(f"{args.out}: checkpoint {written.version}\n")
    return 0


def calibrate(
    full: Array,
    cheap: Array,
    t_NK: Array,
    d_NK: Array,
    weights: Array,
    pools: tuple[str, ...],
    parent: Calibration | None = None,
) -> Calibration:
    """Calibration from logits (N, K, 2) of both stages and labels, NaN where there is none.

    With a parent, what lacks labels keeps the parent's: a pool's token confidence by itself, but the qualities of all
    pools together, since they are compared with one another.
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
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return Calibration(pools, stages, {rule: calibration.curve(quality_NK, t_NK, weights, rule) for rule in rules})


def lacking(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough(labels_NK[:, k], weights)]


def kept(observed_NK: Array, token_NK: Array, pools: tuple[str, ...]) -> str:
    """What calibrate() left as it was, and why, a line each."""
    weights = np.ones(len(observed_NK))
    why = f"fewer than {calibration.LABELS} labels, or all alike"
    lines = ""
    if short := lacking(observed_NK, weights, pools):
        lines += f"Quality of {', '.join(pools)} stays calibrated as it was: {why}, for {', '.join(short)}\n"
    if short := lacking(token_NK, weights, pools):
        lines += f"Token confidence of {', '.join(short)} stays calibrated as it was: {why}\n"
    return lines


def parse_target(target: str) -> tuple[str, float]:
    """ "large-share=0.3" -> ("large-share", 0.3)."""
    name, equals, value = target.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name not in TARGETS or not equals or not 0 <= number <= 1:
        raise ValueError(
            f"target {target!r} is none of {', '.join(f'{known}=X' for known in TARGETS)} with X from 0 to 1"
        )
    return name, number


def parse_costs(costs: Sequence[str], pools: tuple[str, ...]) -> tuple[float, ...] | None:
    """["small=1", "large=5"] -> costs in pool order; None if none are given."""
    if not costs:
        return None
    given: dict[str, float] = {}
    for cost in costs:
        name, _, value = cost.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            raise ValueError(f"cost {cost!r} is not of the form NAME=NUMBER") from None
    if set(given) != set(pools) or min(given.values()) <= 0:
        raise ValueError(f"--costs must give each of {', '.join(pools)} a cost above 0")
    return tuple(given[pool] for pool in pools)


def thresholds_of(
    calibrated: Calibration, targets: Sequence[tuple[str, float]], costs: tuple[float, ...] | None
) -> Mapping[str, Mapping[str, float]]:
    """{"large-share=0.3": {rule: threshold}}."""
    found: dict[str, dict[str, float]] = {}
    for name, value in targets:
        wanted = {name.replace("-", "_"): value}
        found[f"{name}={value:g}"] = {
            rule: calibrated.threshold(rule, costs=costs, **wanted) for rule in calibrated.curves
        }
    return found


def summary(calibrated: Calibration, full: Array, observed_NK: Array) -> str:
    """The thresholds found and what they do on the rows they were found on."""
    quality_NK, _ = apply(calibrated.stages["full"], full)
    complete = ~np.isnan(observed_NK).any(1)
    rows, missed = [], ""
    for target, by_rule in calibrated.targets.items():
        name, wanted = parse_target(target)
        for rule, threshold in by_rule.items():
            share = large_share(quality_NK, rule, threshold)
            if name == "large-share" and abs(share - wanted) > MISSED:
                missed += f"{target} is not met under {rule}: the nearest threshold gives {share:.3f}\n"
            cells = [target, rule, f"{threshold:.4f}", f"{share:.3f}", "", ""]
            if complete.any() and len(calibrated.pools) > 1:
                (at,) = at_thresholds(quality_NK[complete], observed_NK[complete], rule, (threshold,))
                all_large = observed_NK[complete, -1].mean()
                cells[4:] = [f"{at['quality']:.3f}", f"{all_large:.3f}"]
                if name == "quality" and at["quality"] < (wanted - MISSED) * all_large:
                    missed += f"{target} is not met under {rule}: the nearest threshold gives"
                    missed += f" {at['quality'] / all_large:.3f}\n"
            rows.append(cells)
    if not rows:
        return ""
    return table(rows, ("target", "rule", "threshold", "large share", "quality", "all large")) + "\n" + missed


def large_share(quality_NK: Array, rule: str, threshold: float) -> float:
    """Share of prompts that the last pool gets or, where there is one pool, that it is not sure of."""
    if quality_NK.shape[1] == 1:
        return float((calibration.confidence(quality_NK, rule)[:, 0] < threshold).mean())
    return float((calibration.route(quality_NK, rule, threshold) == quality_NK.shape[1] - 1).mean())
