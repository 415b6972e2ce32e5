"""Outcome tables -> an estimator. Cross-fitted: every question is predicted by a model that never saw it, which tells
when to stop, how good it is and how to calibrate it; then one model is fitted on everything.

Shapes: N examples, K pools, E epochs, F folds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depo_gateway.estimator import calibration, checkpoint, export
from depo_gateway.estimator.calibration import STAGES, Calibration, apply_calibration
from depo_gateway.estimator.learner import WHOLE, LearnerConfig
from depo_gateway.estimator.model import DEFAULT_ENCODER, ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import POOLINGS, TextConfig
from depo_gateway.estimator.vocabulary import narrow_tokenizer
from depo_gateway.training.evaluation.contamination import fingerprints
from depo_gateway.training.evaluation.report import finite, report_of
from depo_gateway.training.evaluation.routing_metrics import Measured, apgr_table
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import FitConfig, Held, foldings_of, groups_of, train
from depo_gateway.training.outcomes.table import examples_of, labels, parse_pools, read_tables

HELD_OUT = ("questions", "groups")  # names of foldings_of's foldings
FEW_EXAMPLES, FEW_GROUPS = 50, 10  # with fewer, fit says that its figures are worth little


def reports_of(
    examples: Sequence[Example], held: Sequence[Held], calibrated: calibration.Calibration, config: FitConfig
) -> dict[str, dict[str, Any]]:
    """By HELD_OUT's names: how held-out prompts are routed. Question folds are centred, group folds resampled whole."""
    observed, _ = labels(examples, calibrated.pools)
    length = np.array([len(example.prompt) for example in examples], float)
    reports = {}
    for name, one, folds in zip(HELD_OUT, held, foldings_of(examples, config), strict=False):
        quality = {stage: apply_calibration(calibrated.stages[stage], getattr(one, stage))[0] for stage in STAGES}
        by_group = name == "groups"
        reports[name] = report_of(
            quality,
            observed,
            length,
            calibrated.pools,
            folds=None if by_group else folds,
            groups=groups_of(examples) if by_group else None,
        )
    return reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    learner, fitting, text = LearnerConfig(), FitConfig(), TextConfig()
    parser.add_argument(
        "--outcomes", nargs="+", type=Path, required=True, metavar="FILE", help="outcome tables, JSON lines"
    )
    parser.add_argument(
        "--pools",
        nargs="+",
        required=True,
        metavar="NAME=MODEL",
        help="cheapest first; NAME=MODEL,MODEL takes their mean",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument(
        "--publish", action="store_true", help="let `current` beside --out name it: gateways that watch take it up"
    )
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="Hugging Face name or directory (%(default)s)")
    parser.add_argument(
        "--layers", type=int, default=5, help="keep the encoder's first so many layers, 0: all (%(default)s)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=("all", "used"),
        default="all",
        help="used: only the pieces of words in the tables, for a small checkpoint of a narrow domain (%(default)s)",
    )
    parser.add_argument(
        "--trunk",
        action="store_true",
        help="DEPO's trunk on the encoder, not linear heads: slower to fit, and on GSM8K no better",
    )
    parser.add_argument("--pooling", choices=POOLINGS, default=text.pooling, help="%(default)s")
    parser.add_argument(
        "--max-tokens", type=int, default=text.max_tokens, help="longer prompts: head and tail (%(default)s)"
    )
    parser.add_argument(
        "--train-layers",
        type=int,
        default=learner.train_layers,
        help="train the encoder's last so many layers, -1: all of it (%(default)s)",
    )
    parser.add_argument(
        "--ranking-weight", type=float, default=learner.ranking_weight, help="1: the paper's ranking term (%(default)s)"
    )
    parser.add_argument("--gain-weight", type=float, default=learner.gain_weight, help="of the gain term (%(default)s)")
    parser.add_argument(
        "--balance", type=float, default=0.0, help="0: every question counts alike, 1: every source (%(default)s)"
    )
    parser.add_argument("--folds", type=int, default=fitting.folds, help="%(default)s")
    parser.add_argument("--max-epochs", type=int, default=fitting.max_epochs, help="%(default)s")
    parser.add_argument("--seed", type=int, default=fitting.seed, help="%(default)s")


def ensure_sensible(config: FitConfig, balance: float) -> None:
    """Raise ValueError for numbers that nothing can be fitted with."""
    for name, value, least in (
        ("--max-epochs", config.max_epochs, 1),
        ("--folds", config.folds, 2),
        ("--balance", balance, 0),
    ):
        if not least <= value < np.inf:
            raise ValueError(f"{name} is {value}; it must be {least} or more")


def run(args: argparse.Namespace) -> int:
    """The command `depo-train fit`."""
    checkpoint.ensure_free(args.out)
    pools = parse_pools(args.pools)
    text = TextConfig(pooling=args.pooling, max_tokens=args.max_tokens)
    learning = LearnerConfig(
        train_layers=args.train_layers,
        dropout=args.trunk,
        ranking_weight=args.ranking_weight,
        gain_weight=args.gain_weight,
    )
    config = FitConfig(learning, folds=args.folds, max_epochs=args.max_epochs, seed=args.seed)
    ensure_sensible(config, args.balance)
    rows = read_tables(args.outcomes)
    examples = examples_of(rows, pools, args.balance)
    torch.manual_seed(config.seed)
    created = ModelConfig(pools.names, text, args.encoder, args.layers, trunk=args.trunk)
    rounded = args.train_layers != WHOLE
    model, tokenizer = create_model(created, rounded=rounded, seed=config.seed)
    if args.vocabulary == "used":
        texts = [part for example in examples for part in (example.prompt, example.context)]
        model, tokenizer = create_model(created, narrow_tokenizer(tokenizer, texts), rounded, config.seed)
    learner, held, epochs = train(model, tokenizer, examples, config)
    t_NK, d_NK = labels(examples, pools.names)
    weights = np.array([example.weight for example in examples])
    calibrated = calibrate(held[0].full, held[0].cheap, t_NK, d_NK, weights, pools.names)
    reports = reports_of(examples, held, calibrated, config)
    metrics = {
        "models": dict(zip(pools.names, pools.models, strict=True)),
        "examples": len(examples),
        "epochs": epochs,
        "held_out": finite(reports),
        "fitted_on": fingerprints(examples),
    }
    with learner.averaged() as fitted:
        manifest = export.export_checkpoint(args.out, fitted, tokenizer, calibrated, metrics, learner.trained)
    if args.publish:
        checkpoint.publish(args.out)
    told = [outcome(name, report) for name, report in reports.items()]
    told.append("Probabilities and curves are calibrated on the held-out questions")
    told.append(", whose groups were known; on new groups they hold less well\n" if "groups" in reports else "\n")
    told.append(f"{args.out}: checkpoint {manifest.version}\n{next_step(args.out, calibrated)}")
    sys.stdout.write("".join(told))
    return 0


def next_step(out: Path, calibrated: Calibration) -> str:
    """What to put into gateway.yaml, and what its threshold would do on prompts like these."""
    said = f"next: estimator: {{path: {out}}} in gateway.yaml"
    if "gain" not in calibrated.curves:
        return said + "\n"
    shares = ", ".join(f"{at}: {calibrated.large_share('gain', at):.0%}" for at in (0.7, 0.8, 0.85, 0.9, 0.95))
    return f"{said}; on such prompts {calibrated.pools[-1]} serves, by routing.threshold, {shares}\n"


def outcome(name: str, report: Mapping[str, Any]) -> str:
    """What the command prints: how prompts were routed by models that had not seen them, and what to make of it."""
    if "apgr" not in report:
        return f"{report['prompts']} prompts; none has labels of two pools, so there is no routing to measure\n"
    said = f"all small {report['small_quality']:.3f}, all large {report['large_quality']:.3f}"
    title = f"Held-out {name}: {report['with_all_labels']} prompts"
    if "groups" in report:
        title += f" in {report['groups']} groups"
    if np.isnan(report["perfect_apgr"]):
        return f"{title}, {said}: the large pool is no better than the small one, so there is no gap to measure\n\n"
    measured = {key: Measured(**m) for key, m in report["apgr"].items() if key != "random"}
    remarks = []
    if report["with_all_labels"] < FEW_EXAMPLES:
        remarks.append(f"Fewer than {FEW_EXAMPLES} prompts with labels of every pool: these figures are worth little.")
    if report.get("groups", FEW_GROUPS) < FEW_GROUPS:
        remarks.append(f"Intervals of fewer than {FEW_GROUPS} groups are rough, and mostly too narrow.")
    if not measured["gain (full)"].difference_low > 0:
        remarks.append(f"With {name} held out, gain is not shown to route better than prompt length does.")
    return "\n\n".join(
        [f"{title}, {said}, perfect APGR {report['perfect_apgr']:.3f}", apgr_table(measured), *remarks, ""]
    )
