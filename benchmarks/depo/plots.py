"""The benchmark's plots, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.depo.catalog import TITLES
from benchmarks.depo.figures import STUDENT, at, smoothed

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
Value = Callable[[Mapping[str, Any]], float]
BOLD = ("grpo", "dapo", "depo", "depo-plus")
COLOURS = {name: matplotlib.colormaps["tab20"](number) for number, name in enumerate(TITLES)}
PHASES = ("generate", "reward", "update", "choose", "observe")


def draw(runs: Runs, out: Path) -> None:
    estimated = {name: by_seed for name, by_seed in runs.items() if name.startswith("depo")}
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.5))
    lines(axes[0], runs, "completions", lambda row: row["accuracy"], smooth=True, band=True)
    lines(axes[1], runs, "tokens", lambda row: row["accuracy"], smooth=True)
    labelled(axes[0], "completions generated (bands: 95% of GRPO, DAPO, DEPO, DEPO plus)", "held-out pass@1")
    labelled(axes[1], "completion tokens generated", "held-out pass@1")
    save(figure, out / "curves.png")
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.5))
    lines(axes[0], runs, "completions", lambda row: row["generated_right"] + row["generated_wrong"], first=1)
    lines(axes[1], runs, "completions", lambda row: row["learned"], first=1)
    labelled(axes[0], "completions generated", "zero-advantage share of generated groups")
    labelled(axes[1], "completions generated", "informative groups in a step's update")
    save(figure, out / "groups.png")
    figure, axes = plt.subplots(1, 3, figsize=(18, 5))
    for axis, name in zip(axes, ("auroc_informative", "auroc_difficulty"), strict=False):
        lines(axis, estimated, "completions", lambda row, name=name: row.get(name, np.nan), first=1)  # type: ignore[misc]
        labelled(axis, "completions generated", name.replace("_", " of ").replace("auroc", "AUROC") + ", held out")
    lines(axes[2], estimated, "completions", lambda row: row.get("predicted", np.nan), first=1)
    lines(axes[2], estimated, "completions", lambda row: row.get("actual", np.nan), first=1, style=":", legend=False)
    labelled(axes[2], "completions generated", "mean reward of chosen prompts: predicted (line), actual (dots)")
    save(figure, out / "estimator.png")
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(runs) + 1.5))
    left = np.zeros(len(runs))
    means = np.array([np.mean([spent(result) for result in by_seed.values()], axis=0) for by_seed in runs.values()])
    for phase, seconds in zip(PHASES, means.T, strict=True):
        axis.barh([title_of(name) for name in runs], seconds, left=left, label=phase)
        left += seconds
    axis.invert_yaxis()
    labelled(axis, "CPU seconds a run", "")
    save(figure, out / "phases.png")


def spent(result: Mapping[str, Any]) -> list[float]:
    """CPU seconds of a run by phase, without those of the oracle's free rollouts."""
    seconds = result["history"][-1]["seconds"]
    return [seconds[phase] - (seconds["oracle"] if phase == "observe" else 0.0) for phase in PHASES]


def lines(
    axis: Axes,
    runs: Runs,
    x: str,
    value: Value,
    smooth: bool = False,
    band: bool = False,
    first: int = 0,
    style: str = "-",
    legend: bool = True,
) -> None:
    """One line for each method, the mean over seeds at the same x."""
    for name, by_seed in runs.items():
        histories = [result["history"][first:] for result in by_seed.values()]
        grid = np.linspace(
            max(history[0][x] for history in histories), min(history[-1][x] for history in histories), 60
        )
        curves = []
        for history in histories:
            y = [float(value(row)) for row in history]
            curves.append(at([row[x] for row in history], smoothed(y) if smooth else y, grid))
        mean = np.mean(curves, axis=0)
        bold = name in BOLD
        colour = COLOURS.get(name.partition("@")[0])
        axis.plot(grid, mean, style, color=colour, lw=2.2 if bold else 1.2, label=title_of(name) if legend else None)
        if band and bold and len(curves) > 1:
            half = STUDENT.get(len(curves) - 1, 1.96) * np.std(curves, axis=0, ddof=1) / np.sqrt(len(curves))
            axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, lw=0)


def title_of(method: str) -> str:
    kind, at_sign, settings = method.partition("@")
    return TITLES.get(kind, kind) + (f" ({settings})" if at_sign else "")


def labelled(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
