"""`depo-train evaluate`: a checkpoint's routing on outcomes or on logged traffic, beside random and prompt length.

It scores with the serving runtime, so what is measured is what is served.

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
from depo_gateway.training.evaluation import calibration_data, logged_traffic, off_policy_report
from depo_gateway.training.evaluation.contamination import fitted_share, warn_of_fitted
from depo_gateway.training.evaluation.off_policy import CLIP
from depo_gateway.training.evaluation.predictions import (
    logits_of,
    logits_of_texts,
    pools_of,
    qualities_of,
    write_scores,
)
from depo_gateway.training.evaluation.report import draw, finite, markdown, report_of
from depo_gateway.training.evaluation.targets import parse_costs
from depo_gateway.training.outcomes.table import examples_of, question_key, read_tables

REPORT_JSON, REPORT_MD, CURVE, SCORES = "report.json", "report.md", "curve.png", "scores.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    logged_traffic.add_source(parser, "outcome tables")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument("--costs", nargs="+", default=[], metavar="NAME=X", help="--records: each pool's cost a token")
    parser.add_argument(
        "--clip",
        type=float,
        default=CLIP,
        metavar="X",
        help=f"--records: the largest 1 / propensity (default {CLIP:g})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")


def run(args: argparse.Namespace) -> int:
    """The command: report.json, report.md, curve.png and scores.jsonl under --out."""
    logged_traffic.check_source(args)
    runtime = Runtime.load(checkpoint.resolve(args.checkpoint), threads=os.cpu_count() or 1)
    if args.records is None and args.costs:
        raise ValueError("--costs goes with --records; on outcome tables the share of large calls says it all")
    if not args.clip >= 1:
        raise ValueError(f"--clip is {args.clip:g}; it must be 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a directory")
    report = of_outcomes(args, runtime) if args.records is None else of_records(args, runtime)
    (args.out / REPORT_JSON).write_text(json.dumps(finite(report), indent=2) + "\n", encoding="utf-8")
    text = markdown(report) + (off_policy_report.markdown(report["logs"]) if "logs" in report else "")
    (args.out / REPORT_MD).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def of_outcomes(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The report on outcome tables; curve.png and scores.jsonl are written."""
    pools = pools_of(args.pools, runtime.manifest)
    rows = read_tables(args.outcomes)
    examples = examples_of(rows, pools)
    fitted = fitted_share(examples, runtime.manifest)
    warn_of_fitted("evaluate", fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys((row.question, row.context) for row in rows))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    stages = qualities_of(runtime, *logits_of(runtime, prompts))
    asked = np.array([place[row.question, row.context] for row in rows])
    write_scores(args.out / SCORES, [row.question for row in rows], stages["full"][asked], runtime.pools)
    index = np.array([place[example.prompt, example.context] for example in examples])
    observed = labels_by_head(examples, pools.names)["quality"]
    length = np.array([len(example.prompt) for example in examples], float)
    source_of = {(question_key(row.question), row.context): row.source for row in rows}
    sources = np.array([source_of[question_key(example.prompt), example.context] for example in examples])
    quality = {stage: quality_all[index] for stage, quality_all in stages.items()}
    report: dict[str, Any] = {
        "checkpoint": runtime.version,
        "outcomes": [str(path) for path in args.outcomes],
        "pools": dict(zip(pools.names, pools.models, strict=True)),
        "fitted_share": fitted,
        "all": report_of(quality, observed, length, runtime.pools),
    }
    names = sorted(set(sources.tolist()))
    if len(names) > 1:
        report["sources"] = {
            name: report_of({s: q[sources == name] for s, q in quality.items()}, observed[sources == name],
                            length[sources == name], runtime.pools)
            for name in names
        }  # fmt: skip
    complete = ~np.isnan(observed).any(1)
    draw(args.out / CURVE, {s: q[complete] for s, q in quality.items()}, observed[complete], length[complete])
    return report


def of_records(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The report on logged traffic; curve.png and scores.jsonl are written.

    What is known of every pool (shadowed) is measured as an outcome table is; estimates from all labels stand beside.
    """
    pools, costs = runtime.pools, parse_costs(args.costs, runtime.pools)
    if args.pools is not None:
        pools_of(args.pools, runtime.manifest)
    traffic = logged_traffic.read(args.records, args.since, args.newest, pools, runtime.manifest.text)
    weights = calibration_data.of_traffic(traffic).weights
    fitted = fitted_share(traffic.examples(), runtime.manifest)
    warn_of_fitted("evaluate", fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = qualities_of(runtime, *logits_of_texts(runtime, traffic.texts))
    length = np.array([len(prompt) for prompt, _ in traffic.texts], float)
    write_scores(args.out / SCORES, [prompt for prompt, _ in traffic.texts], stages["full"], pools)
    conversations = [str(number) for number in traffic.conversation]
    logs = off_policy_report.report_of(traffic, stages["full"], length, costs, args.clip)
    off_policy_report.draw(args.out / CURVE, logs)
    return {
        "checkpoint": runtime.version,
        "records": traffic.source,
        "pools": {
            pool: list(models) for pool, models in zip(pools, pools_of(None, runtime.manifest).models, strict=True)
        },
        "fitted_share": fitted,
        "all": report_of(stages, traffic.observed, length, pools, groups=conversations, weights=weights),
        "logs": logs,
    }
