"""Benchmark of the demo's estimator against random routing and prompt length. `python -m benchmarks.demo_routing`

It uses chains of the evaluation set, which neither the two models nor the estimator were fitted on: it starts the two
shipped models on llama.cpp, samples k completions of each chain from both, routes every chain by the estimator, and
compares accuracy at the same share of the large pool with random routing and with "the longest prompts go to the large
pool". Differences are paired by chain, with 95% bootstrap intervals. Pass rates by length and number of `*` are printed
first. `--table FILE` reads outcomes that were collected before instead.

Exit code 1 unless routing beats both outside the interval. Shapes: N chains, B resamples.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo_models import chains
from depo_gateway import gateway
from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main as depo_train
from depo_gateway.training.evaluation.bootstrap import draw_count_matrix, percentile_interval
from depo_gateway.training.evaluation.markdown import with_interval
from depo_gateway.training.outcomes import table_file

DATA = Path(gateway.__file__).parent / "demo" / "data"
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Row:
    """The routing at one threshold. Differences are (mean, low, high) in accuracy."""

    threshold: float
    large_share: float
    accuracy: float
    over_random: tuple[float, float, float]
    over_length: tuple[float, float, float]


def by_length(lengths_N: Array, share: float) -> Array:
    """The probability of the large pool if the longest go there, with mean `share`; equal lengths share the rest."""
    chance_N = np.zeros(len(lengths_N))
    left = share * len(lengths_N)
    for length in sorted(set(lengths_N.tolist()), reverse=True):
        alike = lengths_N == length
        chance_N[alike] = min(1.0, left / alike.sum())
        left = max(0.0, left - alike.sum())
    return chance_N


def mean_interval(difference_N: Array, rng: np.random.Generator, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over chains."""
    means_B = draw_count_matrix(len(difference_N), resamples, rng) @ difference_N / len(difference_N)
    return float(difference_N.mean()), *percentile_interval(means_B)


def compare(correct_N2: Array, quality_N2: Array, lengths_N: Array, threshold: float, rule: str = "gain") -> Row:
    """Compares routing at one threshold with its two baselines at the same share."""
    to_large_N = calibration.route(quality_N2, rule, threshold).astype(float)
    share = float(to_large_N.mean())
    small_N, large_N = correct_N2.T

    def served(chance_N: Array | float) -> Array:
        result: Array = small_N + chance_N * (large_N - small_N)
        return result

    routed_N = served(to_large_N)
    rng = np.random.default_rng(0)
    return Row(
        threshold,
        share,
        float(routed_N.mean()),
        mean_interval(routed_N - served(share), rng),
        mean_interval(routed_N - served(by_length(lengths_N, share)), rng),
    )


@contextmanager
def backend(folder: Path) -> Iterator[str]:
    """Serves one of the shipped models on llama.cpp; yields its URL."""
    command = [
        sys.executable,
        "-m",
        "depo_gateway.gateway.demo.llama_server",
        "--model",
        str(folder / "model.gguf"),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[-1]
        running.terminate()


def sample(split: str, count: int, k: int, seed: int, out: Path) -> None:
    """Outcomes of `count` chains of a split on both shipped models, by depo-train collect."""
    prompts = out.with_suffix(".prompts.jsonl")
    prompts.write_text("".join(json.dumps(chains.row_of(p)) + "\n" for p in chains.chains(split, count, seed)))
    with ExitStack() as stack:
        urls = [f"{name}={stack.enter_context(backend(DATA / name))}" for name in ("small", "large")]
        flags = ["--prompts", str(prompts), "--backends", *urls, "--out", str(out), "--k", str(k), "--max-tokens", "64"]
        if depo_train(["collect", *flags]):
            sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_routing", description=__doc__.splitlines()[0])
    parser.add_argument("--estimator", type=Path, default=DATA / "estimator", help="a checkpoint (default: the demo's)")
    parser.add_argument("--table", type=Path, help="outcomes of evaluation chains (default: sample them now)")
    parser.add_argument("--collect", type=Path, help="only write the table for fitting the demo's estimator")
    parser.add_argument("--count", type=int, default=2500, help="chains to sample (default 2500)")
    parser.add_argument("--k", type=int, default=4, help="completions per chain and model (default 4)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.7, help="the one that must beat both (default 0.7)")
    options = parser.parse_args(argv)
    if options.collect:
        sample("collect", options.count, options.k, options.seed, options.collect)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        table = options.table or Path(folder) / "outcomes.jsonl"
        if options.table is None:
            sample("evaluate", options.count, options.k, options.seed, table)
        rows = [row for _, row in table_file.json_lines(table) if set(row["correct"]) == {"small", "large"}]
    fitted = [row["question"] for row in rows if chains.split_of(row["question"]) != "evaluate"]
    if fitted:
        raise ValueError(f"{len(fitted)} chains are not from the evaluation set, for instance {fitted[0]!r}")
    return report(rows, Runtime.load(options.estimator), options.threshold)


def report(rows: Sequence[Mapping[str, Any]], runtime: Runtime, decisive: float) -> int:
    """Prints pass rates and the comparison. Exit code 1 unless the threshold `decisive` beats both baselines."""
    prompts = [row["question"] for row in rows]
    correct_N2 = np.array([[row["correct"]["small"], row["correct"]["large"]] for row in rows])
    scores = runtime.score([runtime.prepare(prompt) for prompt in prompts])
    quality_N2 = np.array([score.quality for score in scores])
    lengths_N = np.array([len(prompt) for prompt in prompts], float)
    small, large = correct_N2.mean(0)
    for name, correct_N in zip(("small", "large"), correct_N2.T, strict=True):
        print(f"{name}: pass rates by length and number of `*`\n")
        print(chains.by_kind(dict(zip(prompts, correct_N.tolist(), strict=True))) + "\n")
    print(f"{len(rows)} chains; all-small {small:.3f}, all-large {large:.3f}")
    print("threshold  large share  accuracy   over random              over length")
    beats_both = False
    for threshold in sorted({*THRESHOLDS, decisive}):
        row = compare(correct_N2, quality_N2, lengths_N, threshold)
        over_random, over_length = (with_interval(*d, sign="+") for d in (row.over_random, row.over_length))
        print(f"{threshold:9.2f}  {row.large_share:11.3f}  {row.accuracy:8.3f}   {over_random}  {over_length}")
        if threshold == decisive:
            beats_both = row.over_random[1] > 0 and row.over_length[1] > 0
    print(f"at {decisive}: {'beats both outside the interval' if beats_both else 'does NOT beat both'}")
    return 0 if beats_both else 1


if __name__ == "__main__":
    sys.exit(main())
