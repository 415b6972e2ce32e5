"""Benchmark of what `depo-train fit` does against version 0.1's recipe, on the same questions.

    python benchmarks/recipes.py --data DIR --out benchmarks/results/recipes.md [--processes 2]

DIR/outcomes holds outcome tables, as JSON lines. A part of a table is held out; each recipe is fitted to the rest, as
`fit` does it, with its own cross-validation and calibration, and what would be served predicts the part. Version 0.1's
recipe is SGD epochs on the same encoder, n-grams and surface features; today's is Newton's method, with similarities to
fitted prompts, and with --groups the groups.

Shapes: N prompts, K pools.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import calibrate_quality
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import Estimator, ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.similarity import usual_centres
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.markdown import table, with_interval
from depo_gateway.training.evaluation.routing_metrics import ApgrEstimate, centre_by_fold, measure_apgr, routing_scores
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import EPOCH_FOLDS, fit_heads
from depo_gateway.training.fitting.epoch_fit import fit_epochs, new_learner
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.foldings import foldings_of, groups_of, questions_of
from depo_gateway.training.outcomes.known_groups import known_groups
from depo_gateway.training.outcomes.table import examples_of, folds_of, parse_pools, read_table

POOLS = ("small", "large")
MIXTRAL_GPT4 = ["small=mistralai/Mixtral-8x7B-Instruct-v0.1", "large=gpt-4-1106-preview"]
FOLDS = 5  # of a table, and of each fit's own cross-validation
FEW = 1500
OLD, NEW, GROUPS = "version 0.1", "today", "today, --groups"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. Each division is a list of (fitted rows, held-out rows)."""

    name: str
    table: str
    divisions: int
    by_group: bool = False
    few: bool = False  # FEW random prompts are fitted, all others are held out
    recipes: tuple[str, ...] = (OLD, NEW)
    aims: tuple[float, ...] = (0.0,)  # of each recipe but the first: the least difference from it


CASES = (
    Case("MMLU, questions held out", "mmlu_mixtral_gpt4", 1, recipes=(OLD, NEW, GROUPS), aims=(0.02, 0.03)),
    Case("MMLU, whole subjects held out", "mmlu_mixtral_gpt4", 2, by_group=True, aims=(0.03,)),
    Case("MMLU, 1,500 labels", "mmlu_mixtral_gpt4", 3, few=True, recipes=(OLD, NEW, GROUPS), aims=(0.02, 0.02)),
    Case("GSM8K, questions held out", "gsm8k_mixtral_gpt4", 2),
)

METHOD = """\
APGR of `gain`; random is 0.5. Each row's recipes predict the same held-out prompts, and see none of them: penalty,
epochs and calibration come from a cross-validation of {folds} folds within the fitted part. Questions are held out in
{folds} folds, subjects too (whole ones), in one to three divisions; of 1,500 labels each division is another draw,
measured on all other prompts. APGR is that of all folds' predictions together (where questions are held out, with
each fold's mean subtracted), then the mean of the divisions. Brackets: 95% bootstrap intervals over prompts, or over
subjects where these are held out; divisions are resampled as one. Differences are paired."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with outcomes/*.jsonl")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    started = time.monotonic()
    tables = {
        name: examples_of(list(read_table(args.data / "outcomes" / f"{name}.jsonl")), parse_pools(MIXTRAL_GPT4))
        for name in {case.table for case in CASES}
    }
    items = {name: read_items(examples) for name, examples in tables.items()}
    jobs = [
        (number, recipe, division, part)
        for number, case in enumerate(CASES)
        for recipe in case.recipes
        for division in range(case.divisions)
        for part in range(len(parts_of(case, tables[case.table], division)))
    ]
    predicted: dict[tuple[int, str, int], Array] = {}
    with ProcessPoolExecutor(args.processes, get_context("fork"), _share, (tables, items)) as pool:
        for job, found in zip(jobs, tqdm(pool.map(one_fit, jobs), total=len(jobs), disable=None), strict=True):
            number, recipe, division, _ = job
            into = predicted.setdefault((number, recipe, division), np.full((len(found), len(POOLS)), np.nan))
            np.copyto(into, found, where=~np.isnan(found))
    lines = [
        line
        for number, case in enumerate(CASES)
        for line in lines_of(
            case,
            tables[case.table],
            {(recipe, division): quality for (of, recipe, division), quality in predicted.items() if of == number},
        )
    ]
    text = page(lines, (time.monotonic() - started) / 60)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def untrained(recipe: str, examples: Sequence[Example]) -> tuple[Estimator, Tokenizer]:
    """The model of a recipe for examples to be fitted."""
    if recipe == OLD:
        return create_model(ModelConfig(POOLS, TextConfig()))
    groups = known_groups(examples) if recipe == GROUPS else ()
    return create_model(ModelConfig(POOLS, TextConfig(), groups=groups, centres=usual_centres(len(examples))))


def read_items(examples: Sequence[Example]) -> list[Item]:
    """The prompts with the embeddings of today's recipe, of which the first half is version 0.1's."""
    learner = new_learner(*untrained(NEW, examples), LearnerConfig())
    items: list[Item] = []
    for start in tqdm(range(0, len(examples), 512), desc="read prompts", disable=None):
        items += learner.items(examples[start : start + 512])
    return items


_tables: dict[str, Sequence[Example]] = {}
_items: dict[str, Sequence[Item]] = {}


def _share(tables: dict[str, Sequence[Example]], items: dict[str, Sequence[Item]]) -> None:
    """For a forked process: what all jobs read."""
    torch.set_num_threads(1)
    _tables.update(tables)
    _items.update(items)


def parts_of(
    case: Case, examples: Sequence[Example], division: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(fitted, held-out) rows of each part of a division."""
    if case.few:
        order = np.random.default_rng(division).permutation(len(examples))
        return [(np.sort(order[:FEW]), np.sort(order[FEW:]))]
    folds = folds_of_case(case, examples, division)
    return [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(FOLDS)]


def folds_of_case(case: Case, examples: Sequence[Example], division: int) -> NDArray[np.int64]:
    units = groups_of(examples) if case.by_group else questions_of(examples)
    return folds_of(units, FOLDS, 100 + division)


def one_fit(job: tuple[int, str, int, int]) -> Array:
    """Qualities (N, K) of one part's held-out prompts; NaN for the others."""
    number, recipe, division, part = job
    case = CASES[number]
    examples, items = _tables[case.table], _items[case.table]
    fitted, held_out = parts_of(case, examples, division)[part]
    own = [examples[i] for i in fitted.tolist()]
    model, tokenizer = untrained(recipe, own)
    learner = new_learner(model, tokenizer, LearnerConfig())
    train, test = (for_model(learner, [items[i] for i in rows.tolist()], examples, rows) for rows in (fitted, held_out))
    foldings = foldings_of(own, EPOCH_FOLDS if recipe == OLD else FOLDS, 0)
    if recipe == OLD:

        def start() -> Learner:
            return new_learner(model, tokenizer, LearnerConfig())

        learner, predictions, _ = fit_epochs(start, train, foldings, FitConfig())
    else:
        predictions = list(fit_heads(learner, train, foldings).held_out)
    labels = labels_by_head(own, POOLS)
    calibrated = calibrate(predictions[0].full, predictions[0].cheap, labels, np.ones(len(own)), POOLS)
    full, _ = learner.predict(test)
    quality = np.full((len(examples), len(POOLS)), np.nan)
    quality[held_out] = calibrate_quality(calibrated.stages["full"], full)
    return quality


def for_model(
    learner: Learner, items: Sequence[Item], examples: Sequence[Example], rows: NDArray[np.int64]
) -> list[Item]:
    """The items as this model reads them."""
    config = learner.model.config
    groups = {name: number for number, name in enumerate(config.groups)}
    width = 2 * learner.model.width if config.centres else learner.model.width
    return [
        replace(
            item,
            embedding=None if item.embedding is None else item.embedding[:width],
            group=groups.get(examples[row].task, -1),
        )
        for item, row in zip(items, rows.tolist(), strict=True)
    ]


def lines_of(case: Case, examples: Sequence[Example], predicted: dict[tuple[str, int], Array]) -> list[list[str]]:
    """The case's rows of the table: random, length, and each recipe."""
    divisions = range(case.divisions)
    observed = labels_by_head(examples, POOLS)["quality"]
    length = np.array([len(example.prompt) for example in examples], float)
    measured: list[dict[str, ApgrEstimate]] = []
    for division in divisions:
        rows = np.flatnonzero(~np.isnan(predicted[OLD, division][:, 0]) & ~np.isnan(observed).any(1))
        scores = {"prompt length": length[rows]}
        for recipe in case.recipes:
            gain = routing_scores(predicted[recipe, division][rows])["gain"]
            if not (case.few or case.by_group):
                gain = centre_by_fold(gain, folds_of_case(case, examples, division)[rows])
            scores[recipe] = gain
        names = [groups_of(examples)[row] for row in rows]
        groups = np.unique(names, return_inverse=True)[1] if case.by_group else None
        measured.append(measure_apgr(scores, observed[rows, 0], observed[rows, -1], OLD, groups))
    lines = [[case.name, "random", "0.500", "", "", ""]]
    aims = dict(zip(case.recipes[1:], case.aims, strict=True))
    for name in ("prompt length", *case.recipes):
        one = _mean([of[name] for of in measured])
        aim = aims.get(name)
        lines.append(
            [
                "",
                name,
                with_interval(one.apgr, one.low, one.high),
                "" if name == OLD else with_interval(one.difference, one.difference_low, one.difference_high, "+"),
                "" if aim is None else f"{aim:+.2f}" if aim else "not below",
                "" if aim is None else verdict(one, aim),
            ]
        )
    return lines


def _mean(estimates: Sequence[ApgrEstimate]) -> ApgrEstimate:
    """The mean of the divisions' figures and bounds: they share their prompts, so they don't narrow the interval."""
    fields = ("apgr", "low", "high", "difference", "difference_low", "difference_high")
    return ApgrEstimate(*(float(np.mean([getattr(one, field) for one in estimates])) for field in fields))


def verdict(one: ApgrEstimate, aim: float) -> str:
    """Whether a recipe reaches its aim, with the lower bound of its interval above 0."""
    if not aim:
        return "met" if one.difference_high >= 0 else "missed"
    if one.difference_low <= 0:
        return "missed: 0 is inside the interval"
    return "met" if one.difference >= aim else "better, but less than the aim"


def page(lines: Sequence[Sequence[str]], minutes: float) -> str:
    columns = ("held out", "recipe", "APGR", "against version 0.1, paired", "aim", "verdict")
    return "\n\n".join(
        [
            "# Recipes",
            "`python benchmarks/recipes.py --data DIR --out benchmarks/results/recipes.md`",
            METHOD.format(folds=FOLDS),
            table(lines, columns),
            f"Made in {minutes:.0f} minutes.\n",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
