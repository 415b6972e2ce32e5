"""Run the benchmark: a result file for each method and seed. `python -m benchmarks.depo.run --help`.

Runs that have a result file are skipped, so an interrupted benchmark continues.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; each run has one thread

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.depo.catalog import TITLES, method_of, parse
from benchmarks.depo.loop import LoopConfig, Row, Run
from benchmarks.depo.start import STEPS, start
from benchmarks.depo.task import task_of

START = "start.safetensors"


@dataclass(frozen=True, slots=True)
class Job:
    method: str
    seed: int
    out: Path
    loop: LoopConfig
    prompts: int  # of the training set
    held_out: int

    @property
    def path(self) -> Path:
        return self.out / f"{self.method}-seed{self.seed}.json"


def work(job: Job, chatty: bool = False) -> Path:
    """One run, and its result file."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    train, held_out = task_of("collect", job.prompts), task_of("evaluate", job.held_out)
    per_step = job.loop.need * job.loop.group_size
    method, grpo = method_of(job.method, train.prompts, job.seed, job.loop.budget // per_step, job.loop.group_size)
    run = Run(start(job.out / START), train, held_out, grpo, job.loop, method, job.seed)
    history = run.go(lambda row: print(line(job, row), flush=True) if chatty else None)
    result = {
        "method": job.method,
        "seed": job.seed,
        "prompts": job.prompts,
        "held_out": job.held_out,
        "loop": asdict(job.loop),
        "grpo": asdict(grpo),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "history": history,
    }
    unfinished = job.path.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(job.path)
    return job.path


def line(job: Job, row: Row) -> str:
    zero = row["generated_right"] + row["generated_wrong"]
    auroc = row.get("auroc_informative", float("nan"))
    spent = {name: round(seconds, 1) for name, seconds in row["seconds"].items() if seconds}
    return (
        f"{job.method} seed {job.seed}: {row['completions']:6d} completions, step {row['steps']:3d}, accuracy"
        f" {row['accuracy']:.3f}, zero advantage {zero:.2f}, AUROC {auroc:.2f}, CPU s {spent}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(TITLES), metavar="NAME", help="default: all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--budget", type=int, default=LoopConfig().budget, help="completions a run (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/depo"), help="directory for result files (%(default)s)")
    parser.add_argument("--prompts", type=int, default=1024, help="training prompts (%(default)s)")
    parser.add_argument("--held-out", type=int, default=480, help="prompts to evaluate on (%(default)s)")
    parser.add_argument(
        "--start-steps", type=int, default=STEPS, help="steps of the starting policy's fine-tuning (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=LoopConfig().rows, help="evaluations a run (%(default)s)")
    options = parser.parse_args(argv)
    try:
        for name in options.methods:
            parse(name)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    loop = replace(LoopConfig(), budget=options.budget, rows=options.rows)
    jobs = [
        Job(method, seed, options.out, loop, options.prompts, options.held_out)
        for seed in options.seeds  # seed by seed, so that an interrupted benchmark has complete comparisons
        for method in options.methods
    ]
    todo = [job for job in jobs if not job.path.exists()]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there already", flush=True)
    torch.set_num_threads(1)
    start(options.out / START, options.start_steps)
    if options.jobs == 1:
        for job in todo:
            work(job, chatty=True)
        return 0
    began = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for count, done in enumerate(as_completed(pool.submit(work, job) for job in todo), 1):
            spent = time.perf_counter() - began
            print(f"{count} of {len(todo)}: {done.result().name}, {spent:.0f} s so far", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
