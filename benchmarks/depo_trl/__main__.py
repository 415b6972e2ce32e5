"""Compare GRPO, DAPO and DEPO in the real TRL trainer: a result file for each method and seed, and a report.

Runs that have a result file are skipped, so an interrupted comparison continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers.utils import logging as transformers_logging

from benchmarks.depo_trl.report import page
from benchmarks.depo_trl.run import METHODS, Settings, config_of, parsed, run
from benchmarks.depo_trl.start import SFT_STEPS, chances, start, task_of
from benchmarks.depo_trl.tasks import rows

SIZES = {"chains": (16, 128, 3e-4), "sums": (32, 64, 1e-5)}  # prompts a step, micro-batch, learning rate


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        return compare(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the finished runs", file=sys.stderr)
        return 1


def compare(options: argparse.Namespace) -> int:
    """Run the comparison. Raises ValueError for mistakes of the user."""
    quiet()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU is available; use --device cpu")
    prompts, micro, rate = SIZES[task_of(options.policy)]
    settings = Settings(
        policy=options.policy,
        sft_steps=SFT_STEPS.get(options.policy, 0) if options.sft_steps is None else options.sft_steps,
        steps=options.steps,
        prompts=options.prompts or prompts,
        group_size=options.group_size,
        micro=options.micro or micro,
        learning_rate=options.learning_rate or rate,
        train_rows=options.train_rows,
        held_out=options.held_out,
        evaluations=options.evaluations,
        encoder=options.encoder,
        extra=parsed(options.set),
    )
    out: Path = options.out
    jobs = {f"{method}-seed{seed}": (method, seed) for seed in options.seeds for method in options.methods}
    there = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-seed*.json"))}
    for name, result in there.items():
        if result["settings"] != asdict(settings):
            raise ValueError(f"{out}/{name}.json is a run with other settings; choose another --out")
    for method in options.methods:  # fail before the first run
        config_of(method, 0, settings, out / "check", device)
    shutil.rmtree(out / "check", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    place = start(settings.policy, out / "start", settings.sft_steps, device)
    measured = rows(task_of(settings.policy), "evaluate", options.start_prompts)
    known = once(out / "start.json", lambda: chances(place, measured, device))
    for name, (method, seed) in jobs.items():
        if name in there:
            continue
        print(f"{name}:", flush=True)
        work = out / "work" / name
        there[name] = once(
            out / f"{name}.json",
            lambda method=method, seed=seed, work=work: {
                **run(method, seed, settings, place, work, device),
                "machine": machine(device),
            },
        )
        shutil.rmtree(work, ignore_errors=True)
        write(out / "report.md", page(list(there.values()), known))
    text = page(list(there.values()), known)
    write(out / "report.md", text)
    print(text)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depo_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", default="chains", metavar="NAME", help="chains, smollm2 or an instruct model (%(default)s)")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all of them")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N")
    add("--steps", type=int, default=200, help="policy steps a run (%(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--out", type=Path, default=Path("runs/depo_trl"), help="directory for results and report.md (%(default)s)")
    add("--prompts", type=int, help="prompts a step (default: 16 chains, 32 sums)")
    add("--group-size", type=int, default=8, help="completions a prompt (%(default)s)")
    add("--micro", type=int, help="completions in one pass of the policy (default: 128 chains, 64 sums)")
    add("--learning-rate", type=float, help="of the policy (default: 3e-4 chains, 1e-5 sums)")
    add(
        "--sft-steps",
        type=int,
        help="steps of SFT before the runs (default: 200 for smollm2, else 0)",
    )
    add("--train-rows", type=int, default=2048, help="training prompts (%(default)s)")
    add("--held-out", type=int, default=512, help="prompts to evaluate on (%(default)s)")
    add(
        "--start-prompts",
        type=int,
        default=360,
        help="prompts to measure the start on (%(default)s)",
    )
    add("--evaluations", type=int, default=20, help="evaluations a run (%(default)s)")
    add(
        "--encoder",
        default="",
        help="of the estimator, a name or directory (default: a small one for chains, else MiniLM)",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other setting of DepoConfig")
    return parser


def once(path: Path, make: Any) -> Any:
    """The value of `make`, stored in a JSON file; read from the file if it exists."""
    if not path.exists():
        write(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"no GPU, {torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    return f"{name}, {platform.machine()} with {os.cpu_count()} cores, {versions}"


def quiet() -> None:
    """Hide warnings that concern TRL and transformers, not the user."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
