"""`python -m benchmarks.replay`: does a running gateway learn from what it served?

    python -m benchmarks.replay --data DIR [--seeds N] [--scenario cold|general|switch] [--out DIR] [--report DIR]
    python -m benchmarks.replay --quick

DIR/outcomes holds the tables named in questions.py. A real gateway serves, scripted backends answer right or wrong by
the table, and `depo-train refresh --follow` beside it shadows, judges and trains; the gateway loads what it publishes
while it serves. `--quick` is one small cold start on chain arithmetic, or on --data; it fails if the loop did not learn
or a request failed. Runs with a result file in --out are skipped, so an interrupted benchmark can be continued.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.replay.plans import SCENARIOS, plan_of, quick_plan, shuffled
from benchmarks.replay.processes import general, untrained
from benchmarks.replay.questions import Question, chain_questions, questions_of
from benchmarks.replay.run import run_replay, save
from benchmarks.replay.score import Scorer, outcomes
from depo_gateway.training.evaluation.routing_metrics import measure_apgr

QUICK_STEP, QUICK_BLOCKS, QUICK_LATER = 150, 3, 400


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory with outcomes/*.jsonl")
    parser.add_argument("--seeds", type=int, default=5, help="orders of the questions (%(default)s)")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["general", "switch"])
    parser.add_argument("--quick", action="store_true", help="one small run that must learn; exit 1 if it does not")
    parser.add_argument("--out", type=Path, default=Path("runs/replay"), help="result files (%(default)s)")
    parser.add_argument("--report", type=Path, help="directory of README.md, plots and runs.json to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.quick and options.data is None:
        parser.error("give --data, or --quick, which needs none")
    try:
        if options.quick:
            return quick(options.data)
        runs = full(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.report is not None:
        from benchmarks.replay.report import report

        report(runs, options.report)
    return 1 if any(result["failures"] for result in runs) else 0


def full(options: argparse.Namespace) -> list[dict[str, Any]]:
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    mmlu, gsm8k = (questions_of(options.data, source) for source in ("mmlu", "gsm8k"))
    scorer = Scorer([*mmlu, *gsm8k], out / "embeddings.npy")
    bases = {"cold": untrained(out / "untrained")}
    if "general" in options.scenario:
        bases["general"] = general(out / "general", options.data.resolve())
    runs = []
    for seed in range(1, options.seeds + 1):  # seed by seed: an interrupted benchmark has whole comparisons
        for scenario in options.scenario:
            path = out / f"{scenario}-seed{seed}.json"
            if not path.exists():
                place = out / f"{scenario}-seed{seed}"
                shutil.rmtree(place, ignore_errors=True)  # of an interrupted run
                save(path, run_replay(plan_of(scenario, seed, bases, mmlu, gsm8k), place, scorer))
                shutil.rmtree(place / "checkpoints")
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            print(summary_line(runs[-1]), flush=True)
    return runs


def quick(data: Path | None) -> int:
    """One small run: 1 if the last version is not significantly better than random routing on new questions."""
    count = QUICK_STEP * QUICK_BLOCKS + QUICK_LATER
    questions = chain_questions(count, 1) if data is None else shuffled(questions_of(data, "mmlu"), 1)[: 2 * count]
    with tempfile.TemporaryDirectory(prefix="replay") as folder:
        root = Path(folder)
        scorer = Scorer(questions, root / "embeddings.npy")
        plan = quick_plan(untrained(root / "untrained"), questions, QUICK_STEP, QUICK_BLOCKS)
        result = run_replay(plan, root / "run", scorer)
        last = root / "run" / "checkpoints" / result["versions"][-1]["checkpoint"]
        low, point, high = interval_of(scorer, last, plan.later["later"])
    print(summary_line(result))
    print(f"APGR of new questions {point:.3f} [{low:.3f}, {high:.3f}]; random routing has 0.5")
    for refusal in result["refusals"]:
        print(f"refused with {refusal['labels']} labels: {'; '.join(refusal['reasons'])}")
    for failure in result["failures"][:5]:
        print(f"a request failed: {failure}", file=sys.stderr)
    if not low > 0.5:
        print("the loop did not learn: its routing is not significantly better than random routing", file=sys.stderr)
    return 0 if low > 0.5 and not result["failures"] else 1


def interval_of(scorer: Scorer, place: Path, questions: Sequence[Question]) -> tuple[float, float, float]:
    """(low, APGR, high), 95% over questions."""
    quality, observed = scorer.quality(place, questions), outcomes(questions)
    scores = {"gain": quality[:, 1] - quality[:, 0]}
    found = measure_apgr(scores, observed[:, 0], observed[:, 1], against="gain")["gain"]
    return found.low, found.apgr, found.high


def summary_line(result: dict[str, Any]) -> str:
    steps = []
    for version in result["versions"]:
        (found,) = [version[name] for name in ("mmlu", "later") if name in version]
        steps.append(f"{version['labels']}: {found['apgr']:.3f}")
    share = ", ".join(f"{k} {v:.3f}" for k, v in result["share"].items() if v is not None and k != "target")
    text = f"{result['scenario']} seed {result['seed']}: APGR after labels {'; '.join(steps)}"
    after = ", ".join(f"{row['advantage']:+.3f}" for row in result.get("switch", []))
    text += f"; after the switch {after} over random routing" if after else ""
    text += f"; share off by {share}" if share else ""
    return (
        f"{text}; {len(result['refusals'])} refused, {len(result['failures'])} of {result['requests']} requests failed,"
        f" scores differ by {result['score_difference']:.1e}, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
