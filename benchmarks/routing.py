"""Benchmark of the estimator's routing, cross-fitted on outcome tables: APGR, and the paper's routing table.

    python benchmarks/routing.py --data DIR --out benchmarks/results/routing.md [--only trunk]

DIR/outcomes holds the tables named in SOURCES, as JSON lines. Every figure is held out: 5 folds grouped by question, or
by subject where stated. Prompts are embedded once, in both poolings, because the encoder is frozen; each fold fits the
heads and the wide part.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import STAGES, calibrate_quality
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, collate, create_model
from depo_gateway.estimator.text import TextConfig, prepare
from depo_gateway.training.evaluation.markdown import apgr_table, table, with_interval
from depo_gateway.training.evaluation.report import scores_by_name
from depo_gateway.training.evaluation.routing_metrics import apgr, at_thresholds, measure_apgr
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import EPOCH_FOLDS
from depo_gateway.training.fitting.epoch_fit import cross_fit_epochs, new_learner
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.foldings import foldings_of, groups_of
from depo_gateway.training.outcomes.table import Row, examples_of, parse_pools, read_table

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
DEFAULT = "linear + wide (the default)"
DROPOUT: Mapping[str, float] = {"dropout": True}
TRUNKS: Mapping[str, tuple[bool, bool, Mapping[str, float]]] = {  # wide, trunk, the learner's settings
    DEFAULT: (True, False, NO_TERMS),
    "trunk + wide": (True, True, DROPOUT),
    "trunk alone": (False, True, DROPOUT),
}
METHOD = """\
APGR: random 0.5. Predictions are held out, in 5 folds. Where questions are held out, scores are centred by fold before
they are ranked together (`routing_metrics.centre_by_fold`), and the 95% bootstrap intervals resample prompts. Where
whole groups are held out, scores are not centred, because differences between groups are part of what is predicted, and
the intervals resample groups. Differences are paired.

The figures are slightly optimistic: the number of epochs is the one at which these same held-out predictions are best,
and the encoder's layer and the learning rates were chosen on these folds too. Qualities at thresholds are calibrated
(Platt, two numbers per pool and stage) on the held-out predictions that they are shown for."""
TERMS_NOTE = """\
Each row stops after the epoch at which its own held-out loss is lowest, at learning rates that were chosen for the
first row's terms. With the ranking term that is after 1 to 5 epochs, where a single epoch makes a large difference. The
table therefore shows the effect of adding a term to this recipe; it does not show that ranking hurts at every learning
rate."""
TRUNK_TITLE = "## The trunk"
TRUNK_NOTE = """\
Comparison of heads on the frozen encoder: linear heads, or DEPO's trunk (5 million weights, AdamW at the paper's 2e-4,
dropout) with and without the wide part. Loss terms and question folds are the same; each fit stops after the epoch at
which its own held-out loss is lowest (the trunk after two epochs without improvement). Differences are paired, with 95%
bootstrap intervals over prompts; the error is the mean squared error of the small pool's calibrated quality. The trunk
alone has no cheap stage."""
PAPER = (0.3, 0.5, 0.7, 0.75)  # the paper's thresholds
GAIN = (0.7, 0.8, 0.85, 0.9, 0.95)  # the confidence of gain has another scale: it is one minus a loss of quality


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with outcomes/*.jsonl")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    parser.add_argument("--only", choices=("trunk",), help="replace this section alone in the file at --out")
    args = parser.parse_args()
    started = time.monotonic()
    if args.only is not None:
        return only_trunk(args.data, args.out)
    tables = {name: list(read_table(args.data / "outcomes" / f"{name}.jsonl")) for name in SOURCES}
    embedded = embed(sorted({row.question for rows in tables.values() for row in rows}))
    parts = [
        "# Routing, cross-fitted",
        f"`python benchmarks/routing.py --data DIR --out benchmarks/results/routing.md`; {platform.machine()},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}.",
        METHOD,
    ]
    for name in SOURCES[:2]:
        parts += [f"## {name}", *comparison(tables[name], embedded)]
    parts += ["## The terms of the loss", TERMS_NOTE]
    parts += [losses(name, tables[name], embedded["cls"]) for name in SOURCES[:2]]
    parts += trunks({name: tables[name] for name in SOURCES[:2]}, embedded["cls"])
    parts.append("## The paper's routing table")
    parts.append(
        "Trained and measured on the named source only. `random` is the quality of sending prompts to the large model"
        " at random at the same share. Prompts with a confidence at or above the threshold stay in the small pool."
        " Thresholds apply to uncentred qualities."
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


def only_trunk(data: Path, out: Path | None) -> int:
    """Replaces the section on the trunk in the file."""
    tables = {name: list(read_table(data / "outcomes" / f"{name}.jsonl")) for name in SOURCES[:2]}
    embedded = embed(sorted({row.question for rows in tables.values() for row in rows}))
    section = "\n\n".join(trunks(tables, embedded["cls"]))
    if out is None:
        sys.stdout.write(section + "\n")
        return 0
    before, _, after = out.read_text(encoding="utf-8").partition(TRUNK_TITLE + "\n")
    rest = after if after else before
    following = "## The paper's routing table"
    head = before if after else rest[: rest.index(following)]
    out.write_text(f"{head}{section}\n\n{rest[rest.index(following) :]}", encoding="utf-8")
    return 0


def start(
    pooling: str, terms: Mapping[str, float] = NO_TERMS, wide: bool = True, trunk: bool = False
) -> tuple[Learner, FitConfig]:
    config = FitConfig(LearnerConfig(**terms), patience=2 if trunk else FitConfig().patience)
    torch.manual_seed(config.seed)
    model, tokenizer = create_model(
        ModelConfig(("small", "large"), TextConfig(pooling=pooling), wide=wide, trunk=trunk)
    )
    return Learner(model, tokenizer, config.learner), config


def embed(questions: Sequence[str]) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Pooled hidden states by pooling and question, from one pass of the encoder for both poolings."""
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


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out predictions by folding, questions first, then, if the table has groups, groups."""

    quality: Sequence[Mapping[str, Array]]  # stage -> calibrated quality (N, K)
    observed: Array  # (N, K)
    length: Array  # (N,)
    epochs: int
    folds: NDArray[np.int64]  # (N,) of the questions
    groups: NDArray[np.int64]  # (N,)

    def scores(self, folding: int) -> dict[str, Array]:
        """Routing scores, centred by fold where questions are held out."""
        return scores_by_name(self.quality[folding], self.length, None if folding else self.folds)


def held_out(
    rows: Sequence[Row],
    pools: Sequence[str],
    embedded: Mapping[str, torch.Tensor],
    pooling: str,
    terms: Mapping[str, float] = NO_TERMS,
    wide: bool = True,
    trunk: bool = False,
    foldings_wanted: int = 2,
) -> HeldOut:
    """Cross-fits one recipe on one table, with the first `foldings_wanted` foldings."""
    parsed = parse_pools(list(pools))
    examples = examples_of(rows, parsed)
    first, config = start(pooling, terms, wide, trunk)
    items = first.items(examples, embeddings=[embedded[example.prompt] for example in examples])
    foldings = foldings_of(examples, EPOCH_FOLDS, config.seed)[:foldings_wanted]
    predictions, epochs = cross_fit_epochs(
        lambda: new_learner(first.model, first.tokenizer, config.learner), items, foldings, config
    )
    labels = labels_by_head(examples, parsed.names)
    calibrated = calibrate(predictions[0].full, predictions[0].cheap, labels, np.ones(len(examples)), parsed.names)
    quality = [
        {stage: calibrate_quality(calibrated.stages[stage], getattr(one, stage)) for stage in STAGES}
        for one in predictions
    ]
    length = np.array([len(example.prompt) for example in examples], float)
    _, groups = np.unique(groups_of(examples), return_inverse=True)
    return HeldOut(quality, labels["quality"], length, epochs, foldings[0], groups)


def comparison(rows: Sequence[Row], embedded: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """[CLS] and mean pooling, full and cheap stage, both rules; with questions and, if any, groups held out."""
    cls = held_out(rows, MIXTRAL_GPT4, embedded["cls"], "cls")
    mean = held_out(rows, MIXTRAL_GPT4, embedded["mean"], "mean")
    small, large = cls.observed.T
    lines = [
        f"{len(cls.length)} prompts; all small {small.mean():.3f}, all large {large.mean():.3f};"
        f" perfect knowledge {apgr(large - small, small, large):.3f}; stopped after {cls.epochs} epochs"
        f" (mean pooling {mean.epochs}). `cheap` is the wide part alone."
    ]
    titles = ("Questions held out:", f"Whole groups held out (subjects, {cls.groups.max() + 1} of them):")
    for folding, title in enumerate(titles[: len(cls.quality)]):
        scores = cls.scores(folding)
        scores["gain (full, mean pooling)"] = mean.scores(folding)["gain (full)"]
        lines += [title, apgr_table(measure_apgr(scores, small, large, groups=cls.groups if folding else None))]
    return lines


def losses(title: str, rows: Sequence[Row], embedded: Mapping[str, torch.Tensor]) -> str:
    """APGR of both rules with each set of terms; each fit stops where its own held-out loss is lowest."""
    lines = []
    for name, terms in TERMS.items():
        fit = held_out(rows, MIXTRAL_GPT4, embedded, "cls", terms)
        cells = []
        for folding in range(len(fit.quality)):
            scores = fit.scores(folding)
            cells += [f"{apgr(scores[f'{rule} (full)'], *fit.observed.T):.3f}" for rule in ("gain", "difficulty")]
        lines.append((name, *cells, fit.epochs))
    header = ["terms", "gain", "difficulty", "gain, groups held out", "difficulty, groups held out"]
    return f"{title}, APGR:\n\n" + table(lines, (*header[: len(lines[0]) - 1], "epochs"))


def trunks(tables: Mapping[str, Sequence[Row]], embedded: Mapping[str, torch.Tensor]) -> list[str]:
    """APGR of both rules with different heads on the encoder, paired against the default, questions held out."""
    parts = [TRUNK_TITLE, TRUNK_NOTE]
    for source, rows in tables.items():
        fits, seconds = {}, {}
        for name, (wide, trunk, settings) in TRUNKS.items():
            began = time.monotonic()
            fits[name] = held_out(rows, MIXTRAL_GPT4, embedded, "cls", settings, wide, trunk, foldings_wanted=1)
            seconds[name] = time.monotonic() - began
        small, large = fits[DEFAULT].observed.T
        rules = {
            rule: measure_apgr(
                {name: one.scores(0)[f"{rule} (full)"] for name, one in fits.items()}, small, large, DEFAULT
            )
            for rule in ("gain", "difficulty")
        }
        lines = []
        for name, one in fits.items():
            cells = []
            for of in (rules["gain"][name], rules["difficulty"][name]):
                against = with_interval(of.difference, of.difference_low, of.difference_high, "+")
                cells += [f"{of.apgr:.3f}", "" if name == DEFAULT else against]
            error = ((one.quality[0]["full"][:, 0] - small) ** 2).mean()
            lines.append((name, *cells, f"{error:.4f}", one.epochs, f"{seconds[name]:.0f}"))
        header = ("on the encoder", "gain", "against the default", "difficulty", "against the default")
        parts.append(f"{source}, APGR:\n\n" + table(lines, (*header, "error", "epochs", "seconds")))
    return parts


def paper_table(
    title: str, rows: Sequence[Row], pools: Sequence[str], embedded: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str]:
    """Quality and large share at the paper's thresholds under difficulty, and under gain, beside random routing."""
    fit = held_out(rows, pools, embedded["cls"], "cls")
    quality, observed = fit.quality[0], fit.observed
    small, large = observed.T
    estimates = measure_apgr(
        {name: score for name, score in fit.scores(0).items() if not name.endswith("(cheap)")}, small, large
    )

    def cells(rule: str, thresholds: Sequence[float]) -> list[tuple[str, ...]]:
        found = at_thresholds(quality["full"], observed, rule, thresholds)
        return [
            (rule, f"{at['threshold']:g}", f"{at['large_share']:.3f}", f"{at['quality']:.3f}", f"{at['coin']:.3f}")
            for at in found
        ]

    return [
        f"### {title}",
        f"All small {small.mean():.3f}, all large {large.mean():.3f}. APGR: "
        + "; ".join(f"{name} {with_interval(of.apgr, of.low, of.high)}" for name, of in estimates.items()),
        table(
            cells("difficulty", PAPER) + cells("gain", GAIN), ("rule", "threshold", "large share", "quality", "random")
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
