"""Choosing prompts whose difficulty is in their words: a policy simulated by the real outcomes of many models.

    python -m benchmarks.depo.simulated --data DIR --out DIR --report FILE.md

Models are ranked by accuracy. At strength s in [0, 1] the policy's pass rate of a question is the mean of the models'
outcomes on it, weighted by a Gaussian over ranks around the s-th; a group is G draws of that rate. No policy is
trained: s rises by 1/target with each informative group learned from, because a group of equal rewards has no gradient.
So every method meets the same policies in the same order, and methods differ in the completions that each stretch
costs. If s rose with steps, methods would improve without informative groups.

`DIR` has a JSON-lines file a question set, {"source", "question", "correct": {model: 0 or 1}}. Runs with a result file
in `--out` are skipped, so an interrupted benchmark continues.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.depo.catalog import method_of, parse
from benchmarks.depo.methods import Method
from benchmarks.depo.simulated_estimator import DEPO, Items, TextDepo, embedded, text_depo
from benchmarks.depo.simulated_policy import Domain, auroc_of, expected_auroc, read, text_limits
from benchmarks.depo.simulated_report import report
from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.pass_rate_belief import nonzero_advantage

Row = dict[str, Any]
FILES = {"gsm8k": "gsm8k_many_models.jsonl", "math_l5": "math_l5_many_models.jsonl"}
DOMAINS = {"gsm8k": ("gsm8k",), "mixed": ("gsm8k", "math_l5")}
UNREAD = "depo-plus@trunk_learning_rate=0"  # its estimator never learns: only the memory of each prompt is left
# Without DAPO's clipping, which only changes the loss, and DEPO without distillation: there are no log-probabilities
METHODS = ("grpo", "dapo", "polaris", "greso", "mopps", "depo", "depo-noranking", "depo-plus", UNREAD, "oracle")
DRAWS = 12  # a stream of random numbers


@dataclass(frozen=True, slots=True)
class RunConfig:
    target: int = 600  # informative groups until the policy has its full strength
    need: int = 16  # prompts a step
    group_size: int = 8
    width: float = 3.0  # of the Gaussian over ranks
    held_out: float = 0.2
    rows: int = 10  # of the history
    rounds: int = 10  # generations a step at most, for a method that samples until enough groups are informative
    patience: int = 60  # the run ends after so many times `target` groups


@dataclass(slots=True)
class Books:
    """The cost of a run, step by step: cumulative completions, and informative groups learned from."""

    completions: list[int] = field(default_factory=lambda: [0])
    learned: list[int] = field(default_factory=lambda: [0])


class Run:
    """A simulated policy, a method that chooses its prompts, and what the run costs."""

    def __init__(self, train: Domain, held_out: Domain, config: RunConfig, method: Method, seed: int) -> None:
        self.train, self.held_out, self.config, self.method = train, held_out, config, method
        self.draws = np.random.default_rng([seed, DRAWS])
        self.books = Books()
        self.generated = self.informative = 0  # groups
        self.first_pass = 0  # steps until every training question was offered once; 0: not yet
        self.chosen: list[tuple[float, float, bool]] = []  # predicted rate, length, informative; since the last row
        self.drawn = 0  # groups so far
        self.seconds = 0.0  # CPU, of choosing and observing

    @property
    def strength(self) -> float:
        return min(1.0, self.books.learned[-1] / self.config.target)

    def go(self) -> list[Row]:
        """The history of the whole run."""
        config = self.config
        history: list[Row] = []
        self.method.prepare(self.roll_out, self.exact)
        while self.books.learned[-1] < config.target:
            self.step()
            if self.strength >= (len(history) + 1) / config.rows:
                history.append(self.row())
            if self.drawn > config.patience * config.target:
                break
        return history

    def step(self) -> None:
        config, method, began = self.config, self.method, time.process_time()
        groups: list[Group] = []
        need, informative = config.need, 0
        for _ in range(config.rounds if method.dynamic else 1):
            tickets = method.choose(need)
            new = self.roll_out([ticket.row for ticket in tickets])
            for group, ticket in zip(new, tickets, strict=True):
                self.chosen.append(
                    (ticket.predicted, float(len(self.train.questions[group.row])), is_informative(group))
                )
            groups += new
            informative = sum(map(is_informative, groups))
            if informative >= config.need:
                break
            need = method.refill(config.need, config.need - informative, 1 - informative / len(groups))
        method.observe(groups)
        self.seconds += time.process_time() - began
        self.generated += len(groups)
        self.informative += informative
        # a method that samples until it has enough discards the surplus
        learned = min(informative, config.need) if method.dynamic else informative
        self.books.learned.append(self.books.learned[-1] + learned)
        self.books.completions.append(self.drawn * config.group_size)
        if not self.first_pass and epoch_of(method):
            self.first_pass = len(self.books.learned) - 1

    def roll_out(self, indices: Sequence[int]) -> list[Group]:
        """A group of each question, charged to the run. These models have no token log-probabilities."""
        rates = self.train.rates(self.strength, self.config.width)[list(indices)]
        passed = self.draws.random((len(indices), self.config.group_size)) < rates[:, None]
        self.drawn += len(indices)
        return [Group(i, tuple(map(float, group))) for i, group in zip(indices, passed.tolist(), strict=True)]

    def exact(self, indices: Sequence[int]) -> list[Group]:
        """For the oracle: the pass rates themselves, free of charge."""
        rates = self.train.rates(self.strength, self.config.width)
        return [Group(i, (float(rates[i]),)) for i in indices]

    def row(self) -> Row:
        predicted, length, informative = np.array(self.chosen, dtype=np.float64).T
        self.chosen = []
        known = np.isfinite(predicted)
        row: Row = {
            "strength": self.strength,
            "accuracy": float(self.train.rates(self.strength, self.config.width).mean()),
            "completions": self.books.completions[-1],
            "learned": self.books.learned[-1],
            "zero_share": 1.0 - float(informative.mean()),
            "length_when_chosen": auroc_of(length, informative),
            "when_chosen": auroc_of(nonzero_advantage(predicted[known], self.config.group_size), informative[known]),
            **self.on_held_out(),
        }
        return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}

    def on_held_out(self) -> Row:
        """AUROCs for a non-zero advantage on questions never trained on, in all and by source."""
        truth = nonzero_advantage(self.held_out.rates(self.strength, self.config.width), self.config.group_size)
        scores = {"length": np.array([float(len(question)) for question in self.held_out.questions])}
        sources = sorted(set(self.held_out.sources))
        if len(sources) > 1:
            scores["source"] = np.array([float(source == sources[-1]) for source in self.held_out.sources])
        row: Row = {}
        if isinstance(self.method, TextDepo):
            rates, scores["text"] = self.method.judge(self.held_out.questions)
            actual = self.held_out.rates(self.strength, self.config.width)
            row = {"predicted": float(rates.mean()), "actual": float(actual.mean())}
            row["error"] = float(np.abs(rates - actual).mean())
        for name, score in scores.items():
            row[f"held_out_{name}"] = expected_auroc(score, truth)
            for source in sources if len(sources) > 1 and name != "source" else ():
                rows = [i for i, of in enumerate(self.held_out.sources) if of == source]
                row[f"held_out_{name}_{source}"] = expected_auroc(score[rows], truth[rows])
        return row


def is_informative(group: Group) -> bool:
    return max(group.rewards) > min(group.rewards)


def epoch_of(method: Method) -> int:
    """How many times a method has gone through the training questions."""
    return method.selector.stream.epoch


def grpo_steps(domain: Domain, config: RunConfig) -> int:
    """The expected number of steps that GRPO takes to the target."""
    share = [
        float(nonzero_advantage(domain.rates(strength, config.width), config.group_size).mean())
        for strength in np.linspace(0.0, 1.0, 101)
    ]
    return round(config.target * float(np.mean(1.0 / np.array(share))) / config.need)


def work(name: str, domain: Domain, seed: int, config: RunConfig, items: Items) -> Row:
    """One run."""
    train, held_out = domain.split(config.held_out, seed)
    steps = grpo_steps(train, config)
    method: Method
    if parse(name)[0] in DEPO:
        method = text_depo(name, train.questions, seed, steps, config.group_size, items)
    else:
        wanted = "oracle@refresh=1" if name == "oracle" else name
        method = method_of(wanted, train.questions, seed, steps, config.group_size)[0]
    run, began = Run(train, held_out, config, method, seed), time.process_time()
    history = run.go()
    return {
        "method": name,
        "seed": seed,
        "config": asdict(config),
        "questions": [len(train.questions), len(held_out.questions)],
        "models": len(domain.models),
        "grpo_steps": steps,
        "generated": run.generated,
        "informative": run.informative,
        "first_pass": run.first_pass,
        "passes": epoch_of(method),
        "cpu_seconds": round(time.process_time() - began, 2),
        "books": asdict(run.books),
        "history": history,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depo.simulated", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=f"directory of {', '.join(FILES.values())}")
    parser.add_argument("--out", type=Path, default=Path("runs/depo-simulated"), help="for results (%(default)s)")
    parser.add_argument("--report", type=Path, help="Markdown file to write, with a plot beside it")
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--target", type=int, default=RunConfig().target, help="informative groups a run (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = RunConfig(target=options.target)
    items: Items = {}
    results: dict[str, list[Row]] = {}
    ceilings: dict[str, list[Row]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in options.methods:
            parse(name)
        for domain_name in options.domains:
            domain = read([options.data / FILES[source] for source in DOMAINS[domain_name]])
            for seed in options.seeds:  # seed by seed, so that an interrupted benchmark has complete comparisons
                for name in options.methods:
                    path = options.out / f"{domain_name}-{name}-seed{seed}.json"
                    if not path.exists():
                        save(path, work(name, domain, seed, config, items))
                    result = json.loads(path.read_text(encoding="utf-8"))
                    results.setdefault(domain_name, []).append(result)
                    print(line(domain_name, result), flush=True)
            if options.report is not None:
                embeddings_ND = embedded(domain.questions, items)
                ceilings[domain_name] = text_limits(domain, embeddings_ND, config.width, config.group_size)
    except ValueError as error:
        parser.error(str(error))
    if options.report is not None:
        report(results, ceilings, options.report)
    return 0


def save(path: Path, result: Row) -> None:
    """Write a result file atomically."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(path)


def line(domain: str, result: Row) -> str:
    cost = result["books"]["completions"][-1] / max(1, result["books"]["learned"][-1])
    texts = [row["held_out_text"] for row in result["history"] if row.get("held_out_text") is not None]
    text = f", AUROC {np.mean(texts):.3f} of unseen questions" if texts else ""
    return (
        f"{domain} {result['method']} seed {result['seed']}: {cost:.1f} completions an informative group,"
        f" {result['passes']} passes{text}, {result['cpu_seconds']} CPU s"
    )


if __name__ == "__main__":
    sys.exit(main())
