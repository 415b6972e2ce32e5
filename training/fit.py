"""Outcome tables -> an estimator. Cross-fitted: every question is predicted by a model that never saw it, which tells
when to stop, how good it is and how to calibrate it; then one model is fitted on everything.

Shapes: N examples, K pools, E epochs, F folds.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from estimator import calibration, checkpoint, export
from estimator.calibration import STAGES, apply
from estimator.learner import Item, Learner, LearnerConfig
from estimator.model import DEFAULT_ENCODER, Estimator, ModelConfig, create
from estimator.records import Example
from estimator.text import POOLINGS, TextConfig
from estimator.vocabulary import narrowed
from training.calibrate import calibrate
from training.data import examples_of, folds_of, key_of, labels, parse_pools, read_tables
from training.evaluate import finite, report_of
from training.measure import Array, Measured, apgr_table


@dataclass(frozen=True, slots=True)
class FitConfig:
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    folds: int = 5
    max_epochs: int = 30
    patience: int = 6  # epochs without a better held-out loss before all folds stop
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """Held-out logits of every example, (N, K, 2) each, at the chosen epoch."""

    full: Array
    cheap: Array
    epochs: int


def fresh(model: Estimator, tokenizer: Tokenizer, config: LearnerConfig) -> Learner:
    """A learner on a copy of a model as it was created. A frozen encoder is shared, one that learns is copied."""
    shared = {} if config.train_layers else {id(model.encoder): model.encoder}
    return Learner(copy.deepcopy(model, shared), tokenizer, config)


def epoch(learner: Learner, items: Sequence[Item], batch_size: int, order: np.random.Generator) -> None:
    """One pass over the items in random order."""
    rows = order.permutation(len(items))
    for start in range(0, len(rows), batch_size):
        learner.step_items([items[i] for i in rows[start : start + batch_size]])


def cross_fit(
    start: Callable[[], Learner], items: Sequence[Item], folds: NDArray[np.int64], config: FitConfig, bar: bool = True
) -> Held:
    """Fit one learner a fold, all in step, and stop where the held-out loss of all of them together is least."""
    count = int(folds.max()) + 1
    learners, sides = [], []
    for fold in range(count):
        train = [item for item, f in zip(items, folds, strict=True) if f != fold]
        learner = start()
        learner.fit_statistics(train)
        learners.append((learner, np.random.default_rng([config.seed, fold])))
        sides.append(train)
    best, best_loss = None, np.inf
    pools = len(learners[0][0].model.config.pools)
    with tqdm(total=config.max_epochs, desc="fit", unit="epoch", disable=None if bar else True) as progress:
        for number in range(1, config.max_epochs + 1):
            full, cheap = np.zeros((2, len(items), pools, 2))
            for fold, ((learner, order), train) in enumerate(zip(learners, sides, strict=True)):
                epoch(learner, train, config.batch_size, order)
                rows = np.flatnonzero(folds == fold)
                full[rows], cheap[rows] = learner.predict([items[i] for i in rows.tolist()])
            loss = held_out_loss(full, items)
            progress.update()
            progress.set_postfix(held_out=f"{loss:.4f}")
            if loss < best_loss:
                best, best_loss = Held(full, cheap, number), loss
            elif best is not None and number - best.epochs >= config.patience:
                break
    assert best is not None
    return best


def held_out_loss(logits: Array, items: Sequence[Item]) -> float:
    """What early stopping watches: squared error of quality differences, or of a single pool's quality."""
    observed = np.array([item.quality for item in items])
    weights = np.array([item.weight for item in items])
    predicted = calibration.sigmoid(logits[:, :, 0])
    if observed.shape[1] > 1 and not np.isnan(np.diff(observed, axis=1)).all():
        predicted, observed = np.diff(predicted, axis=1), np.diff(observed, axis=1)
    error = (predicted - observed) ** 2
    return float(np.nansum(error * weights[:, None]) / (weights[:, None] * ~np.isnan(error)).sum())


def train(
    model: Estimator, tokenizer: Tokenizer, examples: Sequence[Example], config: FitConfig
) -> tuple[Learner, Held]:
    """Cross-fit for the number of epochs, then fit on everything."""
    pools = model.config.pools
    learner = fresh(model, tokenizer, config.learner)
    with tqdm(total=len(examples), desc="read prompts", unit="prompt", disable=None) as progress:
        items = []
        for start in range(0, len(examples), 512):
            items += learner.items(examples[start : start + 512])
            progress.update(len(items) - progress.n)
    folds = folds_of([example.group or key_of(example.prompt) for example in examples], config.folds, config.seed)
    held = cross_fit(lambda: fresh(model, tokenizer, config.learner), items, folds, config)
    learner.fit_statistics(items)
    order = np.random.default_rng([config.seed, config.folds])
    for _ in range(held.epochs):
        epoch(learner, items, config.batch_size, order)
    assert len(pools) == held.full.shape[1]
    return learner, held


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
    parser.add_argument("--pooling", choices=POOLINGS, default=text.pooling, help="%(default)s")
    parser.add_argument(
        "--max-tokens", type=int, default=text.max_tokens, help="longer prompts: head and tail (%(default)s)"
    )
    parser.add_argument(
        "--train-layers",
        type=int,
        default=learner.train_layers,
        help="train the encoder's last so many layers (%(default)s)",
    )
    parser.add_argument(
        "--split-by", choices=("question", "group"), default="question", help="kept on one side (%(default)s)"
    )
    parser.add_argument("--folds", type=int, default=fitting.folds, help="%(default)s")
    parser.add_argument("--max-epochs", type=int, default=fitting.max_epochs, help="%(default)s")
    parser.add_argument("--seed", type=int, default=fitting.seed, help="%(default)s")


def run(args: argparse.Namespace) -> int:
    """The command `depo-train fit`."""
    checkpoint.ensure_free(args.out)
    pools = parse_pools(args.pools)
    text = TextConfig(pooling=args.pooling, max_tokens=args.max_tokens)
    config = FitConfig(
        LearnerConfig(train_layers=args.train_layers), folds=args.folds, max_epochs=args.max_epochs, seed=args.seed
    )
    rows = read_tables(args.outcomes)
    examples = examples_of(rows, pools, args.split_by)
    torch.manual_seed(config.seed)
    created = ModelConfig(pools.names, text, args.encoder, args.layers)
    model, tokenizer = create(created)
    if args.vocabulary == "used":
        texts = [part for example in examples for part in (example.prompt, example.context)]
        model, tokenizer = create(created, narrowed(tokenizer, texts))
    learner, held = train(model, tokenizer, examples, config)
    t_NK, d_NK = labels(examples, pools.names)
    weights = np.array([example.weight for example in examples])
    calibrated = calibrate(held.full, held.cheap, t_NK, d_NK, weights, pools.names)
    report = report_of(
        {stage: apply(calibrated.stages[stage], getattr(held, stage))[0] for stage in STAGES},
        t_NK,
        np.array([len(example.prompt) for example in examples], float),
        pools.names,
    )
    metrics = {
        "models": dict(zip(pools.names, pools.models, strict=True)),
        "examples": len(examples),
        "epochs": held.epochs,
        "split_by": args.split_by,
        "held_out": finite(report),
    }
    with learner.averaged() as fitted:
        manifest = export.write(args.out, fitted, tokenizer, calibrated, metrics, learner.trained)
    sys.stdout.write(outcome(report) + f"{args.out}: checkpoint {manifest.version}\n")
    return 0


def outcome(report: Mapping[str, Any]) -> str:
    """What the command prints: how the held-out questions were routed."""
    if "apgr" not in report:
        return f"{report['prompts']} prompts; none has labels of two pools, so there is no routing to measure\n"
    measured = {name: Measured(**m) for name, m in report["apgr"].items() if name != "random"}
    return (
        f"{report['with_all_labels']} held-out prompts, all small {report['small_quality']:.3f},"
        f" all large {report['large_quality']:.3f}, perfect APGR {report['perfect_apgr']:.3f}\n\n"
        f"{apgr_table(measured)}\n\n"
    )
