"""Figures computed from the runs' results. Pure.

Shapes: S seeds, B blocks after the switch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.depo.figures import interval
from benchmarks.replay.score import Array, windows
from depo_gateway.training.evaluation.routing_metrics import apgr, measure_apgr

Run = Mapping[str, Any]
EVERY = 20  # requests between two points of a plotted share


def runs_from(runs: Sequence[Run], start: str) -> list[Run]:
    """The runs on MMLU from one initial checkpoint; the first part of a switch is a cold start."""
    wanted = {"cold": ("cold", "switch"), "general": ("general",)}[start]
    return [run for run in runs if run["scenario"] in wanted]


def label_counts(runs: Sequence[Run]) -> list[int]:
    return sorted({version["labels"] for run in runs for version in run["versions"] if version["phase"] == "before"})


def at_labels(runs: Sequence[Run], labels: int, name: str) -> list[float]:
    """One number of the version served after so many labels (0: the start), by run."""
    return [
        run["start"]["mmlu"][name]
        if labels == 0
        else next(v["mmlu"][name] for v in run["versions"] if v["labels"] == labels and v["phase"] == "before")
        for run in runs
    ]


def mean_text(values: Sequence[float], digits: int = 3) -> str:
    """The mean over seeds with its 95% interval."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def signed_mean_text(values: Sequence[float]) -> str:
    """The same with a sign."""
    mean, low, high = interval(values)
    return f"{mean:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(values) > 1 else "")


def pooled(runs: Sequence[Run], block: int) -> dict[str, tuple[float, float, float]] | None:
    """APGR (point, low, high), 95% over questions, of what decided a block after the switch, of prompt length, and the
    paired difference.

    All seeds' questions together, each scored by the version that decided it, minus that seed's mean score, because the
    level of a version's scores does not order the questions of its seed.
    """
    rows = [run["switch"][block] for run in runs]
    if any("gain" not in row for row in rows):
        return None
    gain = np.concatenate([np.array(row["gain"]) - np.mean(row["gain"]) for row in rows])
    right: Array = np.concatenate([np.array(row["right"], float) for row in rows])
    length = np.concatenate([np.array(row["length"], float) for row in rows])
    found = measure_apgr({"gain": gain, "length": length}, right[:, 0], right[:, 1])
    intervals = {name: (one.apgr, one.low, one.high) for name, one in found.items()}
    gain_over = found["gain"]
    return intervals | {"over": (gain_over.difference, gain_over.difference_low, gain_over.difference_high)}


def by_seed(runs: Sequence[Run], block: int) -> list[float]:
    """APGR of what decided a block after the switch."""
    values = []
    for run in runs:
        row = run["switch"][block]
        right = np.array(row["right"], float)
        values.append(apgr(np.array(row["gain"]), right[:, 0], right[:, 1]))
    return values


def share_curve(run: Run, size: int) -> tuple[Array, Array]:
    """(number of the window's last request, its large share), every EVERY requests."""
    share = windows(np.array(run["stream"]["large"], bool), size)
    ends = np.arange(size, size + len(share))
    return ends[::EVERY].astype(float), share[::EVERY]


def advantage_curve(run: Run, size: int) -> tuple[Array, Array]:
    """(requests since the switch at the window's end, quality over random routing's at the same share in the window).

    Only questions that no version had learned count: after the switch, those asked for the first time.
    """
    stream = run["stream"]
    requests = zip(stream["phase"], stream["first"], strict=True)
    new = np.array([phase == "before" or bool(first) for phase, first in requests], bool)
    large, small_right, large_right = (
        np.array(stream[name], float)[new] for name in ("large", "small_right", "large_right")
    )
    served = np.where(large > 0, large_right, small_right)
    means = [moving(values, size) for values in (served, large, small_right, large_right)]
    over = means[0] - (means[1] * means[3] + (1 - means[1]) * means[2])
    since = np.arange(size, size + len(over)) - stream["phase"].count("before")
    plotted = since % EVERY == 0  # so that runs have the same points
    return since[plotted].astype(float), over[plotted]


def moving(values: Array, size: int) -> Array:
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((total[size:] - total[:-size]) / size)


def compact(run: Run) -> dict[str, Any]:
    """A run without its request-by-request stream."""
    return {name: value for name, value in run.items() if name != "stream"}
