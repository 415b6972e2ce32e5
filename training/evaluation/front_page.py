"""A report's first page from the figures of report.json: the answer, its conditions, a figure and two tables.

Each term is explained where it first stands. The numbers are those of report.json, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depo_gateway.estimator.calibration import RULES
from depo_gateway.training.evaluation.figure import CurveFigure, MarkedPoint
from depo_gateway.training.evaluation.headline import (
    FEW_PROMPTS,
    all_to,
    difference_text,
    kept_text,
    percent,
    points,
    threshold_text,
)
from depo_gateway.training.evaluation.markdown import APGR_HEADER, apgr_rows, with_interval
from depo_gateway.training.evaluation.page import Block, Heading, Paragraph, TableBlock
from depo_gateway.training.evaluation.routing_metrics import ApgrEstimate

SHOWN_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the last pool: the table has the thresholds nearest to these
UNKNOWN = "not known"
APGR_MEANS = (
    "APGR, average performance gap recovered: the area under quality over the large share, as a fraction of the gap"
    " between sending everything to {first} and to {last}. Random routing has 0.5; higher is better."
)


def curve_figure(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pools: Sequence[str]) -> CurveFigure:
    """The figure's content: the threshold in force and the cheaper one marked, and both ends."""
    name = f"{threshold_text(head['threshold'])} in force"
    if not head["measured"]:
        point = MarkedPoint(head["threshold"], head["in_force"]["large_share"], name, "o")
        return CurveFigure(head["rule"], rows, [point], pools[-1], measured=False)
    known = [row for row in rows if not np.isnan(row["quality"]["value"])]
    axis = "cost" if "cost" in head["in_force"] else "large_share"
    marked = [MarkedPoint(head["in_force"][axis], head["in_force"]["quality"]["value"], name, "o")]
    other = head["alternative"]
    if other is not None:
        marked.append(
            MarkedPoint(other[axis], other["quality"]["value"], threshold_text(other["threshold"]), "D", filled=False)
        )
    for end, pool, share in (("all_small", pools[0], 0.0), ("all_large", pools[-1], 1.0)):
        x = head[end]["cost"] if axis == "cost" else share
        marked.append(MarkedPoint(x, head[end]["quality"]["value"], f"all-{pool}", "s", filled=False))
    return CurveFigure(head["rule"], known, marked, pools[-1], [(end.x, end.quality) for end in marked[-2:]])


def figure_alt(head: Mapping[str, Any], pools: Sequence[str]) -> str:
    """The figure in words."""
    row = head["in_force"]
    if not head["measured"]:
        return (
            f"Share of prompts to {pools[-1]} over the threshold. Marked: threshold {threshold_text(head['threshold'])}"
            f" with {percent(row['large_share'])}. Quality could not be measured."
        )
    axis = "cost" if "cost" in row else "the share of the large pool"
    return (
        f"Mean quality over {axis} for rule {head['rule']}, prompt length and random routing. Marked: threshold"
        f" {threshold_text(head['threshold'])} with {percent(row['large_share'])} to {pools[-1]} and quality"
        f" {row['quality']['value']:.3f}; all-{pools[0]} {head['all_small']['quality']['value']:.3f};"
        f" all-{pools[-1]} {head['all_large']['quality']['value']:.3f}."
    )


UNMEASURED_CAPTION = "The share that each threshold gives; no quality could be measured."
FIGURE_CAPTION = (
    "Solid with circles: the rule, at every threshold; shaded: its 95% interval. Dotted with triangles: the longest"
    " prompts go up. Dashed: random. Large filled circle: the threshold in force; diamond: the other one named."
)


def threshold_blocks(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pools: Sequence[str]) -> list[Block]:
    """What other thresholds would do, with the terms of the table."""
    title = Heading(2, "What each threshold would do")
    if not head["measured"]:
        return [title, _unmeasured_table(head, rows, pools)]
    costed = "cost" in head["in_force"]
    header = ["routing", f"sent to {pools[-1]}", *(["cost"] if costed else [])]
    header += ["quality", "quality kept", "above random"]
    lines = [_end_cells(f"all-{pools[0]}", head["all_small"], "0%", costed)]
    marked = None
    for row in _shown_rows(head, rows):
        name = f"threshold {threshold_text(row['threshold'])}"
        if row["threshold"] == head["threshold"]:
            name, marked = f"{name}, in force", len(lines)
        elif head["alternative"] is not None and row["threshold"] == head["alternative"]["threshold"]:
            name = f"{name}, {head['alternative']['direction']}"
        cells = [name, percent(row["large_share"])]
        cells += [percent(row["cost"])] if costed else []
        quality = row["quality"]["value"]
        known = not np.isnan(quality)
        cells += [f"{quality:.3f}" if known else UNKNOWN, kept_text(row["kept_quality"]) or UNKNOWN]
        lines.append([*cells, difference_text(row["kept_above_random"]) or UNKNOWN])
    lines.append([*_end_cells(all_to(pools), head["all_large"], "100%", costed)[:-2], "100%", ""])
    cost = f"Cost: as a fraction of {all_to(pools)}'s. " if costed else ""
    terms = (
        f"{all_to(pools)}: every prompt goes to {pools[-1]}. {cost}Quality: the mean label, from 0 to 1. Quality kept:"
        f" as a fraction of {all_to(pools)}'s. Random: the same share of the prompts to each pool, chosen by chance;"
        " above random: points of quality kept beyond that. [Brackets]: 95% intervals."
    )
    caption = f"Rule {head['rule']} at thresholds; lower ones send less to {pools[-1]}"
    return [title, Paragraph(terms), TableBlock(caption, header, lines, marked)]


def _unmeasured_table(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pools: Sequence[str]) -> TableBlock:
    """Shares alone."""
    rows, costed = _shown_rows(head, rows), "cost" in head["in_force"]
    lines = [
        [f"threshold {threshold_text(row['threshold'])}", percent(row["large_share"])]
        + ([percent(row["cost"])] if costed else [])
        for row in rows
    ]
    marked = next((i for i, row in enumerate(rows) if row["threshold"] == head["threshold"]), None)
    if marked is not None:
        lines[marked][0] += ", in force"
    header = ["routing", f"sent to {pools[-1]}", *(["cost"] if costed else [])]
    return TableBlock(f"Rule {head['rule']} at thresholds, without quality", header, lines, marked)


def method_blocks(part: Mapping[str, Any], pools: Sequence[str]) -> list[Block]:
    """Table two where there is one source: the ways to route, compared by APGR."""
    if "apgr" not in part or np.isnan(part["perfect_apgr"]):
        return []
    names = {"length": "length", **{f"{rule} (full)": f"rule {rule}" for rule in RULES}}
    shown = {name: ApgrEstimate(**part["apgr"][key]) for key, name in names.items() if key in part["apgr"]}
    means = APGR_MEANS.format(first=pools[0], last=pools[-1])
    return [
        Heading(2, "Compared with other ways to route"),
        Paragraph(means),
        TableBlock("At all shares together", APGR_HEADER, apgr_rows(shown)),
    ]


def source_blocks(
    sources: Mapping[str, Mapping[str, Any]], head: Mapping[str, Any], pools: Sequence[str]
) -> list[Block]:
    """Table two where there are several sources: each at the threshold in force."""
    costed = any("cost" in part["in_force"] for part in sources.values())
    strange = any(part["unfamiliar"] for part in sources.values())
    header = [
        "source",
        "prompts",
        *(["unfamiliar"] if strange else []),
        f"sent to {pools[-1]}",
        *(["cost"] if costed else []),
        "quality kept",
        "above random",
    ]
    lines = []
    for name, part in sources.items():
        row, count = part["in_force"], part["with_all_labels"]
        cells = [name, str(count if part["measured"] else part["prompts"])]
        cells += [percent(part["unfamiliar"])] if strange else []
        cells += [percent(row["large_share"])]
        cells += [percent(row["cost"])] if costed else []
        kept = above = f"too few labels (under {FEW_PROMPTS})"
        if part["measured"]:
            kept, above = kept_text(row["kept_quality"]), difference_text(row["kept_above_random"])
            if not part["gap"]["value"] > 0:
                kept = f"{kept}; {pools[-1]} is no better here"
        lines.append([*cells, kept, above])
    text = (
        "Quality kept is of the same source's prompts sent to the last pool. Above random with an interval beyond 0:"
        " routing is shown to help within that source."
    )
    caption = f"Threshold {threshold_text(head['threshold'])} by source"
    return [Heading(2, "By source"), Paragraph(text), TableBlock(caption, header, lines)]


def change_blocks(changes: Mapping[str, Any], head: Mapping[str, Any], pools: Sequence[str]) -> list[Block]:
    """Table two of records: from the routing that served to this checkpoint."""
    served, costed = changes["served"], "cost" in changes["served"]
    if not served:
        return []
    header = ["routing", f"sent to {pools[-1]}", *(["cost"] if costed else []), "quality", "quality kept"]
    cells = ["as served", percent(served["large_share"])] + ([percent(served["cost"])] if costed else [])
    lines = [[*cells, _quality_cell(served["quality"]), kept_text(served["kept_quality"]) or UNKNOWN]]
    names = {"in_force": f"this checkpoint at {threshold_text(head['threshold'])}"}
    if head["alternative"] is not None:
        names["alternative"] = f"this checkpoint at {threshold_text(head['alternative']['threshold'])}"
    for key, name in names.items():
        if key in changes:
            change = changes[key]
            cells = [f"change to {name}", signed_points(change["large_share"])]
            cells += [signed_points(change["cost"])] if costed else []
            cells.append(_quality_cell(change["quality"], "+"))
            lines.append([*cells, difference_text(change["kept_quality"]) or UNKNOWN])
    text = (
        f"On the same {changes['records']} records; as served includes random draws (routing.explore). Changes of"
        " share, cost and quality kept are in percentage points; intervals of differences are paired."
    )
    return [Heading(2, "The change from what served"), Paragraph(text), TableBlock("The change", header, lines)]


def _quality_cell(of: Mapping[str, float], sign: str = "") -> str:
    return UNKNOWN if np.isnan(of["value"]) else with_interval(of["value"], of["low"], of["high"], sign)


def signed_points(value: float) -> str:
    """ "-6 points"."""
    shown = points(value)
    sign = "" if float(shown) == 0 else "+" if value > 0 else "-"
    return f"{sign}{shown} points"


def _shown_rows(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows in force and cheaper, and those nearest to SHOWN_SHARES."""
    wanted = {head["threshold"]}
    if head["alternative"] is not None:
        wanted.add(head["alternative"]["threshold"])
    shares = np.array([row["large_share"] for row in rows])
    taken = {row["large_share"] for row in rows if row["threshold"] in wanted}
    for share in SHOWN_SHARES:
        nearest = rows[int(np.abs(shares - share).argmin())]
        if all(abs(nearest["large_share"] - other) >= 0.05 for other in taken):
            wanted.add(nearest["threshold"])
            taken.add(nearest["large_share"])
    return [row for row in rows if row["threshold"] in wanted]


def _end_cells(name: str, end: Mapping[str, Any], share: str, costed: bool) -> list[str]:
    cells = [name, share] + ([percent(end["cost"])] if costed else [])
    return [*cells, f"{end['quality']['value']:.3f}", kept_text(end["kept_quality"]) or UNKNOWN, ""]
