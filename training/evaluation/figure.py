"""The figure of a report: mean quality over cost, or over the share of the last pool, for one rule and its baselines.

Each series has its own colour, dashes and marker, so that it is known in greyscale and by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

INK, GREY, ORANGE = "#0b3c6f", "#6b6b6b", "#c2570c"  # their lightness differs as well
NEAR_THE_RIGHT = 0.75  # names of points beyond stand to their left
MARKS_OF_SERIES = 7  # at most so many markers on a line
FIGURE_INCHES, DOTS = (6.2, 4.8), 140


@dataclass(frozen=True, slots=True)
class MarkedPoint:
    """A point of the figure with its name beside it."""

    x: float
    quality: float
    name: str
    marker: str  # matplotlib's
    filled: bool = True


@dataclass(frozen=True, slots=True)
class CurveFigure:
    """What the figure shows. `rows` are of report.json's sweep; without quality, their share over the threshold."""

    rule: str
    rows: Sequence[Mapping[str, Any]]
    points: Sequence[MarkedPoint]
    last: str  # the last pool's name
    ends: Sequence[tuple[float, float]] = ()  # x and quality of all to the first, and all to the last pool
    measured: bool = True

    @property
    def costed(self) -> bool:
        return self.measured and bool(self.rows) and "cost" in self.rows[0]


def draw_figure(figure: CurveFigure, png: Path) -> bytes:
    """Writes the picture to `png` and returns it as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context({"font.size": 12, "svg.hashsalt": "depo", "svg.fonttype": "path"}):
        drawn, axes = pyplot.subplots(figsize=FIGURE_INCHES, layout="constrained")
        if figure.measured:
            _draw_series(axes, figure)
            what = f"cost, of sending everything to {figure.last}"
            _draw_axes(axes, what if figure.costed else f"share of prompts to {figure.last}", "mean quality")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            x, y = _column(figure.rows, "threshold"), _column(figure.rows, "large_share")
            axes.plot(x, y, "-", color=INK, linewidth=2.2, label=f"rule {figure.rule}")
            _draw_axes(axes, "threshold", f"share of prompts to {figure.last}")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _draw_points(axes, figure.points)
        drawn.savefig(png, dpi=DOTS)
        svg = BytesIO()
        drawn.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        pyplot.close(drawn)
    return svg.getvalue()


def _draw_series(axes: Any, figure: CurveFigure) -> None:
    """Random, prompt length and the rule with its interval."""
    rows = figure.rows
    x = _column(rows, "cost" if figure.costed else "large_share")
    for name, label, color, style, marker in (
        ("coin", "random, same shares", GREY, (0, (5, 3)), None),
        ("length", "by prompt length", ORANGE, (0, (1, 1.6)), "^"),
        ("quality", f"rule {figure.rule}", INK, "-", "o"),
    ):
        at = _column(rows, f"{name}_cost") if figure.costed and name != "quality" else x
        values = np.array([row[name]["value"] for row in rows])
        if name != "quality":  # the rule may not reach the ends; its baselines do
            at, values = (np.concatenate([of, [end[i] for end in figure.ends]]) for i, of in enumerate((at, values)))
        order = np.argsort(at, kind="stable")
        axes.plot(
            at[order], values[order], color=color, linestyle=style, marker=marker, markersize=5,
            linewidth=2.2 if name == "quality" else 1.8, label=label, markevery=max(1, len(rows) // MARKS_OF_SERIES),
        )  # fmt: skip
        if name == "quality":
            low, high = (np.array([row[name][end] for row in rows])[order] for end in ("low", "high"))
            axes.fill_between(at[order], low, high, color=color, alpha=0.13, linewidth=0, label="95% interval")


def _draw_points(axes: Any, points: Sequence[MarkedPoint]) -> None:
    """Marked points, named above or below in turn from left to right, so that names keep apart."""
    for number, point in enumerate(sorted(points, key=lambda point: point.x)):
        above, left = number % 2 == 0, point.x > NEAR_THE_RIGHT or number % 2 == 0
        axes.plot(
            [point.x], [point.quality], point.marker, color=INK, markersize=11, markeredgewidth=2, linestyle="none",
            markerfacecolor=INK if point.filled else "white", zorder=5,
        )  # fmt: skip
        axes.annotate(
            point.name, (point.x, point.quality), (-12 if left else 12, 30 if above else -34),
            textcoords="offset points", ha="right" if left else "left", va="center", fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": INK, "shrinkB": 6}, zorder=6,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip


def _draw_axes(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xlim=(-0.03, 1.03))
    axes.margins(y=0.16)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, handlelength=3.2)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return np.array([row[name] for row in rows], float)
