"""Benchmark of scoring a prompt on one core: preparing, the cheap stage, the full stage, alone and in batches.

    python benchmarks/routing_speed.py --out benchmarks/results/routing_speed.md

It measures CPU time instead of wall time, so that other load on the machine matters less; the best of five rounds.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation.markdown import table

SHORT = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="builtin", help="a checkpoint (%(default)s)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    args = parser.parse_args()
    started = time.process_time()
    runtime = Runtime.load(checkpoint.resolve(args.checkpoint))
    load = time.process_time() - started
    texts = {"short": SHORT, "longer than max_tokens": SHORT * 20, "4 MB": SHORT * 40_000}
    rows = []
    for name, text in texts.items():
        prepared = runtime.prepare(text)
        cells = [
            milliseconds(lambda text=text: runtime.prepare(text), 100),
            milliseconds(lambda prepared=prepared: runtime.cheap([prepared]), 200),
            milliseconds(lambda prepared=prepared: runtime.score([prepared]), 40),
            milliseconds(lambda prepared=prepared: runtime.score([prepared] * 8), 10) / 8,
        ]
        rows.append(
            [name, len(prepared.ids), *(f"{cell:.2f}" for cell in cells), f"{1000 / (cells[0] + cells[2]):.0f}"]
        )
    header = ("prompt", "tokens", "prepare ms", "cheap ms", "full ms", "full ms, batches of 8", "prompts/s, one core")
    text = (
        "# Cost of scoring\n\n"
        f"`python benchmarks/routing_speed.py --out benchmarks/results/routing_speed.md`; {processor()}, one thread,"
        f" onnxruntime {onnxruntime.__version__}, checkpoint {runtime.version}, loaded in {load:.2f} s of CPU."
        " CPU time, best of five rounds.\n\n" + table(rows, header) + "\n"
    )
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def milliseconds(work: Callable[[], object], times: int) -> float:
    """CPU milliseconds per call, the best of five rounds."""
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(times):
            work()
        rounds.append((time.process_time() - started) / times * 1000)
    return min(rounds)


def processor() -> str:
    """The processor's name, or the architecture if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
