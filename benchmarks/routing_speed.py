"""Benchmark of scoring a prompt on one core: preparing, the cheap stage, the full stage, alone and in batches.

    python benchmarks/routing_speed.py --out benchmarks/results/routing_speed.md

It measures CPU time instead of wall time, so that other load on the machine matters less; the best of five rounds.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation.markdown import table

ROUNDS = 5
SHORT = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="builtin", help="a checkpoint (%(default)s)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another one, measured in turn with it")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    args = parser.parse_args()
    places = [checkpoint.resolve(place) for place in (args.checkpoint, args.against) if place is not None]
    started = time.process_time()
    runtimes = [Runtime.load(places[0])]
    load = time.process_time() - started
    runtimes += [Runtime.load(place) for place in places[1:]]
    rows = []
    for name, text in {"short": SHORT, "longer than max_tokens": SHORT * 20, "4 MB": SHORT * 40_000}.items():
        costs = measure(runtimes, text)
        cells = costs[0]
        rows.append(
            [
                name,
                len(runtimes[0].prepare(text).ids),
                *(f"{cell:.2f}" for cell in cells),
                f"{1000 / (cells[0] + cells[2]):.0f}",
                *(
                    f"{cell / before:.2f}"
                    for after in costs[1:]
                    for cell, before in zip(cells[1:3], after[1:3], strict=True)
                ),
            ]
        )
    header = ("prompt", "tokens", "prepare ms", "cheap ms", "full ms", "full ms, batches of 8", "prompts/s, one core")
    option, note = "", ""
    if args.against is not None:
        header = (*header, "cheap, ratio", "full, ratio")
        option = " --against DIR"
        note = f"The ratios are to the checkpoint {runtimes[1].version} (DIR), measured in turn with the other.\n\n"
    text = (
        "# Cost of scoring\n\n"
        f"`python benchmarks/routing_speed.py{option} --out benchmarks/results/routing_speed.md`; {processor()},"
        f" one thread, onnxruntime {onnxruntime.__version__}, checkpoint {runtimes[0].version}, loaded in {load:.2f} s"
        f" of CPU. CPU time, best of {ROUNDS} rounds.\n\n" + note + table(rows, header) + "\n"
    )
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def measure(runtimes: Sequence[Runtime], text: str) -> list[list[float]]:
    """CPU milliseconds a prompt of each checkpoint: prepare, cheap, full, full in batches of 8. The best of the rounds,
    in each of which the checkpoints take turns.
    """
    best = [[float("inf")] * 4 for _ in runtimes]
    prepared = [runtime.prepare(text) for runtime in runtimes]
    for _ in range(ROUNDS):
        for of, runtime, ready in zip(best, runtimes, prepared, strict=True):
            costs = (
                milliseconds(lambda runtime=runtime: runtime.prepare(text), 100),
                milliseconds(lambda runtime=runtime, ready=ready: runtime.cheap([ready]), 200),
                milliseconds(lambda runtime=runtime, ready=ready: runtime.score([ready]), 40),
                milliseconds(lambda runtime=runtime, ready=ready: runtime.score([ready] * 8), 10) / 8,
            )
            of[:] = map(min, of, costs)
    return best


def milliseconds(work: Callable[[], object], times: int) -> float:
    """CPU milliseconds per call."""
    started = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - started) / times * 1000


def processor() -> str:
    """The processor's name, or the architecture if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
