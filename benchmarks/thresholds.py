"""Benchmark of what `depo-train fit` promises: shares at thresholds, their intervals, calibrated qualities.

    python benchmarks/thresholds.py --data DIR --out benchmarks/results/thresholds.md [--splits 200]

DIR/outcomes holds outcome tables, DIR/prompts further prompts of the same sources without labels, as JSON lines. Each
split draws some labelled questions of a table, fits on them alone what `fit` would fit, and asks for the thresholds of
wanted shares. The realised shares are those of prompts that the fit has not seen: the further prompts, else the rest of
the table. A share needs no labels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import calibrate_quality, confidence
from depo_gateway.estimator.learner import Item, LearnerConfig
from depo_gateway.estimator.model import Estimator, ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.share_interval import share_interval
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.markdown import table
from depo_gateway.training.evaluation.routing_metrics import calibration_error
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import LARGE_FOLDS, MANY_EXAMPLES, SMALL_FOLDS
from depo_gateway.training.fitting.epoch_fit import new_learner
from depo_gateway.training.fitting.held_out import DESIGN_EFFECT
from depo_gateway.training.fitting.penalty_search import fit_linear
from depo_gateway.training.outcomes.table import examples_of, parse_pools, read_table

POOLS = ("small", "large")
WANTED = (0.1, 0.3, 0.5, 0.7)
THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95)
MOST_PROMPTS = 2000  # further prompts of a source that are embedded
MOST_ROWS = 5000  # of a table that are embedded
MIXTRAL_GPT4 = ("small=mistralai/Mixtral-8x7B-Instruct-v0.1", "large=gpt-4-1106-preview")
LLAMA = ("small=Meta-Llama-3.1-8B-Instruct", "large=Meta-Llama-3.1-70B-Instruct")
AIM_ERROR = {200: 0.06, 700: 0.03}
AIM_COVERAGE = (0.92, 0.98)
AIM_CALIBRATION = 0.03


@dataclass(frozen=True, slots=True)
class Source:
    """A table, the pair of models, further prompts of its source, and the numbers of labels to try."""

    table: str
    pools: tuple[str, str]
    prompts: str  # a file in DIR/prompts whose prompts are the unseen ones; "": the rest of the table
    labels: tuple[int, ...]
    level: float | None = None  # of the further prompts: the one that the table holds
    answers: str = ""  # of the further prompts: a regular expression of the answers that the table holds


SOURCES = (
    Source("gsm8k_mixtral_gpt4", MIXTRAL_GPT4, "gsm8k_train", (200, 700)),
    Source("gsm8k_many_models", LLAMA, "gsm8k_train", (200, 700)),
    Source("math_l5_many_models", LLAMA, "", (200,)),
    Source("math_l5_many_models", LLAMA, "math_train", (200, 400), level=5.0, answers=r"-?\d+"),
    Source("mmlu_mixtral_gpt4", MIXTRAL_GPT4, "", (200, 700, 2000)),
)
LEAST_UNSEEN = 5  # prompts for each label, on which the realised share is known well enough to test an interval
SPLITS_OF_MANY = 20  # for fits on MANY_EXAMPLES labels or more, whose figures vary little


@dataclass(frozen=True, slots=True)
class Split:
    """One fit's figures."""

    realised: Array  # (len(WANTED),) share of unseen prompts at the threshold for each wanted share
    measured: Array  # (len(THRESHOLDS),) share that the fit prints
    low: Array
    high: Array
    fresh: Array  # (len(THRESHOLDS),) share of unseen prompts
    calibration: Array  # (K,) debiased calibration error on the rest of the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with outcomes/*.jsonl and prompts/*.jsonl")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    parser.add_argument("--splits", type=int, default=200, help="of each table and number of labels (default 200)")
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="these tables alone")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    started = time.monotonic()
    rows: list[tuple[str, ...]] = []
    intervals: list[tuple[str, ...]] = []
    calibrations: list[tuple[str, ...]] = []
    for source in SOURCES:
        if args.only and source.table not in args.only:
            continue
        items, unseen = read_source(args.data, source)
        for count in source.labels:
            splits = run_splits(items, unseen, count, args.splits if count < MANY_EXAMPLES else SPLITS_OF_MANY, args)
            of = f"{len(unseen)} of {source.prompts}" if unseen else f"{len(items) - count} of the table"
            name = f"{source.table}, {source.pools[1].partition('=')[2]}; {of}"
            rows.append(share_row(name, count, splits))
            print(rows[-1], file=sys.stderr)
            if (len(unseen) or len(items) - count) >= LEAST_UNSEEN * count and 2 * count <= len(items):
                intervals.append(interval_row(name, count, splits))
                print(intervals[-1], file=sys.stderr)
            if count >= MANY_EXAMPLES:
                calibrations.append(calibration_row(name, count, splits))
    text = page(rows, intervals, calibrations, args.splits, (time.monotonic() - started) / 60)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def read_source(data: Path, source: Source) -> tuple[list[Item], list[Item]]:
    """The table's items with labels, and those of further prompts without."""
    pools = parse_pools(source.pools)
    examples = examples_of(list(read_table(data / "outcomes" / f"{source.table}.jsonl")), pools)
    examples = [example for example in examples if None not in example.quality.values()]
    examples = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:MOST_ROWS]]
    further: list[Example] = []
    if source.prompts:
        with open(data / "prompts" / f"{source.prompts}.jsonl", encoding="utf-8") as file:
            prompts = [json.loads(line) for line in file]
        if source.level is not None:
            prompts = [row for row in prompts if row["level_or_difficulty"] == source.level]
        prompts = [row for row in prompts if not source.answers or re.fullmatch(source.answers, row["answer"])]
        order = np.random.default_rng(0).permutation(len(prompts))[:MOST_PROMPTS]
        further = [Example(prompts[i]["question"], {}) for i in order]
    learner = new_learner(*create_model(ModelConfig(pools.names, TextConfig())), LearnerConfig())
    items: list[Item] = []
    for start in tqdm(range(0, len(examples) + len(further), 256), desc=source.table, disable=None):
        items += learner.items([*examples, *further][start : start + 256])
    return items[: len(examples)], items[len(examples) :]


def run_splits(
    items: Sequence[Item], unseen: Sequence[Item], count: int, splits: int, args: argparse.Namespace
) -> list[Split]:
    count = min(count, len(items))
    begin = (items, unseen)
    with ProcessPoolExecutor(args.processes, get_context("fork"), _set_items, begin) as pool:
        return list(tqdm(pool.map(one_split, repeat(count), range(splits)), total=splits, disable=None))


_items: tuple[Sequence[Item], Sequence[Item]] = ((), ())
_untrained: list[tuple[Estimator, Tokenizer]] = []


def _set_items(items: Sequence[Item], unseen: Sequence[Item]) -> None:
    global _items
    _items = items, unseen
    torch.set_num_threads(1)
    _untrained[:] = [create_model(ModelConfig(POOLS, TextConfig()))]


def one_split(count: int, seed: int) -> Split:
    """Fits on `count` random questions as `fit` does, and measures what it promises on the others."""
    items, further = _items
    order = np.random.default_rng(seed).permutation(len(items))
    chosen, rest = [items[i] for i in order[:count]], [items[i] for i in order[count:]]
    learner = new_learner(*_untrained[0], LearnerConfig())
    learner.fit_statistics(chosen)
    learner.settle()
    folds = SMALL_FOLDS if count < MANY_EXAMPLES else LARGE_FOLDS
    foldings = [np.random.default_rng([seed, 1]).permutation(count) % folds]
    held_out, _ = fit_linear(learner.model, chosen, foldings)
    labels = {"quality": np.array([item.quality for item in chosen])}
    labels["token_confidence"] = np.full_like(labels["quality"], np.nan)
    calibrated = calibrate(held_out[0].full, held_out[0].cheap, labels, np.ones(count), POOLS)
    quality, other = (
        calibrate_quality(calibrated.stages["full"], learner.predict(of)[0]) if of else np.zeros((0, 2))
        for of in (rest, further)
    )
    sure = confidence(other if further else quality, "gain")[:, 0]
    realised = [float((sure < calibrated.threshold("gain", large_share=wanted)).mean()) for wanted in WANTED]
    measured = [calibrated.large_share("gain", threshold) for threshold in THRESHOLDS]
    low, high = zip(*(share_interval(share, count / DESIGN_EFFECT) for share in measured), strict=True)
    observed = np.array([item.quality for item in rest]).reshape(-1, 2)
    errors = [calibration_error(quality[:, k], observed[:, k])["debiased"] for k in range(2)]
    fresh = [float((sure < threshold).mean()) for threshold in THRESHOLDS]
    return Split(*(np.array(values) for values in (realised, measured, low, high, fresh, errors)))


def share_row(name: str, count: int, splits: Sequence[Split]) -> tuple[str, ...]:
    error = np.array([split.realised for split in splits]) - np.array(WANTED)
    mean = float(np.abs(error).mean())
    aim = AIM_ERROR.get(count)
    verdict = "" if aim is None else f"{aim:.0%}, {'met' if mean <= aim else 'MISSED'}"
    cells = [f"{100 * error[:, i].mean():+.1f} ± {100 * error[:, i].std():.1f}" for i in range(len(WANTED))]
    return (name, str(count), *cells, f"{100 * mean:.1f}", verdict)


def interval_row(name: str, count: int, splits: Sequence[Split]) -> tuple[str, ...]:
    low, high, fresh = (np.array([getattr(split, of) for split in splits]) for of in ("low", "high", "fresh"))
    holds = (low <= fresh) & (fresh <= high)
    verdict = "met" if AIM_COVERAGE[0] <= holds.mean() <= AIM_COVERAGE[1] else "MISSED"
    cells = [f"{share:.0%}" for share in holds.mean(0)]
    return (name, str(count), *cells, f"{holds.mean():.1%}", f"{100 * (high - low).mean():.1f}", verdict)


def calibration_row(name: str, count: int, splits: Sequence[Split]) -> tuple[str, ...]:
    errors = np.array([split.calibration for split in splits])
    verdict = "met" if errors.mean(0).max() <= AIM_CALIBRATION else "MISSED"
    return (name, str(count), *(f"{error:.3f}" for error in errors.mean(0)), verdict)


def page(
    rows: Sequence[Sequence[str]],
    intervals: Sequence[Sequence[str]],
    calibrations: Sequence[Sequence[str]],
    splits: int,
    minutes: float,
) -> str:
    wanted = [f"wanted {share:.0%}" for share in WANTED]
    parts = [
        "# Shares, intervals and calibration on unseen questions",
        f"`python benchmarks/thresholds.py --data DIR --out benchmarks/results/thresholds.md --splits {splits}`",
        METHOD,
        "## The share that a threshold gives",
        "Realised share less wanted share in points, mean ± deviation over splits, and the mean absolute error.",
        table(rows, ("table, large model; unseen prompts", "labels", *wanted, "mean absolute error", "aim")),
        "## The printed interval of the share",
        "How often the 95% interval holds the share of unseen prompts, by threshold, and its mean width in points.",
        table(
            intervals,
            ("table, large model; unseen prompts", "labels", *map(str, THRESHOLDS), "all", "width", "aim 92 to 98%"),
        ),
    ]
    if calibrations:
        parts += [
            "## Calibrated qualities",
            "Debiased calibration error on the rest of the table, 10 bins of equal mass, mean over"
            f" {SPLITS_OF_MANY} splits.",
            table(
                calibrations,
                ("table, large model; unseen prompts", "labels", "small", "large", f"aim {AIM_CALIBRATION}"),
            ),
        ]
    return "\n\n".join([*parts, f"Made in {minutes:.0f} minutes."]) + "\n"


METHOD = """\
Each split fits on random questions of the table alone, under the rule gain. The unseen prompts stand behind the
semicolon: at most 2,000 training prompts of the same source, or the rest of the table (of MMLU's, 5,000 random rows are
used). MATH's are of level 5 with a whole number as answer, as the table's are; they still are another mix, with more
geometry, and the difference between its rows shows what that costs.
Intervals are tested where five unseen prompts or more for each label measure the realised share, and where splits draw
at most half of a table: with 700 of 769 they are nearly the same fit."""


if __name__ == "__main__":
    sys.exit(main())
