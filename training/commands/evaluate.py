"""`depo-train evaluate`: a checkpoint's routing on outcomes or on logged traffic, beside random and prompt length.

Scores come from the serving runtime, so that the measured behaviour is the served one.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic
from depo_gateway.training.evaluation.calibration_data import traffic_calibration_data
from depo_gateway.training.evaluation.contamination import fitted_share, warn_of_contamination
from depo_gateway.training.evaluation.off_policy import MAX_INVERSE_PROPENSITY
from depo_gateway.training.evaluation.off_policy_report import logs_markdown, logs_report, plot_logs
from depo_gateway.training.evaluation.predictions import (
    prompt_logits,
    resolve_pools,
    stage_qualities,
    text_logits,
    write_scores,
)
from depo_gateway.training.evaluation.report import nan_to_null, outcome_report, plot_outcomes, report_markdown
from depo_gateway.training.evaluation.targets import parse_costs
from depo_gateway.training.outcomes.table import cut_off_models, examples_of, question_key, read_tables

REPORT_JSON, REPORT_MD, CURVE, SCORES = "report.json", "report.md", "curve.png", "scores.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged_traffic.add_source_arguments(parser, "outcome tables")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument(
        "--costs", nargs="+", default=[], metavar="NAME=X", help="with --records: cost per token of each pool"
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
    """Runs the command: writes report.json, report.md, curve.png and scores.jsonl under --out."""
    logged_traffic.check_source_arguments(args)
    runtime = Runtime.load(checkpoint.resolve(args.checkpoint), threads=os.cpu_count() or 1)
    if args.records is None and args.costs:
        raise ValueError("--costs goes with --records; reports on outcome tables show the share of large calls instead")
    if not args.clip >= 1:
        raise ValueError(f"--clip is {args.clip:g}; it must be 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a directory")
    report = _report_on_outcomes(args, runtime) if args.records is None else _report_on_records(args, runtime)
    (args.out / REPORT_JSON).write_text(json.dumps(nan_to_null(report), indent=2) + "\n", encoding="utf-8")
    text = report_markdown(report) + (logs_markdown(report["logs"]) if "logs" in report else "")
    (args.out / REPORT_MD).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def _report_on_outcomes(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The report on outcome tables; writes curve.png and scores.jsonl."""
    pools = resolve_pools(args.pools, runtime.manifest)
    rows = read_tables(args.outcomes)
    if cut_off := cut_off_models(rows, pools):
        sys.stderr.write(f"depo-train evaluate: {cut_off} were cut off and have no label: results are biased\n")
    examples = examples_of(rows, pools)
    fitted = fitted_share(examples, runtime.manifest)
    warn_of_contamination("evaluate", fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys((row.question, row.context) for row in rows))
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    stages = stage_qualities(runtime, *prompt_logits(runtime, prompts))
    of_rows = np.array([index_of[row.question, row.context] for row in rows])
    write_scores(args.out / SCORES, [row.question for row in rows], stages["full"][of_rows], runtime.pools)
    of_examples = np.array([index_of[example.prompt, example.context] for example in examples])
    quality = {stage: of_prompts[of_examples] for stage, of_prompts in stages.items()}
    observed = labels_by_head(examples, pools.names)["quality"]
    length = np.array([len(example.prompt) for example in examples], float)
    complete = ~np.isnan(observed).any(1)
    plot_outcomes(args.out / CURVE, {s: q[complete] for s, q in quality.items()}, observed[complete], length[complete])
    report: dict[str, Any] = {
        "checkpoint": runtime.version,
        "outcomes": [str(path) for path in args.outcomes],
        "pools": dict(zip(pools.names, pools.models, strict=True)),
        "fitted_share": fitted,
        "all": outcome_report(quality, observed, length, runtime.pools),
    }
    source_of = {(question_key(row.question), row.context): row.source for row in rows}
    sources = np.array([source_of[question_key(example.prompt), example.context] for example in examples])
    names = sorted(set(sources.tolist()))
    if len(names) > 1:
        report["sources"] = {}
        for name in names:
            own = sources == name
            own_quality = {stage: of_stage[own] for stage, of_stage in quality.items()}
            report["sources"][name] = outcome_report(own_quality, observed[own], length[own], runtime.pools)
    return report


def _report_on_records(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The report on logged traffic; writes curve.png and scores.jsonl.

    Records with every pool's label (shadowed) are measured like an outcome table, besides the off-policy estimates.
    """
    pools, costs = runtime.pools, parse_costs(args.costs, runtime.pools)
    if args.pools is not None:
        resolve_pools(args.pools, runtime.manifest)
    traffic = logged_traffic.read_traffic(args.records, args.since, args.newest, pools, runtime.manifest.text)
    weights = traffic_calibration_data(traffic).weights
    fitted = fitted_share(traffic.examples(), runtime.manifest)
    warn_of_contamination("evaluate", fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = stage_qualities(runtime, *text_logits(runtime, traffic.texts))
    length = np.array([len(prompt) for prompt, _ in traffic.texts], float)
    write_scores(args.out / SCORES, [prompt for prompt, _ in traffic.texts], stages["full"], pools)
    conversations = [str(number) for number in traffic.conversation]
    logs = logs_report(traffic, stages["full"], length, costs, args.clip)
    plot_logs(args.out / CURVE, logs)
    return {
        "checkpoint": runtime.version,
        "records": traffic.source,
        "pools": {
            pool: list(models) for pool, models in zip(pools, resolve_pools(None, runtime.manifest).models, strict=True)
        },
        "fitted_share": fitted,
        "all": outcome_report(stages, traffic.observed, length, pools, groups=conversations, weights=weights),
        "logs": logs,
    }
