"""`depo-train fit`: fits an estimator to outcome tables.

The fit is cross-fitted: every question is predicted by a model that was not fitted on it. These predictions choose the
fit's settings, measure the estimator and calibrate it.

Shapes: N examples, K pools.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from depo_gateway.estimator import checkpoint, export
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.encoder import DEFAULT_ENCODER
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.learner import WHOLE, LearnerConfig
from depo_gateway.estimator.model import Estimator, ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.share_interval import (
    NORMAL_QUANTILE,
    effective_count,
    share_interval,
    share_text,
)
from depo_gateway.estimator.similarity import usual_centres
from depo_gateway.estimator.text import POOLINGS, TextConfig
from depo_gateway.estimator.vocabulary import narrow_tokenizer
from depo_gateway.training.evaluation.contamination import fingerprints
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import (
    EPOCH_FOLDS,
    LARGE_FOLDS,
    MANY_EXAMPLES,
    SMALL_FOLDS,
    Fit,
    fit_estimator,
)
from depo_gateway.training.fitting.familiarity import familiarity_of
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.held_out import DESIGN_EFFECT
from depo_gateway.training.fitting.held_out_report import held_out_reports, held_out_text
from depo_gateway.training.fitting.prior_choice import prior_text
from depo_gateway.training.fitting.prior_outcomes import PriorOutcomes, prior_outcomes
from depo_gateway.training.outcomes.known_groups import known_groups
from depo_gateway.training.outcomes.table import Pools, check_cut_off, examples_of, parse_pools, read_tables

WIDE_SHARE = 5.0  # points either side of 50%, above which the text says that the share is not known well


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
        help="cheapest first; NAME=MODEL,MODEL takes the mean of several models",
    )
    parser.add_argument(
        "--allow-cut-off",
        action="store_true",
        help="fit tables although more than 10%% of a model's completions were cut off by --max-tokens",
    )
    parser.add_argument(
        "--prior-outcomes",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="outcome tables of other models, on the same or other questions: with few labels of your own they make the"
        " fit better, and cross-validation chooses whether they are used",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument(
        "--publish", action="store_true", help="point `current` beside --out at it: gateways that watch load it"
    )
    parser.add_argument(
        "--encoder", default=DEFAULT_ENCODER, help="Hugging Face name or directory (%(default)s, shipped)"
    )
    parser.add_argument(
        "--layers", type=int, default=5, help="number of the encoder's first layers to keep, 0: all (%(default)s)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=("all", "used"),
        default="all",
        help="used: only the word pieces in the tables, for a small checkpoint of a narrow domain (%(default)s)",
    )
    parser.add_argument(
        "--trunk",
        action="store_true",
        help="DEPO's trunk on the encoder instead of linear heads: slower to fit, no better on GSM8K",
    )
    parser.add_argument("--pooling", choices=POOLINGS, default=text.pooling, help="%(default)s")
    parser.add_argument(
        "--max-tokens", type=int, default=text.max_tokens, help="of longer prompts head and tail are read (%(default)s)"
    )
    parser.add_argument(
        "--train-layers",
        type=int,
        default=learner.train_layers,
        help="number of the encoder's last layers to train, -1: the whole encoder (%(default)s)",
    )
    parser.add_argument(
        "--ranking-weight",
        type=float,
        default=learner.ranking_weight,
        help="of the ranking term, 1 in the paper (%(default)s)",
    )
    parser.add_argument("--gain-weight", type=float, default=learner.gain_weight, help="of the gain term (%(default)s)")
    parser.add_argument(
        "--balance", type=float, default=0.0, help="0: equal weight per question, 1: per source (%(default)s)"
    )
    parser.add_argument(
        "--groups",
        action="store_true",
        help="make the table's groups a feature, for a gateway that knows each request's (routing.group)",
    )
    parser.add_argument(
        "--folds",
        type=int,
        help=f"of the cross-fit (default {SMALL_FOLDS}; {LARGE_FOLDS} from {MANY_EXAMPLES:,} questions on;"
        f" {EPOCH_FOLDS} with SGD)",
    )
    parser.add_argument(
        "--max-epochs",
        type=int,
        default=fitting.max_epochs,
        help="of SGD, which fits a trunk, trained layers and the terms above; at most (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=fitting.seed, help="of folds, weights and order (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 0; ValueError for the user's mistakes."""
    checkpoint.ensure_free(args.out)
    pools = parse_pools(args.pools)
    config = _fit_config(args)
    rows = read_tables(args.outcomes)
    check_cut_off(rows, pools, "fit", args.allow_cut_off)
    examples = examples_of(rows, pools, args.balance)
    prior = _prior(args.prior_outcomes, pools)
    torch.manual_seed(config.seed)
    questions = examples if prior is None else [*examples, *prior.examples]
    model, tokenizer = _create_model(args, pools.names, examples, questions)
    fit = fit_estimator(model, tokenizer, examples, config, prior)
    calibrated, counts = _calibrated(fit, examples)
    reports = held_out_reports(examples, fit, calibrated)
    metrics = {
        "models": dict(zip(pools.names, pools.models, strict=True)),
        "examples": len(examples),
        **fit.settings,
        "held_out": nan_to_null(reports),
        "fitted_on": fingerprints(questions if fit.prior is not None and fit.prior.used else examples),
    }
    if fit.prior is not None:
        metrics["prior"] = asdict(fit.prior)
    manifest = export.export_checkpoint(args.out, fit.model, tokenizer, calibrated, metrics, fit.trained)
    if args.publish:
        checkpoint.publish(args.out)
    if fit.prior is not None:
        sys.stdout.write(prior_text(fit.prior))
    for name, report in reports.items():
        sys.stdout.write(held_out_text(name, report))
    new_groups = "; on new groups the calibration is less accurate" if "groups" in reports else ""
    sys.stdout.write(f"Probabilities and curves are calibrated on the held-out questions{new_groups}\n")
    sys.stdout.write(f"{args.out}: checkpoint {manifest.version}\n{next_step(args.out, calibrated, counts)}")
    return 0


def _prior(paths: Sequence[Path] | None, pools: Pools) -> PriorOutcomes | None:
    """The prior in the tables of --prior-outcomes. Says which of the pools' models it leaves out."""
    if not paths:
        return None
    prior = prior_outcomes(read_tables(paths), {model for models in pools.models for model in models})
    if prior.left_out:
        sys.stdout.write(
            f"--prior-outcomes: outcomes of {', '.join(prior.left_out)} are left out, because a pool has that model;"
            " where they were graded like yours, give the table to --outcomes as well\n"
        )
    return prior


def _calibrated(fit: Fit, examples: Sequence[Example]) -> tuple[Calibration, Array]:
    """The calibration of the served model, and the weights (N,) of the prompts that its shares were measured on.

    Probabilities are fitted to all held-out predictions, shares measured on those of the served model's kind alone.
    """
    pools = fit.model.config.pools
    labels = labels_by_head(examples, pools, fit.model.config.heads)
    weights = np.array([example.weight for example in examples])
    counts, held_out = np.where(fit.measured, weights, 0.0), fit.held_out[0]
    calibrated = calibrate(held_out.full, held_out.cheap, labels, weights, pools, counts=counts)
    if fit.distances is not None:
        familiarity = familiarity_of(fit.distances, labels["quality"], weights)
        calibrated = replace(calibrated, familiarity=familiarity)
    return calibrated, counts


def _fit_config(args: argparse.Namespace) -> FitConfig:
    """The settings of the fit. Raises ValueError for numbers out of range."""
    for name, value, least in (
        ("--max-epochs", args.max_epochs, 1),
        ("--folds", SMALL_FOLDS if args.folds is None else args.folds, 2),
        ("--balance", args.balance, 0),
    ):
        if not least <= value < np.inf:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    learning = LearnerConfig(
        train_layers=args.train_layers,
        dropout=args.trunk,
        ranking_weight=args.ranking_weight,
        gain_weight=args.gain_weight,
    )
    return FitConfig(learning, folds=args.folds, max_epochs=args.max_epochs, seed=args.seed)


def _create_model(
    args: argparse.Namespace, pools: tuple[str, ...], own: Sequence[Example], examples: Sequence[Example]
) -> tuple[Estimator, Tokenizer]:
    """The untrained model, its vocabulary narrowed to the examples' if --vocabulary is `used`.

    `own`: those of `examples` that have the pools' labels.
    """
    text = TextConfig(pooling=args.pooling, max_tokens=args.max_tokens)
    frozen = not (args.trunk or args.train_layers)  # otherwise the states move away from the centres
    config = ModelConfig(
        pools,
        text,
        args.encoder,
        args.layers,
        trunk=args.trunk,
        groups=known_groups(own) if args.groups else (),
        centres=usual_centres(len(examples)) if frozen else 0,
    )
    rounded = args.train_layers != WHOLE
    model, tokenizer = create_model(config, rounded=rounded, seed=args.seed)
    if args.vocabulary == "used":
        texts = [part for example in examples for part in (example.prompt, example.context)]
        model, tokenizer = create_model(config, narrow_tokenizer(tokenizer, texts), rounded, args.seed)
    return model, tokenizer


def next_step(out: Path, calibrated: Calibration, counts: Array) -> str:
    """What to put into gateway.yaml, and the share of the last pool at some thresholds on prompts like these.

    `counts` (N,): the weights of the prompts on which the shares were measured, 0 for the others.
    """
    step = f"next: estimator: {{path: {out}}} in gateway.yaml"
    if "gain" not in calibrated.curves:
        return step + "\n"
    count = effective_count(counts) / DESIGN_EFFECT
    shares = ", ".join(
        f"{at}: {share_text(calibrated.large_share('gain', at), count)}" for at in (0.7, 0.8, 0.85, 0.9, 0.95)
    )
    low, high = share_interval(0.5, count)
    width = 100 * (high - low) / 2
    text = f"{step}; share of {calibrated.pools[-1]} on such prompts by routing.threshold: {shares}\n"
    text += (
        f"The shares are measured on {np.count_nonzero(counts)} held-out prompts, also those that lack a pool's label;"
        " brackets: 95% interval\n"
    )
    if width > WIDE_SHARE:
        needed = round(DESIGN_EFFECT * (NORMAL_QUANTILE / 2 / (WIDE_SHARE / 100)) ** 2, -2)
        text += (
            f"With so few prompts, a share of 50% may be {width:.0f} points more or less: "
            f"fit on {needed:,.0f} or more to know it within {WIDE_SHARE:.0f}\n"
        )
    return text
