"""The report in Markdown: the cost and accuracy of each method, and the machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.depo.figures import at, interval, reached, smoothed
from benchmarks.depo_trl.run import METHODS, PHASES
from depo_gateway.training.evaluation.markdown import table

Result = Mapping[str, Any]
Runs = Mapping[str, Sequence[Result]]  # method -> its seeds' results
TITLES = {"grpo": "GRPO", "dapo": "DAPO", "depo": "DEPO", "depo-plus": "DEPO plus"}
POINTS = 5  # points of the accuracy curve


def page(results: Sequence[Result], start: Mapping[str, Sequence[float]]) -> str:
    """The whole report. `start`: grade -> the starting policy's probabilities of a right answer."""
    by_method: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_method[result["method"]].append(result)
    runs = {method: by_method[method] for method in METHODS if by_method[method]}
    settings = dict(results[0]["settings"])
    parts = [
        f"# DEPO through TRL, policy {settings['policy']}",
        "Machine: " + "; ".join(dict.fromkeys(result["machine"] for result in results)) + ".",
        ", ".join(f"{name} {value}" for name, value in settings.items() if value not in ("", {}))
        + (f", {settings['extra']}" if settings["extra"] else "")
        + ".",
        "## Cost",
        "Means over seeds, with 95% intervals of the accuracy. All completions and tokens generated for training count,"
        " with warm-up, exploration and refills. Seconds do not include loading and evaluating.",
        costs(runs),
        "## Held-out accuracy over completions",
        curves(runs),
        "## To GRPO's final accuracy",
        *needs(runs),
        "## The start",
        "Probability that the starting policy gives exactly the right answer to held-out prompts, by grade.",
        grades(start),
    ]
    return "\n\n".join(parts) + "\n"


def costs(runs: Runs) -> str:
    rows = []
    for method, results in runs.items():
        last = [result["evaluations"][-1] for result in results]
        spent = [np.mean([row["seconds"][phase] for row in last]) for phase in PHASES]
        rows.append(
            [
                TITLES[method],
                ", ".join(str(result["seed"]) for result in results),
                f"{np.mean([row['completions'] for row in last]):,.0f}",
                f"{np.mean([row['tokens'] for row in last]):,.0f}",
                f"{sum(spent):.1f}",
                *(f"{seconds:.1f}" for seconds in spent),
                show(interval([row["accuracy"] for row in last])),
                f"{np.mean([zero_share(result) for result in results]):.2f}",
                f"{np.nanmean(rates):.2f}" if any(map(math.isfinite, rates := false_rejects(results))) else "-",
            ]
        )
    header = ("method", "seeds", "completions", "tokens", "seconds", *PHASES, "accuracy", "zero advantage")
    return table(rows, (*header, "false rejects"))


def zero_share(result: Result) -> float:
    """Share of all generated groups whose rewards are equal."""
    before, groups, zeros = 0, 0, 0.0
    for row in result["steps"]:
        count = row["completions"] - before
        groups, zeros, before = groups + count, zeros + count * row["depo/zero_advantage_share"], row["completions"]
    return zeros / groups


def false_rejects(results: Sequence[Result]) -> list[float]:
    """Share of the explored rejects that had an advantage, by seed; NaN where none was explored."""
    return [float(result["steps"][-1].get("depo/false_reject_rate", math.nan)) for result in results]


def curve(result: Result, unit: str) -> tuple[list[float], list[float]]:
    """(cost so far, accuracy) at each evaluation; `unit`: completions, tokens or seconds."""
    rows = result["evaluations"]
    costs = [sum(row["seconds"].values()) if unit == "seconds" else float(row[unit]) for row in rows]
    return costs, [row["accuracy"] for row in rows]


def curves(runs: Runs) -> str:
    """Accuracy at costs that every run reached, interpolated linearly between evaluations."""
    least = min(curve(result, "completions")[0][-1] for results in runs.values() for result in results)
    where = np.linspace(0, least, POINTS)
    rows = []
    for method, results in runs.items():
        values = np.mean([at(*curve(result, "completions"), where) for result in results], axis=0)
        rows.append([TITLES[method], *(f"{value:.3f}" for value in values)])
    return table(rows, ("method", *(f"{place:,.0f}" for place in where)))


def needs(runs: Runs) -> list[str]:
    """The cost of each method to reach the mean final accuracy of GRPO's runs, with smoothed curves."""
    if "grpo" not in runs:
        return ["No run of GRPO."]
    level = float(np.mean([smoothed(curve(result, "completions")[1])[-1] for result in runs["grpo"]]))
    rows = []
    for method, results in runs.items():
        cells = []
        for unit in ("completions", "tokens", "seconds"):
            found = []
            for result in results:
                cost, accuracy = curve(result, unit)
                found.append(reached(cost, smoothed(accuracy), level))
            there = [value for value in found if value is not None]
            mean = f"{np.mean(there):,.0f}" if there else "-"
            cells.append(mean if len(there) == len(found) else f"{mean} ({len(there)} of {len(found)} runs)")
        rows.append([TITLES[method], *cells])
    note = f"{level:.3f}, the mean over GRPO's seeds of the last two evaluations; curves are smoothed over three."
    return [note, table(rows, ("method", "completions", "tokens", "seconds"))]


def grades(start: Mapping[str, Sequence[float]]) -> str:
    rows = [[grade, len(values), f"{np.mean(values):.3f}"] for grade, values in start.items()]
    return table(rows, ("grade", "prompts", "chance"))


def show(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"
