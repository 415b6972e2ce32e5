"""The simulated benchmark's tables and plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.depo.catalog import TITLES, parse
from benchmarks.depo.figures import at, interval, ratio
from depo_gateway.training.evaluation.markdown import table

Row = dict[str, Any]
Runs = dict[str, dict[int, Row]]  # by method and seed
READING = "## Reading"
NAMES = {"gsm8k": "GSM8K", "mixed": "GSM8K and MATH level 5"}


def report(results: Mapping[str, Sequence[Row]], ceilings: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Write the Markdown file `path`, and a plot of the same name beside it.

    The section Reading, which is written by hand, stays.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    reading = old[old.index(READING) :] if READING in old else ""
    by_domain = {name: by_method_and_seed(runs) for name, runs in results.items()}
    parts = [heading(by_domain, path)]
    for name, runs in by_domain.items():
        any_run = next(iter(runs["grpo"].values()))
        train, held_out = any_run["questions"]
        parts += [
            f"## {NAMES[name]}",
            f"{train + held_out} questions, {held_out} of them held out, {any_run['models']} models,"
            f" {any_run['config']['target']} informative groups.",
            table(*costs(runs)),
            f"Predictors of informative questions: AUROC on the {held_out} held-out ones, mean over the run:",
            table(*predictors(runs)),
            "Upper limits: ridge regression on the same encoder's embeddings, fitted on the exact pass rates of four"
            " fifths of all questions, AUROC on the last fifth (five folds), beside predictors that need no fit:",
            table(*ceiling(ceilings[name])),
        ]
    parts += [f"![completions and informative groups]({path.stem}.png)"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n" + (f"\n{reading}" if reading else ""), encoding="utf-8")
    draw(by_domain, path.with_suffix(".png"))


def heading(by_domain: Mapping[str, Runs], path: Path) -> str:
    run = next(iter(next(iter(by_domain.values()))["grpo"].values()))
    seeds = sorted({seed for runs in by_domain.values() for by_seed in runs.values() for seed in by_seed})
    config = run["config"]
    return (
        "# Choosing prompts by their words: a policy simulated by real models' outcomes\n\n"
        f"`python -m benchmarks.depo.simulated --data DIR --report {path}`; seeds {', '.join(map(str, seeds))}, each"
        " with its own split, order and draws; means with 95% intervals over seeds (Student's t), comparisons paired"
        " by seed.\n\n"
        "Models are ranked by accuracy; at strength s the policy's pass rate of a question is the mean of their real"
        f" outcomes, weighted by a Gaussian of {config['width']:g} ranks around the s-th. s rises from 0 to 1 by 1 /"
        f" {config['target']} with each informative group learned from (one whose {config['group_size']} rewards are"
        " not all equal: the others have no gradient), so all methods meet the same policies in the same order and"
        " differ in what each stretch costs. It says nothing of how good a gradient is, only whether there is one."
        f" {config['need']} prompts a step. All rollouts are counted, warm-up, exploration and Polaris's first"
        " measurement included. The estimator is MiniLM (5 layers, frozen: training it takes too long) under DEPO's"
        " trunk, the same for all DEPO rows. These models report no token log-probabilities, so distillation has no"
        " labels, and DEPO without ranking is DEPO without both. The oracle knows the pass rates of the moment and"
        " takes, in order, the prompts that are more likely than not to be informative."
    )


def by_method_and_seed(results: Sequence[Row]) -> Runs:
    runs: Runs = defaultdict(dict)
    for result in results:
        runs[result["method"]][result["seed"]] = result
    return dict(runs)


def name_of(method: str) -> str:
    return "memory alone (DEPO plus, untrained)" if parse(method)[1] else TITLES[method]


def costs(runs: Runs) -> tuple[list[list[str]], tuple[str, ...]]:
    rows = []
    for method, by_seed in runs.items():
        mine = list(by_seed.values())
        rows.append(
            [
                name_of(method),
                show([run["books"]["completions"][-1] / run["books"]["learned"][-1] for run in mine], 1),
                against_grpo(runs["grpo"], by_seed, lambda run: len(run["books"]["learned"]) - 1),
                show([1 - run["informative"] / run["generated"] for run in mine], 2),
                f"{np.mean([run['passes'] for run in mine]):.0f}",
                against_grpo(runs["grpo"], by_seed, lambda run: run["first_pass"] or len(run["books"]["learned"]) - 1),
                f"{np.mean([run['books']['learned'][run['first_pass'] or -1] for run in mine]):.0f}",
                f"{np.mean([run['cpu_seconds'] for run in mine]):.0f}",
            ]
        )
    return rows, (
        "method", "completions an informative group", "completions / GRPO's", "zero-advantage share", "passes",
        "first pass alone / GRPO's", "informative groups by its end", "CPU s",
    )  # fmt: skip


def against_grpo(grpo: Mapping[int, Row], mine: Mapping[int, Row], end: Callable[[Row], int]) -> str:
    """Completions up to step `end` relative to those of GRPO for as many informative groups."""
    shared = sorted(set(grpo) & set(mine))
    spent, theirs = [], []
    for seed in shared:
        books, other, step = mine[seed]["books"], grpo[seed]["books"], end(mine[seed])
        # the last step may pass GRPO's end by a few groups
        learned = np.array([min(books["learned"][step], other["learned"][-1])])
        spent.append(float(books["completions"][step]))
        theirs.append(float(at(other["learned"], other["completions"], learned)[0]))
    return shown(ratio(spent, theirs), 2)


def predictors(runs: Runs) -> tuple[list[list[str]], tuple[str, ...]]:
    keys = [key for key in next(iter(runs["grpo"].values()))["history"][0] if key.startswith("held_out_length")]
    suffixes = [key.removeprefix("held_out_length") for key in keys]
    rows = []
    if "held_out_source" in next(iter(runs["grpo"].values()))["history"][0]:
        means = [mean_of(run, "held_out_source") for run in runs["grpo"].values()]
        rows.append(["which set it is from", show(means, 3), *[""] * len(suffixes[1:]), "", ""])
    rows.append(["prompt length", *(show([mean_of(r, key) for r in runs["grpo"].values()], 3) for key in keys), "", ""])
    for method, by_seed in runs.items():
        mine = list(by_seed.values())
        if "held_out_text" not in mine[0]["history"][0]:
            continue
        cells = [show([mean_of(run, f"held_out_text{suffix}") for run in mine], 3) for suffix in suffixes]
        chosen = [show([mean_of(run, key) for run in mine], 3) for key in ("when_chosen", "error")]
        rows.append([name_of(method), *cells, *chosen])
    header = ["all", *(f"within {suffix[1:]}" for suffix in suffixes[1:])]
    return rows, ("predictor", *header, "on prompts when chosen", "error of the pass rate, held out")


def mean_of(run: Row, key: str) -> float:
    values = [row[key] for row in run["history"] if row.get(key) is not None]
    return float(np.mean(values)) if values else math.nan


def ceiling(rows: Sequence[Row]) -> tuple[list[list[str]], tuple[str, ...]]:
    names = list(rows[0])
    return [[f"{row[name]:.3f}" if name != "strength" else f"{row[name]:g}" for name in names] for row in rows], tuple(
        names
    )


def show(values: Sequence[float], digits: int) -> str:
    return shown(interval(values), digits)


def shown(value: tuple[float, float, float], digits: int) -> str:
    mean, low, high = value
    if math.isnan(mean):
        return ""
    text = f"{mean:.{digits}f}"
    return text if math.isnan(low) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def draw(by_domain: Mapping[str, Runs], path: Path) -> None:
    """Completions against informative groups, means over seeds, and where each method's first pass ended."""
    figure, axes = plt.subplots(1, len(by_domain), figsize=(7 * len(by_domain), 5.5), squeeze=False)
    colours = matplotlib.colormaps["tab10"]
    for axis, (domain, runs) in zip(axes[0], by_domain.items(), strict=True):
        for number, (method, by_seed) in enumerate(runs.items()):
            mine = list(by_seed.values())
            learned = np.linspace(0, mine[0]["config"]["target"], 101)
            spent = np.mean([at(run["books"]["learned"], run["books"]["completions"], learned) for run in mine], axis=0)
            axis.plot(learned, spent, color=colours(number % 10), label=name_of(method))
            ended = float(np.mean([run["books"]["learned"][run["first_pass"] or -1] for run in mine]))
            axis.plot(ended, np.interp(ended, learned, spent), "o", color=colours(number % 10), markersize=5)
        axis.set_title(NAMES[domain])
        axis.set_xlabel("informative groups learned from (dots: end of the first pass)")
        axis.set_ylabel("completions generated")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
