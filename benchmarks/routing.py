"""How well the estimator routes, cross-fitted, on the outcome tables of docs/data: APGR, and the paper's routing table.

    python benchmarks/routing.py --data DIR --out benchmarks/results/routing.md

Every figure is held out: 5 folds grouped by question, or by subject where it says so. Prompts are embedded once, in
both poolings, since the encoder is frozen; the folds then refit heads and wide part.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from estimator import calibration
from estimator.learner import Learner, LearnerConfig
from estimator.model import ModelConfig, collate, create
from estimator.text import TextConfig, prepare
from training.calibrate import calibrate
from training.data import Row, examples_of, labels, parse_pools, read_table
from training.evaluate import scores_of
from training.fit import FitConfig, cross_fit, foldings_of, fresh
from training.measure import Array, Measured, apgr, apgr_table, at_thresholds, measure, routing_scores, table

SOURCES = ("mmlu_mixtral_gpt4", "gsm8k_mixtral_gpt4", "gsm8k_many_models", "math_l5_many_models")
MIXTRAL_GPT4 = ["small=mistralai/Mixtral-8x7B-Instruct-v0.1", "large=gpt-4-1106-preview"]
FAMILIES = {
    "Llama-3.1 8B/70B": ["small=Meta-Llama-3.1-8B-Instruct", "large=Meta-Llama-3.1-70B-Instruct"],
    "Qwen2 7B/72B": ["small=Qwen2-7B-Instruct", "large=Qwen2-72B-Instruct"],
    "gemma-2 2b/9b": ["small=gemma-2-2b-it", "large=gemma-2-9b-it"],
}
NO_TERMS: Mapping[str, float] = {}
TERMS = {
    "advantage + distillation (the default)": NO_TERMS,
    "+ gain": {"gain_weight": 1.0},
    "+ ranking at a tenth of the paper's weight": {"ranking_weight": 0.1},
    "+ ranking at the paper's weight": {"ranking_weight": 1.0},
    "+ both": {"ranking_weight": 1.0, "gain_weight": 1.0},
}
PAPER = (0.3, 0.5, 0.7, 0.75)  # the paper's thresholds
GAIN = (0.7, 0.8, 0.85, 0.9, 0.95)  # gain's confidence is a loss forgone: its scale is another


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with outcomes/*.jsonl")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    args = parser.parse_args()
    started = time.monotonic()
    tables = {name: list(read_table(args.data / "outcomes" / f"{name}.jsonl")) for name in SOURCES}
    embedded = embed(sorted({row.question for rows in tables.values() for row in rows}))
    parts = [
        "# Routing, cross-fitted",
        f"`python benchmarks/routing.py --data DIR --out benchmarks/results/routing.md`; {platform.machine()},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}. Held-out predictions of 5 folds grouped by"
        " question; 95% bootstrap intervals over prompts; differences are paired. APGR: random 0.5.",
    ]
    for name in SOURCES[:2]:
        parts += [f"## {name}", *comparison(tables[name], embedded)]
    parts += ["## The terms of the loss", *(losses(name, tables[name], embedded["cls"]) for name in SOURCES[:2])]
    parts.append("## The paper's routing table")
    parts.append(
        "Trained and measured on the named source alone. `coin` is the quality of sending prompts to the large model at"
        " random at the same share. A confidence at or above the threshold stays small."
    )
    for name in SOURCES[2:]:
        for family, pools in FAMILIES.items():
            parts += paper_table(f"{name}, {family}", tables[name], pools, embedded)
    parts.append(f"Made in {(time.monotonic() - started) / 60:.0f} minutes.")
    text = "\n\n".join(parts) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def start(pooling: str, terms: Mapping[str, float] = NO_TERMS) -> tuple[Learner, FitConfig]:
    config = FitConfig(LearnerConfig(**terms))
    torch.manual_seed(config.seed)
    model, tokenizer = create(ModelConfig(("small", "large"), TextConfig(pooling=pooling)))
    return Learner(model, tokenizer, config.learner), config


def embed(questions: Sequence[str]) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """pooling -> question -> pooled hidden state, one pass of the encoder for both poolings."""
    (cls, _), (mean, _) = start("cls"), start("mean")
    prepared = {question: prepare(cls.tokenizer, cls.model.config.text, question) for question in questions}
    order = sorted(questions, key=lambda question: len(prepared[question].ids))
    result: dict[str, dict[str, torch.Tensor]] = {"cls": {}, "mean": {}}
    for first in tqdm(range(0, len(order), 64), desc="embed", disable=None):
        batch = order[first : first + 64]
        ids, mask = collate([prepared[question] for question in batch])
        with torch.no_grad():
            hidden = cls.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        for name, learner in (("cls", cls), ("mean", mean)):
            pooled = learner.model.pool(hidden, mask)
            result[name] |= {question: pooled[row] for row, question in enumerate(batch)}
    return result


def held_out(
    rows: Sequence[Row],
    pools: Sequence[str],
    embedded: Mapping[str, torch.Tensor],
    pooling: str,
    terms: Mapping[str, float] = NO_TERMS,
) -> tuple[list[dict[str, Array]], Array, Array, int]:
    """([stage -> calibrated held-out quality (N, K)] by folding, observed (N, K), prompt lengths (N,), epochs)."""
    parsed = parse_pools(list(pools))
    examples = examples_of(rows, parsed)
    first, config = start(pooling, terms)
    items = first.items(examples, embeddings=[embedded[example.prompt] for example in examples])
    held, epochs = cross_fit(
        lambda: fresh(first.model, first.tokenizer, config.learner), items, foldings_of(examples, config), config
    )
    t_NK, d_NK = labels(examples, parsed.names)
    calibrated = calibrate(held[0].full, held[0].cheap, t_NK, d_NK, np.ones(len(examples)), parsed.names)
    quality = [
        {stage: calibration.apply(calibrated.stages[stage], getattr(one, stage))[0] for stage in calibration.STAGES}
        for one in held
    ]
    return quality, t_NK, np.array([len(example.prompt) for example in examples], float), epochs


def comparison(rows: Sequence[Row], embedded: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """[CLS] and mean pooling, full and wide alone, both rules; questions and, where there are many, groups held out."""
    by_cls, observed, length, epochs = held_out(rows, MIXTRAL_GPT4, embedded["cls"], "cls")
    by_mean, _, _, mean_epochs = held_out(rows, MIXTRAL_GPT4, embedded["mean"], "mean")
    small, large = observed.T
    lines = [
        f"{len(length)} prompts; all small {small.mean():.3f}, all large {large.mean():.3f};"
        f" perfect knowledge {apgr(large - small, small, large):.3f}; stopped after {epochs} epochs"
        f" (mean pooling {mean_epochs}). `cheap` is the wide part alone."
    ]
    for name, cls, mean in zip(("Questions", "Whole groups (subjects)"), by_cls, by_mean, strict=False):
        scores = scores_of(cls, length)
        scores["gain (full, mean pooling)"] = scores_of({"full": mean["full"]}, length)["gain (full)"]
        lines += [f"{name} held out:", apgr_table(measure(scores, small, large))]
    return lines


def losses(title: str, rows: Sequence[Row], embedded: Mapping[str, torch.Tensor]) -> str:
    """APGR of both rules with each set of terms; every one stopped where its own held-out loss is least."""
    lines = []
    for name, terms in TERMS.items():
        by_folding, observed, _, epochs = held_out(rows, MIXTRAL_GPT4, embedded, "cls", terms)
        cells = []
        for quality in by_folding:
            scores = routing_scores(quality["full"])
            cells += [f"{apgr(scores[rule], *observed.T):.3f}" for rule in ("gain", "difficulty")]
        lines.append((name, *cells, epochs))
    header = ["terms", "gain", "difficulty", "gain, groups held out", "difficulty, groups held out"]
    return f"{title}, APGR:\n\n" + table(lines, (*header[: len(lines[0]) - 1], "epochs"))


def paper_table(
    title: str, rows: Sequence[Row], pools: Sequence[str], embedded: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str]:
    """Quality and large share at the paper's thresholds under difficulty, and under gain, the coin's beside each."""
    (quality, *_), observed, length, _ = held_out(rows, pools, embedded["cls"], "cls")
    small, large = observed.T
    measured = measure(scores_of({"full": quality["full"]}, length), small, large)

    def cells(rule: str, thresholds: Sequence[float]) -> list[tuple[str, ...]]:
        found = at_thresholds(quality["full"], observed, rule, thresholds)
        return [
            (rule, f"{at['threshold']:g}", f"{at['large_share']:.3f}", f"{at['quality']:.3f}", f"{at['coin']:.3f}")
            for at in found
        ]

    def said(m: Measured) -> str:
        return f"{m.apgr:.3f} [{m.low:.3f}, {m.high:.3f}]"

    return [
        f"### {title}",
        f"All small {small.mean():.3f}, all large {large.mean():.3f}. APGR: "
        + "; ".join(f"{name} {said(m)}" for name, m in measured.items()),
        table(
            cells("difficulty", PAPER) + cells("gain", GAIN), ("rule", "threshold", "large share", "quality", "coin")
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
