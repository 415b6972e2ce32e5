"""Markdown of reports: tables, and figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depo_gateway.training.evaluation.routing_metrics import ApgrEstimate


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, its columns padded so that it is readable on a terminal too."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    """A cell's text, without what would end the cell or the row."""
    return " ".join(str(value).split()).replace("|", "\\|")


def with_interval(point: float, low: float, high: float, sign: str = "") -> str:
    """ "0.712 [0.690, 0.731]"; with sign "+", of a difference."""
    return f"{point:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


APGR_HEADER = ("routing by", "APGR", "95% interval", "against prompt length, paired")


def apgr_rows(estimates: Mapping[str, ApgrEstimate]) -> list[tuple[str, str, str, str]]:
    """Every score's APGR with its interval, and its paired difference from prompt length; cells of APGR_HEADER."""
    rows = [("random", "0.500", "", "")]
    for name, of in estimates.items():
        against = "" if name == "length" else with_interval(of.difference, of.difference_low, of.difference_high, "+")
        shown = "prompt length" if name == "length" else name
        rows.append((shown, f"{of.apgr:.3f}", f"[{of.low:.3f}, {of.high:.3f}]", against))
    return rows


def apgr_table(estimates: Mapping[str, ApgrEstimate]) -> str:
    """The rows as a Markdown table."""
    return table(apgr_rows(estimates), APGR_HEADER)
