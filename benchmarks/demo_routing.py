"""Does the demo's estimator route better than a coin and than prompt length? `python benchmarks/demo_routing.py`

On chains of the evaluation set, which neither the two models nor the estimator were taught on: starts the two shipped
models on llama.cpp, samples k completions of each chain from both, routes every chain by the estimator, and compares
accuracy at the same share of the large pool with a coin and with "the longest prompts go to the large one". Differences
are paired by chain, with 95% bootstrap intervals. Pass rates by length and number of `*` stand above. `--table
FILE` reads outcomes collected before instead.

Exit code 1 unless routing beats both outside the interval. Shapes: N chains, B resamples.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.demo_models import chains
from depo_gateway import gateway
from depo_gateway.estimator import calibration
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.commands import collect
from depo_gateway.training.outcomes import table_file

DATA = Path(gateway.__file__).parent / "demo" / "data"
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """What one threshold does. Differences are (mean, low, high) in accuracy."""

    threshold: float
    large_share: float
    accuracy: float
    over_coin: tuple[float, float, float]
    over_length: tuple[float, float, float]


def by_length(lengths_N: Array, share: float) -> Array:
    """The chance of the large pool when the longest go there; equal lengths share what is left. Mean: `share`."""
    chance_N = np.zeros(len(lengths_N))
    left = share * len(lengths_N)
    for length in sorted(set(lengths_N.tolist()), reverse=True):
        alike = lengths_N == length
        chance_N[alike] = min(1.0, left / alike.sum())
        left = max(0.0, left - alike.sum())
    return chance_N


def interval(difference_N: Array, rng: np.random.Generator, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and the 95% bootstrap interval over chains."""
    counts_BN = rng.multinomial(len(difference_N), np.full(len(difference_N), 1 / len(difference_N)), size=resamples)
    means_B = counts_BN @ difference_N / len(difference_N)
    low, high = np.percentile(means_B, [2.5, 97.5])
    return float(difference_N.mean()), float(low), float(high)


def compare(correct_N2: Array, quality_N2: Array, lengths_N: Array, threshold: float, rule: str = "gain") -> Row:
    """Routing at one threshold against its two baselines at the same share."""
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
        interval(routed_N - served(share), rng),
        interval(routed_N - served(by_length(lengths_N, share)), rng),
    )


@contextmanager
def backend(folder: Path) -> Iterator[str]:
    """One of the shipped models on llama.cpp."""
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
    parser = argparse.ArgumentParser()
    collect.add_arguments(parser)
    with ExitStack() as stack:
        urls = [f"{name}={stack.enter_context(backend(DATA / name))}" for name in ("small", "large")]
        words = ["--prompts", str(prompts), "--backends", *urls, "--out", str(out), "--k", str(k), "--max-tokens", "64"]
        if collect.run(parser.parse_args(words)):
            sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimator", type=Path, default=DATA / "estimator", help="a checkpoint (default: the demo's)")
    parser.add_argument("--table", type=Path, help="outcomes of evaluation chains (default: sample them now)")
    parser.add_argument("--collect", type=Path, help="only write the table that the demo's estimator is fitted on")
    parser.add_argument("--count", type=int, default=2500, help="chains to sample (default 2500)")
    parser.add_argument("--k", type=int, default=4, help="completions a chain and model (default 4)")
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
    prompts = [row["question"] for row in rows]
    taught = [prompt for prompt in prompts if chains.split_of(prompt) != "evaluate"]
    if taught:
        raise ValueError(f"{len(taught)} chains are not of the evaluation set, {taught[0]!r} for one")
    correct_N2 = np.array([[row["correct"]["small"], row["correct"]["large"]] for row in rows])
    runtime = Runtime.load(options.estimator)
    scores = runtime.score([runtime.prepare(prompt) for prompt in prompts])
    quality_N2 = np.array([score.quality for score in scores])
    lengths_N = np.array([len(prompt) for prompt in prompts], float)
    small, large = correct_N2.mean(0)
    for name, correct_N in zip(("small", "large"), correct_N2.T, strict=True):
        print(f"{name}: pass rates by length and number of `*`\n")
        print(chains.by_kind(dict(zip(prompts, correct_N.tolist(), strict=True))) + "\n")
    print(f"{len(rows)} chains; all-small {small:.3f}, all-large {large:.3f}")
    print("threshold  large share  accuracy   over a coin              over length")
    verdict = 1
    for threshold in sorted({*THRESHOLDS, options.threshold}):
        row = compare(correct_N2, quality_N2, lengths_N, threshold)
        coin, length = ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*d) for d in (row.over_coin, row.over_length))
        print(f"{threshold:9.2f}  {row.large_share:11.3f}  {row.accuracy:8.3f}   {coin}  {length}")
        if threshold == options.threshold:
            verdict = 0 if row.over_coin[1] > 0 and row.over_length[1] > 0 else 1
    print(f"at {options.threshold}: {'beats both outside the interval' if not verdict else 'does NOT beat both'}")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
