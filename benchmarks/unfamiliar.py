"""Benchmark of routing on kinds of prompt that a fit has not seen, and of the fallback for unfamiliar prompts.

    python benchmarks/unfamiliar.py --data DIR --out benchmarks/results/unfamiliar.md

DIR/outcomes holds outcome tables as JSON lines, DIR/pools.json the models of two pools, {"small": [...], "large":
[...]}; models that no table has are left out. Each source is left out once: what `fit` fits to all others predicts it.
Prompts are embedded once, because the encoder is frozen.

Shapes: N prompts, K pools, H heads, D encoder width, R bootstrap resamples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, Familiarity, calibrate_quality
from depo_gateway.estimator.heads import labels_by_head, split_heads
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.similarity import Similarity, held_out_distances, usual_centres
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.bootstrap import draw_counts, percentile_interval
from depo_gateway.training.evaluation.markdown import table, with_interval
from depo_gateway.training.evaluation.routing_metrics import routing_scores, share_curve
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import LARGE_FOLDS, Fit, fit_heads
from depo_gateway.training.fitting.epoch_fit import new_learner
from depo_gateway.training.fitting.familiarity import FAR, NEAR, pool_means, weighted_quantiles
from depo_gateway.training.fitting.foldings import foldings_of, questions_of
from depo_gateway.training.fitting.held_out import HeldOutLogits
from depo_gateway.training.fitting.linear_fit import Design, assign, columns_of, held_out_logits, solve
from depo_gateway.training.outcomes.table import (
    Pools,
    Row,
    examples_of,
    folds_of,
    parse_pools,
    question_key,
    read_table,
)

POOLS = ("small", "large")
HEADS = ("quality",)  # no table has token confidence
BALANCE = 0.25
CALIBRATION_FOLDS = 5  # of the fits that lack a source
NEW_FOLDS = 5  # to measure the coverage of new questions
MMLU = "mmlu_mixtral_gpt4"
MIXTRAL_GPT4 = ("small=mistralai/Mixtral-8x7B-Instruct-v0.1", "large=gpt-4-1106-preview")
KINDS = {  # of each source; "": no other is of its kind
    "mmlu": "exams", "mmlu_pro": "exams", "llmrouter": "exams", "gsm8k": "mathematics", "math_l5": "mathematics",
    "crux": "code", "code_exec": "code", "arena_bench": "chat", "mt_bench": "chat", "ja_chat": "chat",
    "ifeval": "", "bbh": "", "openai_evals": "",
}  # fmt: skip
FARS = (None, 0.99, 0.97, 0.95, 0.9, 0.8, 0.5)  # quantiles; None: no prompt is unfamiliar
FEWEST_GROUPS = 8  # that are resampled
RESAMPLES = 1000
LEVEL = 0.05  # of all tests together
AIM_COVERAGE = 0.5
AIM_BIAS = 0.1

METHOD = f"""\
Each source is predicted by a fit to all others: the default of `depo-train fit --balance {BALANCE}` (linear heads, wide
part, centres), for the two pools of DIR/pools.json. The ridge penalty, {{penalty:g}}, is found once, by
cross-validation on all sources. Qualities are calibrated as `fit` does (Platt), on predictions of the other sources
that are held out in {CALIBRATION_FOLDS} folds by question. A prompt is unfamiliar if it is farther from the fitted
prompts' centres than {FAR:.0%} of new prompts like these (FAR); from {NEAR:.0%} on (NEAR) its qualities are drawn to
the pools' means. *Coverage* is the share of prompts that are not unfamiliar.

APGR: random is 0.5. *gain* and *difficulty* are the two rules as they are served: familiar prompts are ranked by their
scores, unfamiliar ones are routed at random at the same share of large calls. APGR is the expected value over these
random draws, which has a closed form. *All by gain*: every prompt is ranked by its prediction, however far it is.
*Length*: by the number of characters. *Gap*: mean quality of large less that of small; where it is small, APGR is
uncertain. Brackets: 95% bootstrap interval, {RESAMPLES:,} resamples of groups where a source has {FEWEST_GROUPS} or
more, else of prompts. *p*: one-sided, for gain being below random; *below* random is what stays significant at
{LEVEL:g} after Holm's correction for all sources."""
BIAS = """\
Mean predicted less mean observed quality of each pool. *Served*: calibrated, and drawn to the pools' means where a
prompt is far from the fitted ones. *Prediction alone*: calibrated only. *Means alone*: the pools' mean quality in the
fit for every prompt."""
RISK = f"""\
FAR is the quantile of distances beyond which a prompt is unfamiliar; NEAR is {NEAR:g}, or FAR where that is lower. The
first columns are about the sources left out, as above. The last two are the cost where the fit knows the kind: a fit to
the MMLU table alone (Mixtral-8x7B and GPT-4), its questions held out in {LARGE_FOLDS} folds. There coverage is FAR by
construction."""
KNOWN = f"""\
The fit to all sources, its questions held out in {LARGE_FOLDS} folds: what routing is like where the fit knows the
source. *New questions*: coverage of a fifth of the questions by centres of the others. Over all prompts, by their
weight in the fit, it is {{coverage:.1%}}; FAR promises {FAR:.0%}."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit measured of its own prompts: calibration, held-out distances, labels and weights."""

    calibration: Calibration
    distances: Array  # (N,)
    labels: Array  # (N, K)
    weights: Array  # (N,)


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts, and how a fit that has not seen them predicts them."""

    examples: Sequence[Example]
    logits: Array  # (N, K, H)
    distances: Array  # (N,)
    fitted: Fitted

    def rows(self, rows: NDArray[np.int64]) -> Case:
        examples = [self.examples[row] for row in rows]
        return replace(self, examples=examples, logits=self.logits[rows], distances=self.distances[rows])

    @property
    def observed(self) -> Array:
        return labels_by_head(self.examples, POOLS, HEADS)["quality"]


@dataclass(frozen=True, slots=True)
class Routing:
    """What a routing gains on random routing, and the gap between the pools: measured, and in each resample."""

    gained: float  # mean quality over all shares of large calls, less that of random routing
    gap: float  # mean quality of large less that of small
    gained_draws: Array  # (R,)
    gap_draws: Array  # (R,)

    @property
    def apgr(self) -> float:
        return 0.5 + self.gained / self.gap if self.gap > 0 else float("nan")

    @property
    def apgr_draws(self) -> Array:
        """NaN where large is no better than small."""
        gap = np.where(self.gap_draws > 0, self.gap_draws, np.nan)
        return np.asarray(0.5 + self.gained_draws / gap)

    @property
    def p_below(self) -> float:
        """One-sided p-value of being below random. It needs no gap."""
        return (1 + int((self.gained_draws >= 0).sum())) / (1 + len(self.gained_draws))


@dataclass(frozen=True, slots=True)
class Line:
    """One source's figures at the default NEAR and FAR."""

    name: str
    prompts: int
    coverage: float
    gain: Routing
    everything: Routing
    difficulty: Routing
    length: Routing
    served_bias: Array  # (K,)
    predicted_bias: Array
    means_bias: Array


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with outcomes/*.jsonl and pools.json")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: stdout)")
    args = parser.parse_args()
    try:
        rows, pools = read_data(args.data)
        examples = examples_of(rows, pools, BALANCE)
        mmlu = examples_of(list(read_table(args.data / "outcomes" / f"{MMLU}.jsonl")), parse_pools(MIXTRAL_GPT4))
    except (OSError, ValueError) as error:
        sys.exit(f"unfamiliar.py: {error}")
    sources = sources_of(rows, examples)
    embeddings = embed([*examples, *mmlu])
    items = items_of(examples, embeddings)
    known, penalty = cross_fitted(examples, items)
    known_mmlu, _ = cross_fitted(mmlu, items_of(mmlu, embeddings))
    cases = {
        name: left_out(examples, items, sources == name, penalty)
        for name in tqdm(np.unique(sources).tolist(), desc="leave out", unit="source", disable=None)
    }
    familiar = new_questions_familiar(examples, items)
    text = page(cases, penalty, (known, sources, familiar), known_mmlu, time.process_time() / 60)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    return 0


def read_data(data: Path) -> tuple[list[Row], Pools]:
    """All tables' rows, and the pools with the models that a table has. Raises ValueError for what is missing."""
    paths = sorted((data / "outcomes").glob("*.jsonl"))
    for needed in (data / "pools.json", data / "outcomes" / f"{MMLU}.jsonl"):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing; --data names a directory with pools.json and outcomes/*.jsonl")
    rows = [row for path in paths for row in read_table(path)]
    known = {model for row in rows for model in row.correct}
    named = json.loads((data / "pools.json").read_text(encoding="utf-8"))
    if not isinstance(named, dict) or set(named) != set(POOLS):
        raise ValueError(f"{data / 'pools.json'} is not an object of the pools {' and '.join(POOLS)}")
    return rows, Pools(POOLS, tuple(tuple(model for model in named[pool] if model in known) for pool in POOLS))


def sources_of(rows: Sequence[Row], examples: Sequence[Example]) -> NDArray[np.str_]:
    """The source of each example (N,). Sources of one benchmark, such as llmrouter_logicgrid, are one."""
    source: dict[tuple[str, str], str] = {}
    for row in rows:
        stem = row.source.partition("_")[0]
        name = row.source if row.source in KINDS or stem not in KINDS else stem
        source.setdefault((question_key(row.question), row.context), name)
    return np.array([source[question_key(example.prompt), example.context] for example in examples])


def untrained(prompts: int) -> Learner:
    """A learner with the usual centres for a fit to so many prompts."""
    config = ModelConfig(POOLS, TextConfig(), heads=HEADS, centres=usual_centres(prompts))
    return new_learner(*create_model(config), LearnerConfig())


def embed(examples: Sequence[Example]) -> dict[tuple[str, str], torch.Tensor]:
    """The embedding of each distinct prompt and context."""
    distinct = list({(example.prompt, example.context): example for example in examples}.values())
    distinct.sort(key=lambda example: len(example.prompt) + len(example.context))  # saves padding
    learner = untrained(len(examples))
    embeddings: dict[tuple[str, str], torch.Tensor] = {}
    for start in tqdm(range(0, len(distinct), 512), desc="embed", disable=None):
        part = distinct[start : start + 512]
        for example, item in zip(part, learner.items(part), strict=True):
            assert item.embedding is not None
            embeddings[example.prompt, example.context] = item.embedding
    return embeddings


def items_of(examples: Sequence[Example], embeddings: Mapping[tuple[str, str], torch.Tensor]) -> list[Item]:
    of = [embeddings[example.prompt, example.context] for example in examples]
    return untrained(len(examples)).items(examples, embeddings=of)


def cross_fitted(examples: Sequence[Example], items: Sequence[Item]) -> tuple[Case, float]:
    """(the examples as `fit` predicts them with questions held out, the penalty)."""
    fit: Fit = fit_heads(untrained(len(items)), items, foldings_of(examples, LARGE_FOLDS, 0))
    assert fit.distances is not None
    fitted = fitted_of(items, fit.held_out[0], fit.distances)
    return Case(examples, fit.held_out[0].full, fit.distances, fitted), float(fit.settings["penalty"]["quality"])


def fitted_of(items: Sequence[Item], held_out: HeldOutLogits, distances: Array) -> Fitted:
    labels, weights = np.array([item.quality for item in items]), np.array([item.weight for item in items])
    calibrated = calibrate(held_out.full, held_out.cheap, {"quality": labels}, weights, POOLS)
    return Fitted(calibrated, distances, labels, weights)


def left_out(examples: Sequence[Example], items: Sequence[Item], source: NDArray[np.bool_], penalty: float) -> Case:
    """The source's examples as a fit to all others predicts them."""
    others, unseen = np.flatnonzero(~source).tolist(), np.flatnonzero(source).tolist()
    mean = sum(items[i].weight for i in others) / len(others)
    train = [replace(items[i], weight=items[i].weight / mean) for i in others]
    learner = untrained(len(train))
    learner.fit_statistics(train)
    learner.settle()
    design = Design(learner.model, train)
    foldings = [folds_of(questions_of([examples[i] for i in others]), CALIBRATION_FOLDS, 0)]
    labels = torch.tensor([item.quality for item in train], dtype=torch.float64)
    columns = columns_of(labels, torch.tensor([item.weight for item in train], dtype=torch.float64), foldings)
    found = solve(design, columns, penalty)
    stages = held_out_logits(design, found, 0, foldings, len(POOLS))
    count = columns.targets.shape[1]
    assign(learner.model, design, found.select(np.arange(count - len(POOLS), count)))
    own = held_out_distances(states_of(train, learner.model.width), learner.model.config.centres)
    held_out = HeldOutLogits(*(split_heads(stage, len(HEADS)) for stage in stages))
    tested = [items[i] for i in unseen]
    distances = distances_from(learner.model.similarity, states_of(tested, learner.model.width))
    logits, _ = learner.predict(tested)
    return Case([examples[i] for i in unseen], logits, distances, fitted_of(train, held_out, own.double().numpy()))


def distances_from(similarity: Similarity, states_ND: torch.Tensor) -> Array:
    with torch.no_grad():
        distances: Array = similarity.distances(similarity.cosines(states_ND)).double().numpy()
    return distances


def states_of(items: Sequence[Item], width: int) -> torch.Tensor:
    """What centres and distances read of each prompt (N, D)."""
    return torch.stack([item.embedding for item in items if item.embedding is not None])[:, width:]


def new_questions_familiar(examples: Sequence[Example], items: Sequence[Item]) -> NDArray[np.bool_]:
    """Whether each prompt (N,) is familiar to a fit to the other folds' questions."""
    width = untrained(len(items)).model.width
    states, weights = states_of(items, width), np.array([item.weight for item in items])
    folds = folds_of(questions_of(examples), NEW_FOLDS, 0)
    familiar = np.zeros(len(items), np.bool_)
    for fold in range(NEW_FOLDS):
        train, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        similarity = Similarity(usual_centres(len(train)), width, 0)
        similarity.place(states[train])
        own = held_out_distances(states[train], len(similarity.centres)).double().numpy()
        (far,) = weighted_quantiles(own, weights[train], (FAR,))
        familiar[unseen] = distances_from(similarity, states[unseen]) <= far
    return familiar


def served(case: Case, far: float | None) -> tuple[Array, NDArray[np.bool_]]:
    """(calibrated quality (N, K) as it is served, which prompts (N,) are familiar) with FAR at a quantile."""
    fitted, familiarity = case.fitted, None
    familiar = np.ones(len(case.distances), np.bool_)
    if far is not None:
        near, beyond = weighted_quantiles(fitted.distances, fitted.weights, (min(NEAR, far), far))
        familiarity = Familiarity(near, beyond, pool_means(fitted.labels, fitted.weights))
        familiar = case.distances <= familiarity.far
    logits = replace(fitted.calibration, familiarity=familiarity).trusted(case.logits, case.distances)
    return calibrate_quality(fitted.calibration.stages["full"], logits), familiar


def area_gained(score: Array, familiar: NDArray[np.bool_], small: Array, large: Array) -> float:
    """Mean quality over all shares of large calls, less that of random routing. Unfamiliar prompts are random."""
    if not familiar.any():
        return 0.0
    small, large = small[familiar], large[familiar]
    share, quality = share_curve(score[familiar], small, large)
    random = float(small.mean() + large.mean()) / 2
    return (float(np.trapezoid(quality, share)) - random) * float(familiar.mean())


def routing_of(case: Case, score: Array, familiar: NDArray[np.bool_] | None = None) -> Routing:
    """A routing by the score, high where the large pool should serve. None: every prompt is familiar."""
    complete = ~np.isnan(case.observed).any(1)
    small, large = case.observed[complete].T
    score = score[complete]
    known = np.ones(len(score), np.bool_) if familiar is None else familiar[complete]
    numbers = np.unique([example.task for example in case.examples], return_inverse=True)[1][complete]
    if len(set(numbers)) < FEWEST_GROUPS:
        numbers = np.arange(len(score))
    numbers = np.unique(numbers, return_inverse=True)[1]
    gained, gaps = [], []
    for times in draw_counts(int(numbers.max()) + 1, RESAMPLES, np.random.default_rng(0)):
        rows = np.repeat(np.arange(len(score)), times[numbers])
        gained.append(area_gained(score[rows], known[rows], small[rows], large[rows]))
        gaps.append(float((large - small)[rows].mean()))
    gap = float((large - small).mean())
    return Routing(area_gained(score, known, small, large), gap, np.array(gained), np.array(gaps))


def line_of(name: str, case: Case) -> Line:
    quality, familiar = served(case, FAR)
    alone, _ = served(case, None)
    observed, scores = case.observed, routing_scores(quality)
    means = np.tile(pool_means(case.fitted.labels, case.fitted.weights), (len(quality), 1))
    return Line(
        name,
        len(case.examples),
        float(familiar.mean()),
        routing_of(case, scores["gain"], familiar),
        routing_of(case, routing_scores(alone)["gain"]),
        routing_of(case, scores["difficulty"], familiar),
        routing_of(case, np.array([len(example.prompt) for example in case.examples], float)),
        *(np.nanmean(of - observed, 0) for of in (quality, alone, means)),
    )


def holm(p_values: Sequence[float]) -> NDArray[np.bool_]:
    """Which hypotheses Holm's step-down procedure rejects, at LEVEL for all together."""
    order = np.argsort(p_values, kind="stable")
    passed = np.array(p_values)[order] * np.arange(len(order), 0, -1) <= LEVEL
    rejected = np.zeros(len(order), np.bool_)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def page(
    cases: Mapping[str, Case],
    penalty: float,
    known: tuple[Case, NDArray[np.str_], NDArray[np.bool_]],
    mmlu: Case,
    minutes: float,
) -> str:
    """`known`: all examples with questions held out, their sources, and which are familiar as new questions."""
    lines = [line_of(name, case) for name, case in cases.items()]
    coverage = np.average(known[2], weights=known[0].fitted.weights)
    parts = [
        "# Kinds of prompt that the fit has not seen",
        "`python benchmarks/unfamiliar.py --data DIR --out benchmarks/results/unfamiliar.md`",
        METHOD.format(penalty=penalty),
        "## The aims",
        *aims(lines),
        "## Each source left out",
        routing_table(lines),
        "## Predicted quality of sources left out",
        BIAS,
        bias_table(lines),
        "## Risk and coverage",
        RISK,
        risk_table(cases, mmlu),
        "## Sources that the fit knows",
        KNOWN.format(coverage=coverage),
        known_table(*known),
        f"Fits took {minutes:.0f} minutes of CPU time.",
    ]
    return "\n\n".join(parts) + "\n"


def aims(lines: Sequence[Line]) -> list[str]:
    """A paragraph on each aim: what it is, and whether it is met."""
    unsure = [f"{of.name} ({of.gain.p_below:.3f})" for of in lines if of.gain.p_below <= LEVEL]
    gain, length = (mean_apgr([getattr(of, name) for of in lines]) for name in ("gain", "length"))
    draws = [of.gain.apgr_draws for of in lines if of.gain.gap > 0]
    against = [of.gain.apgr_draws - of.length.apgr_draws for of in lines if of.gain.gap > 0]
    shown_gain = with_interval(gain, *percentile_interval(np.mean(draws, 0)))
    difference = with_interval(gain - length, *percentile_interval(np.mean(against, 0)), "+")
    kinds = [KINDS.get(of.name, "") for of in lines]
    shared = [of for of, kind in zip(lines, kinds, strict=True) if kind and kinds.count(kind) > 1]
    rare = [f"{of.name} ({of.coverage:.1%})" for of in shared if of.coverage < AIM_COVERAGE]
    biased = [f"{of.name} ({worst(of.served_bias):+.2f})" for of in lines if abs(worst(of.served_bias)) > AIM_BIAS]
    of_means = sum(abs(worst(of.means_bias)) > AIM_BIAS for of in lines)
    return [
        f"1. No source is below random after Holm's correction: {verdict(below(lines, 'gain'), len(lines))}. Before the"
        f" correction p is {LEVEL:g} or less for {len(unsure)}{': ' * bool(unsure)}{', '.join(unsure)}. All by gain,"
        f" without the fallback: {verdict(below(lines, 'everything'), len(lines))}.",
        "2. APGR of gain, mean over sources, is at or above that of prompt length:"
        f" {'met' if gain >= length else 'MISSED'}, {shown_gain} against {length:.3f}, {difference}.",
        f"3. At least {AIM_COVERAGE:.0%} of a source is familiar where the fit has another source of its kind:"
        f" {verdict(rare, len(shared))}.",
        f"4. Served qualities are off by {AIM_BIAS:.2f} or less on average, for each pool and source:"
        f" {verdict(biased, len(lines))}. The pools' means alone would miss it for {of_means}: a source's mean quality"
        " also depends on which models of a pool it has.",
    ]


def below(lines: Sequence[Line], routing: str) -> list[str]:
    """The sources that a routing serves worse than random routing does, after Holm's correction."""
    rejected = holm([getattr(of, routing).p_below for of in lines])
    return [of.name for of, worse in zip(lines, rejected, strict=True) if worse]


def verdict(missing: Sequence[str], count: int) -> str:
    return f"MISSED by {len(missing)} of {count}: {', '.join(missing)}" if missing else f"met by all {count}"


def mean_apgr(routings: Sequence[Routing]) -> float:
    """Over the sources whose large pool is better."""
    return float(np.nanmean([of.apgr for of in routings]))


def worst(biases: Array) -> float:
    return float(biases[np.abs(biases).argmax()])


def shown(routing: Routing) -> str:
    return with_interval(routing.apgr, *percentile_interval(routing.apgr_draws))


def routing_table(lines: Sequence[Line]) -> str:
    header = (
        "source", "kind", "prompts", "gap", "coverage", "gain", "p", "random", "all by gain", "difficulty", "length",
    )  # fmt: skip
    others = ("everything", "difficulty", "length")
    rows = []
    for of in lines:
        gain = (shown(of.gain), f"{of.gain.p_below:.3f}", "BELOW" if of.name in below(lines, "gain") else "not below")
        apgrs = [f"{getattr(of, name).apgr:.3f}" for name in others]
        kind = KINDS.get(of.name) or "none"
        rows.append((of.name, kind, of.prompts, f"{of.gain.gap:+.3f}", f"{of.coverage:.0%}", *gain, *apgrs))
    means = [f"{mean_apgr([getattr(of, name) for of in lines]):.3f}" for name in ("gain", *others)]
    coverage = f"{np.mean([of.coverage for of in lines]):.0%}"
    return table([*rows, ("mean", "", "", "", coverage, means[0], "", "", *means[1:])], header)


def bias_table(lines: Sequence[Line]) -> str:
    biases = np.array([[*of.served_bias, *of.predicted_bias, *of.means_bias] for of in lines])
    rows = []
    for of, own in zip(lines, biases, strict=True):
        met = "met" if abs(worst(of.served_bias)) <= AIM_BIAS else "MISSED"
        rows.append((of.name, *(f"{bias:+.3f}" for bias in own), met))
    rows.append(("mean absolute", *(f"{bias:.3f}" for bias in np.abs(biases).mean(0)), ""))
    ways = [f"{way}, {pool}" for way in ("served", "prediction alone", "means alone") for pool in POOLS]
    return table(rows, ("source", *ways, f"aim {AIM_BIAS:.2f}"))


def risk_table(cases: Mapping[str, Case], mmlu: Case) -> str:
    header = ("FAR", "coverage", "APGR", "below random", f"bias above {AIM_BIAS:.2f}", "MMLU: coverage", "MMLU: APGR")
    rows = []
    for far in FARS:
        coverages, routings, biased = [], [], 0
        for case in cases.values():
            routing, quality, coverage = by_gain(case, far)
            routings.append(routing)
            coverages.append(coverage)
            biased += bool(np.abs(np.nanmean(quality - case.observed, 0)).max() > AIM_BIAS)
        below = int(holm([routing.p_below for routing in routings]).sum())
        at_home, _, kept = by_gain(mmlu, far)
        name = "no fallback" if far is None else f"{far:g}" + " (default)" * (far == FAR)
        figures = (f"{np.mean(coverages):.0%}", f"{mean_apgr(routings):.3f}", below, biased)
        rows.append((name, *figures, f"{kept:.0%}", shown(at_home)))
    return table(rows, header)


def by_gain(case: Case, far: float | None) -> tuple[Routing, Array, float]:
    """(routing by gain, the quality (N, K) that is served, coverage) with FAR at a quantile."""
    quality, familiar = served(case, far)
    return routing_of(case, routing_scores(quality)["gain"], familiar), quality, float(familiar.mean())


def known_table(known: Case, sources: NDArray[np.str_], new_familiar: NDArray[np.bool_]) -> str:
    header = (
        "source", "prompts", "coverage", "new questions", "gain", "all by gain", "length", "bias, small", "bias, large",
    )  # fmt: skip
    rows = []
    for name in np.unique(sources).tolist():
        own = np.flatnonzero(sources == name)
        of = line_of(name, known.rows(own))
        shares = (f"{of.coverage:.0%}", f"{new_familiar[own].mean():.0%}")
        apgrs = (shown(of.gain), f"{of.everything.apgr:.3f}", f"{of.length.apgr:.3f}")
        rows.append((name, of.prompts, *shares, *apgrs, *(f"{bias:+.3f}" for bias in of.served_bias)))
    return table(rows, header)


if __name__ == "__main__":
    sys.exit(main())
