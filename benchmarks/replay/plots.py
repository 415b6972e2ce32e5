"""The replay's plots, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.depo.figures import interval
from benchmarks.replay.figures import Run, advantage_curve, at_labels, label_counts, runs_from, share_curve
from benchmarks.replay.questions import POOLS

WINDOW, NARROW = 2000, 250
COLOURS = {"cold": "tab:blue", "general": "tab:orange"}


def draw(runs: Sequence[Run], out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    learning(axes[0], runs)
    calibration(axes[1], runs_from(runs, "cold"))
    save(figure, out / "learning.png")
    switched = [run for run in runs if "switch" in run]
    if switched:
        figure, axes = plt.subplots(1, 2, figsize=(13, 5))
        shares(axes[0], switched)
        advantages(axes[1], switched)
        save(figure, out / "switch.png")


def learning(axes: Axes, runs: Sequence[Run]) -> None:
    for start, colour in COLOURS.items():
        mine = runs_from(runs, start)
        if not mine:
            continue
        counts = [0, *label_counts(mine)]
        found = np.array([interval(at_labels(mine, count, "apgr")) for count in counts])
        axes.plot(counts, found[:, 0], color=colour, marker="o", label=f"{start} start")
        axes.fill_between(counts, found[:, 1], found[:, 2], color=colour, alpha=0.2, linewidth=0)
    some = runs_from(runs, "cold") or list(runs)
    axes.axhline(float(np.mean(at_labels(some, 0, "length"))), color="grey", linestyle="--", label="prompt length")
    axes.axhline(0.5, color="black", linewidth=0.8, label="random")
    label_axes(axes, "labels seen (questions with both pools' outcomes)", "APGR of later MMLU questions")


def calibration(axes: Axes, runs: Sequence[Run]) -> None:
    if not runs:
        return
    counts = label_counts(runs)
    for name, colour in zip((*POOLS, "gain"), ("tab:green", "tab:red", "tab:purple"), strict=True):
        error = [interval(at_labels(runs, count, f"ece_{name}"))[0] for count in counts]
        chance = [interval(at_labels(runs, count, f"chance_{name}"))[0] for count in counts]
        axes.plot(counts, error, color=colour, marker="o", label=name)
        axes.plot(counts, chance, color=colour, linestyle=":", label=f"{name}, a perfect model's by chance")
    axes.axhline(0.03, color="black", linewidth=0.8)
    label_axes(axes, "labels seen (cold start)", "calibration error, 10 equally full bins")


def shares(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        axes.plot(*share_curve(run, WINDOW), linewidth=1, label=f"seed {run['seed']}")
    target = runs[0]["share"]["target"]
    axes.axhspan(target - 0.02, target + 0.02, color="grey", alpha=0.2)
    axes.axvline(run_length(runs), color="black", linewidth=0.8)
    axes.set_ylim(target - 0.08, target + 0.08)
    label_axes(
        axes, f"requests (line: MMLU becomes GSM8K); window of the last {WINDOW:,}", "large share (band: +-2 points)"
    )


def advantages(axes: Axes, runs: Sequence[Run]) -> None:
    curves = [dict(zip(*map(list, advantage_curve(run, NARROW)), strict=True)) for run in runs]
    for run, curve in zip(runs, curves, strict=True):
        axes.plot(list(curve), list(curve.values()), linewidth=0.7, alpha=0.5, label=f"seed {run['seed']}")
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    axes.plot(common, [np.mean([curve[x] for curve in curves]) for x in common], color="black", label="mean")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.axvline(0.0, color="black", linewidth=0.8)
    label_axes(
        axes,
        f"new questions since MMLU became GSM8K; window of {NARROW}",
        "quality over random routing at the same share",
    )


def run_length(runs: Sequence[Run]) -> float:
    """Requests before the switch, on average."""
    return float(np.mean([run["stream"]["phase"].count("before") for run in runs]))


def label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
