"""`depo-train evaluate`: a report of a checkpoint's routing, on outcome tables or on logged traffic.

Scores come from the serving runtime, so that the measured behaviour is the served one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic
from depo_gateway.training.evaluation.figure import draw_figure
from depo_gateway.training.evaluation.front_page import FIGURE_CAPTION, UNMEASURED_CAPTION, curve_figure, figure_alt
from depo_gateway.training.evaluation.off_policy import MAX_INVERSE_PROPENSITY
from depo_gateway.training.evaluation.outcome_pages import report_on_outcomes
from depo_gateway.training.evaluation.page import Figure, Report, blocks_html, blocks_markdown
from depo_gateway.training.evaluation.report import nan_to_null
from depo_gateway.training.evaluation.reported_routing import add_routing_arguments
from depo_gateway.training.evaluation.traffic_pages import report_on_records

REPORT_JSON, REPORT_MD, REPORT_HTML, CURVE, SCORES = (
    "report.json",
    "report.md",
    "report.html",
    "curve.png",
    "scores.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged_traffic.add_source_arguments(parser, "outcome tables")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    add_routing_arguments(parser)
    parser.add_argument(
        "--include-fitted",
        action="store_true",
        help="include prompts that the checkpoint was fitted on; results on those are optimistic",
    )
    parser.add_argument(
        "--clip",
        type=float,
        default=MAX_INVERSE_PROPENSITY,
        metavar="X",
        help=f"with --records: the largest 1 / propensity (default {MAX_INVERSE_PROPENSITY:g})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the report")


def run(args: argparse.Namespace) -> int:
    """Runs the command: writes report.html, report.md, report.json, curve.png and scores.jsonl under --out."""
    logged_traffic.check_source_arguments(args)
    runtime = Runtime.load(checkpoint.resolve(args.checkpoint), threads=os.cpu_count() or 1)
    if not args.clip >= 1:
        raise ValueError(f"--clip is {args.clip:g}; it must be 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a directory")
    scores = args.out / SCORES
    report = (
        report_on_outcomes(args, runtime, scores) if args.records is None else report_on_records(args, runtime, scores)
    )
    write_report(args.out, report)
    sys.stdout.write(_console(args.out, report))
    return 0


def write_report(out: Path, report: Report) -> None:
    """Writes the report in its three forms, and its figure."""
    head, pools = report.figures["headline"], report.pools
    svg = draw_figure(curve_figure(head, report.figures["sweep"], pools), out / CURVE)
    figure = Figure(CURVE, svg, figure_alt(head, pools), FIGURE_CAPTION if head["measured"] else UNMEASURED_CAPTION)
    blocks = [*report.beginning, figure, *report.tables, *report.appendix]
    title = f"Routing of checkpoint {report.figures['checkpoint']}"
    content = json.dumps(nan_to_null(report.figures), indent=2, ensure_ascii=False) + "\n"
    (out / REPORT_JSON).write_text(content, encoding="utf-8")
    (out / REPORT_MD).write_text(blocks_markdown(blocks), encoding="utf-8")
    (out / REPORT_HTML).write_text(blocks_html(title, blocks), encoding="utf-8")


def _console(out: Path, report: Report) -> str:
    """The first page without its figure, and where the rest is."""
    text = blocks_markdown([*report.beginning, *report.tables]).removeprefix("# ")
    return f"{text}\nFigure and appendix: {out / REPORT_HTML} (the same in {REPORT_MD}; figures in {REPORT_JSON})\n"
