"""One run: a method, a seed, a budget of completions. All rollouts of the method are charged to the budget.

The life of a step: the method chooses prompts, the policy rolls them out, a dynamic method asks for more until enough
groups are informative, the policy learns, the method observes. At equal distances in completions the policy is
evaluated on held-out prompts (not charged, because it is the same for all methods) and a row of the history is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.depo.estimated import Depo
from benchmarks.depo.grpo import Gradients, GrpoConfig, Rollout, Trainer
from benchmarks.depo.methods import EASY, HOPELESS, Method, kind_of
from benchmarks.depo.policy import Policy
from benchmarks.depo.task import Task, roll_out
from depo_gateway.training.evaluation.routing_metrics import auroc
from depo_gateway.training.rl.group_labels import Group

EVALUATION = 7  # seed of the evaluation's sampling, the same for all methods
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoopConfig:
    budget: int = 32768  # completions
    need: int = 16  # prompts a step
    group_size: int = 8
    rows: int = 8  # of the history, besides the first
    samples: int = 4  # completions of each held-out prompt
    rounds: int = 10  # generations a step at most; then DAPO's own code fails, ours continues with what it has


@dataclass(slots=True)
class Interval:
    """The events between two rows of the history."""

    kinds: list[int] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)  # informative groups in each step's update
    metrics: dict[str, float] = field(default_factory=dict)


class Run:
    """A policy, a trainer and a method, and what they cost."""

    def __init__(
        self,
        policy: Policy,
        train: Task,
        held_out: Task,
        grpo: GrpoConfig,
        config: LoopConfig,
        method: Method,
        seed: int,
    ) -> None:
        self.policy, self.train, self.held_out, self.config, self.method = policy, train, held_out, config, method
        self.trainer = Trainer(policy, grpo)
        self.generator = torch.Generator().manual_seed(seed)
        self.aside = torch.Generator().manual_seed(seed + 1000)  # of free rollouts, for the oracle
        self.completions = self.tokens = self.steps = 0
        self.seconds: dict[str, float] = dict.fromkeys(
            ("generate", "reward", "update", "choose", "observe", "oracle", "evaluate"), 0.0
        )
        self.interval = Interval()

    def go(self, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
        """The history of the whole run."""
        config = self.config
        history = [self.row()]
        report(history[-1])
        every = config.budget / config.rows
        self.method.prepare(self.counted, self.free)
        while self.completions < config.budget:
            self.step()
            if self.completions >= every * len(history) - config.need * config.group_size / 2:
                history.append(self.row())
                report(history[-1])
        return history

    def step(self) -> None:
        config, method = self.config, self.method
        rollouts: list[Rollout] = []
        need = config.need
        for _ in range(config.rounds if method.dynamic else 1):
            with self.clock("choose"):
                tickets = method.choose(need)
            new = self.roll_out([ticket.row for ticket in tickets])
            rollouts += new
            self.interval.predicted += [ticket.predicted for ticket in tickets]
            self.interval.actual += [float(np.mean(rollout.rewards)) for rollout in new]
            informative = sum(rollout.informative for rollout in rollouts)
            if informative >= config.need or self.completions >= config.budget:
                break
            need = method.refill(config.need, config.need - informative, 1 - informative / len(rollouts))
            if len(rollouts) + need > len(self.train.prompts):  # the step has used up the data set
                break
        groups = [group_of(rollout) for rollout in rollouts]
        self.interval.kinds += [kind_of(group) for group in groups]
        if method.dynamic:
            rollouts = [rollout for rollout in rollouts if rollout.informative][: config.need]
        self.interval.learned.append(sum(rollout.informative for rollout in rollouts))
        with self.clock("update"):
            self.trainer.step(rollouts)
        with self.clock("observe"):
            self.interval.metrics = method.observe(groups)
        self.steps += 1

    def roll_out(self, indices: Sequence[int]) -> list[Rollout]:
        """Completions of training prompts with their rewards, charged to the budget."""
        with self.clock("generate"):
            sampled = roll_out(self.policy, self.train, indices, self.config.group_size, self.generator)
        with self.clock("reward"):
            rollouts = [
                Rollout(
                    index, self.train.encoded[index], tuple(group), tuple(self.train.reward(index, c) for c in group)
                )
                for index, group in zip(indices, sampled, strict=True)
            ]
        self.completions += self.config.group_size * len(indices)
        self.tokens += sum(len(completion.tokens) for group in sampled for completion in group)
        return rollouts

    def counted(self, indices: Sequence[int]) -> list[Group]:
        return [group_of(rollout) for rollout in self.roll_out(indices)]

    def free(self, indices: Sequence[int]) -> list[Group]:
        """Rollouts that are not charged, for the oracle."""
        with self.clock("oracle"):
            sampled = roll_out(self.policy, self.train, indices, self.config.group_size, self.aside)
            return [
                Group(index, tuple(self.train.reward(index, completion) for completion in group))
                for index, group in zip(indices, sampled, strict=True)
            ]

    def row(self) -> Row:
        """Evaluate, and summarise the interval that ends here."""
        interval, gradients = self.interval, self.trainer.gradients
        self.interval, self.trainer.gradients = Interval(), Gradients()
        with self.clock("evaluate"):
            evaluation = self.evaluate()
        groups = max(1, len(interval.kinds))
        predicted, actual = np.array(interval.predicted), np.array(interval.actual)
        known = np.isfinite(predicted)
        chosen = {}
        if known.any():
            chosen = {"predicted": float(predicted[known].mean()), "actual": float(actual[known].mean())}
            chosen["prediction_error"] = float(np.abs(predicted[known] - actual[known]).mean())
        return {
            "completions": self.completions,
            "tokens": self.tokens,
            "steps": self.steps,
            **evaluation,
            "generated_right": interval.kinds.count(EASY) / groups,
            "generated_wrong": interval.kinds.count(HOPELESS) / groups,
            "groups": len(interval.kinds),
            "learned": float(np.mean(interval.learned)) if interval.learned else 0.0,
            **chosen,
            **gradients.summary(),
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "method": {name: value for name, value in interval.metrics.items() if np.isfinite(value)},
        }

    def evaluate(self) -> dict[str, float]:
        """Pass@1 on held-out prompts by sampling and, for a method with an estimator, how well it predicts."""
        generator = torch.Generator().manual_seed(EVALUATION)
        indices = range(len(self.held_out.prompts))
        sampled = roll_out(self.policy, self.held_out, indices, self.config.samples, generator)
        rates = np.array(
            [np.mean([self.held_out.reward(i, c) for c in group]) for i, group in zip(indices, sampled, strict=True)]
        )
        spread = (rates > 0) & (rates < 1)
        scores = {"accuracy": float(rates.mean()), "held_out_zero_share": 1.0 - float(spread.mean())}
        if isinstance(self.method, Depo):
            predicted = self.method.predict(self.held_out.prompts)
            scores["held_out_error"] = float(np.abs(predicted - rates).mean())
            for name, score, truth in (
                ("auroc_difficulty", predicted, rates > 0.5),
                ("auroc_informative", -np.abs(predicted - 0.5), spread),
            ):
                if 0 < truth.sum() < len(truth):
                    scores[name] = auroc(score, truth)
        return scores

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[phase] += time.process_time() - began


def group_of(rollout: Rollout) -> Group:
    """A rollout for a selector: rewards, and each completion's mean token log-probability."""
    return Group(rollout.index, rollout.rewards, tuple(float(np.mean(c.log_probs)) for c in rollout.completions))
