"""Selector: the prompts of each generation by one of the rules in selectors/, handed out as tickets.

A generation's life: take() before it, report() for each group, step() when the policy has learned from them. The rules
choose; what is common to them is here: candidates from one stream of the data set, the surplus of a choice
carried over to the next, exploration of rejects, tickets, locking, state.

Shapes: P prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.learner import Learner
from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import Group, GroupLabel
from depo_gateway.training.rl.pass_rate_belief import PassRateBeliefs
from depo_gateway.training.rl.prompt_estimates import PromptEstimates
from depo_gateway.training.rl.prompt_stream import PromptStream
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selectors.guarded_rule import GuardedRule
from depo_gateway.training.rl.selectors.in_order import InOrder
from depo_gateway.training.rl.selectors.names import rule_of
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule
from depo_gateway.training.rl.ticket_book import TicketBook, numbers, plain_values
from depo_gateway.training.rl.tickets import InFlight, Ticket

SCHEMA = 2  # of state_dict(); 1, without a number, had no tickets and no rules of their own
EXPLORING, CHOOSING = 1, 7  # streams of random numbers
SUMMED = ("depo/scored", "depo/explored", "depo/seconds_scoring")  # metrics that add up over several choices


class Selector:
    """A PromptSelector. Chooses by a rule, and trains the estimator on the rewards."""

    def __init__(
        self,
        prompts: Sequence[str],
        config: SelectionConfig,
        learner: Learner | None = None,
        seed: int = 0,
        score: Callable[[Sequence[str]], Array] | None = None,
        rule: SelectionRule | None = None,
        block: int = 1,
    ) -> None:
        """
        Args:
            prompts: as the estimator reads them, by row.
            score: prompts -> logits (P, K, 2), by default the learner's own; a trainer of many processes shares the
                work out.
            rule: by default the one that the configuration names.
            block: at least so many prompts are chosen together, for trainers that take them one by one: of a single
                prompt nothing can be ranked or explored.
        """
        self.rule = rule or rule_of(config)
        self._guarded = GuardedRule(self.rule, config.rule if rule is None else type(rule).__name__)
        self._guarded.state_dict()  # raises for a state that a checkpoint could not hold
        if self.rule.heads and learner is None:
            raise ValueError(f"the selection rule {config.rule!r} needs an estimator to score prompts with")
        self.prompts, self.config, self.learner, self.seed, self.block = prompts, config, learner, seed, block
        self.stream = PromptStream(len(prompts), seed)
        self.estimates = PromptEstimates(prompts, config, self.rule.heads, learner, seed, score)
        self.tickets = TicketBook()
        self.steps = 0  # generations learned from
        self.choices = 0
        self._in_order = InOrder()
        self._rng = np.random.default_rng([seed, CHOOSING])
        self._carried: list[int] = []
        self._explored = [0, 0]  # groups, and those of them that had a non-zero advantage
        self._rejected = 0
        self._metrics: dict[str, float] = {}  # of the choices since take_metrics()
        self._lock = threading.RLock()

    @property
    def active(self) -> bool:
        """Whether the rule decides already; until the warm-up is over every prompt is taken in its turn."""
        return self.rule.selective and self.steps >= self.config.warmup_steps

    @property
    def beliefs(self) -> PassRateBeliefs:
        """The estimates of the prompts' pass rates."""
        return self.estimates.beliefs

    # --- PromptSelector ---

    def take(self, count: int) -> list[Ticket]:
        """Tickets for `count` rollouts. Never stalls: a prompt is repeated only if every other one is in flight."""
        if count < 0:
            raise ValueError(f"take({count}): the number of tickets must be 0 or more")
        with self._lock:
            taken = self.tickets.take(count)
            while len(taken) < count:
                self._choose(max(self.block, count - len(taken)))
                taken += self.tickets.take(count - len(taken))
            return taken

    def report(self, ticket: Ticket | int, rewards: Sequence[float | None], log_probs: Sequence[float] = ()) -> bool:
        if len(rewards) != self.config.group_size:
            raise ValueError(
                f"report() got {len(rewards)} rewards, but a group has {self.config.group_size} rollouts; give None "
                "for a rollout without a reward"
            )
        with self._lock:
            return self.tickets.report(_id_of(ticket), rewards, log_probs)

    def release(self, ticket: Ticket | int) -> bool:
        with self._lock:
            return self.tickets.release(_id_of(ticket))

    def expire(self, steps: int) -> int:
        with self._lock:
            return sum(map(self.tickets.release, self.tickets.unreported_before(self.steps - steps)))

    def step(self) -> dict[str, float]:
        """Learn from the groups reported since the last call. Prompts chosen but not taken yet are ranked anew.

        The metrics include those of take_metrics() if they were not asked for.
        """
        with self._lock:
            began = time.perf_counter()
            metrics = self.take_metrics()
            groups = self.tickets.settle()
            if self.rule.selective:
                labels = self._labels(groups)
                terms = self.estimates.learn(labels, self.steps)
                own = self._guarded.learn(labels)
                metrics |= {**self._step_metrics(labels), **own, **terms}
                metrics["depo/seconds_updating"] = time.perf_counter() - began
            self.steps += 1
            waiting, self.tickets.waiting = self.tickets.waiting, []
            for ticket in waiting:
                if ticket.propensity < 1.0:  # explored prompts are not ranked, and their propensity stays true
                    self.tickets.waiting.append(ticket)
            self._carried = [ticket.row for ticket in waiting if ticket.propensity == 1.0] + self._carried
            self.estimates.forget_scores(self._carried)
            return metrics

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the choices since the last call: counts and seconds are summed, shares are the first choice's."""
        with self._lock:
            metrics, self._metrics = self._metrics, {}
            return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything but the learner that decides the next choices, as values for JSON."""
        with self._lock:
            return {
                "schema": SCHEMA,
                "config": asdict(self.config),
                "size": len(self.prompts),
                "seed": self.seed,
                "stream": [self.stream.epoch, self.stream.cursor],
                "steps": self.steps,
                "choices": self.choices,
                "carried": [[row, *plain_values(self.estimates.logits(row))] for row in self._carried],
                "explored": list(self._explored),
                "rejected": self._rejected,
                **self.estimates.state_dict(),
                "tickets": self.tickets.state_dict(),
                "random": self._rng.bit_generator.state,
                "rule": self._guarded.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any], in_flight: InFlight = "again") -> None:
        """As PromptSelector's. Raises ValueError for another data set, seed or configuration, or a newer format."""
        if state.get("schema", 1) > SCHEMA:
            raise ValueError(
                f"the state of the prompt selection has schema {state['schema']}, but this version of depo-gateway "
                f"reads schemas up to {SCHEMA}; resume with the version that wrote it or a newer one"
            )
        here = {"prompts": len(self.prompts), "seed": self.seed, **asdict(self.config)}
        there = {"prompts": state["size"], "seed": state["seed"], "options": {}, **state["config"]}
        if changed := [
            f"{name} {there.get(name)}, not {value}" for name, value in here.items() if there.get(name) != value
        ]:
            raise ValueError(f"the run to resume chose its prompts with {'; '.join(changed)}")
        with self._lock:
            epoch, cursor = state["stream"]
            self.stream = PromptStream(len(self.prompts), self.seed, epoch, cursor)
            self.steps, self.choices, self._rejected = state["steps"], state["choices"], state["rejected"]
            self._explored = list(state["explored"])
            self._carried = [row for row, *_ in state["carried"]]
            self.estimates.load_state_dict(state, {row: (*numbers(logits),) for row, *logits in state["carried"]})
            self.tickets, self._metrics = TicketBook(), {}
            if "tickets" in state:
                self.tickets.load_state_dict(state["tickets"], in_flight)
                self._rng.bit_generator.state = state["random"]
                self._guarded.load_state_dict(state["rule"])

    # --- choosing ---

    def _choose(self, count: int) -> None:
        """Issue tickets for up to `count` different prompts: fewer if not as many are without a ticket."""
        began = time.perf_counter()
        self.choices += 1
        excluded = self.tickets.rows()
        if len(excluded) >= len(self.prompts):
            excluded = set()
        need = min(count, len(self.prompts) - len(excluded))
        candidates = Candidates(
            self.estimates, self.config, self.stream, self._carried, excluded, self.steps, self._rng
        )
        selection = (self._guarded if self.active else self._in_order).select(need, candidates)
        chosen, rejected = self._fill(need, selection, excluded)
        explored, rate = self._explore(rejected, need // 2)
        chosen = chosen[: need - len(explored)]
        self._carried = list(selection.accepted[len(chosen) :])
        if self.rule.heads and not self.active:  # to measure the predictions, and to calibrate them
            candidates.logits(chosen)
        self._issue(chosen, 1.0)
        self._issue(explored, rate)
        if self.rule.selective:
            skipped = len(candidates.offered.keys() - {*selection.accepted, *selection.rejected, *chosen})
            rejects = len(rejected) - len(explored) + skipped
            self._rejected += rejects
            scored = len(candidates.scored) if selection.scored is None else selection.scored
            self._record_choice(need, rejects, scored, len(explored), time.perf_counter() - began)

    def _record_choice(self, need: int, rejects: int, scored: int, explored: int, seconds: float) -> None:
        metrics = {
            "depo/kept": (need - explored) / (need + rejects),
            "depo/scored": float(scored),
            "depo/explored": float(explored),
            "depo/epoch": self.stream.epoch + self.stream.cursor / self.stream.size,
            "depo/seconds_scoring": seconds,
        }
        sums = {name: self._metrics.get(name, 0.0) + metrics[name] for name in SUMMED}
        self._metrics = {**metrics, **self._metrics, **sums}

    def _fill(self, need: int, selection: Selection, excluded: set[int]) -> tuple[list[int], list[int]]:
        """(rows to roll out, rejects that are left): if too few are accepted, the best rejects, then the stream's next.

        Such a reject is chosen for certain, so its propensity is 1.
        """
        accepted, rejected = list(selection.accepted), list(selection.rejected)
        short = max(0, need - len(accepted))
        chosen = dict.fromkeys(accepted + rejected[:short])
        left = rejected[short:]
        while len(chosen) < need:  # the data set is small, or most of it is in flight
            rows = self.stream.draw(need - len(chosen))
            chosen |= dict.fromkeys(row for row in rows if row not in excluded)
        return list(chosen), left

    def _explore(self, rejects: Sequence[int], most: int) -> tuple[list[int], float]:
        """(rejects to roll out nevertheless, the probability of each). At most `most` rejects.

        If there are many, the probability is lowered. It is the same for all of them, whatever their rank, so that what
        is seen of them is true of all rejects.
        """
        if not rejects or not self.config.explore:
            return [], 1.0
        rate = min(self.config.explore, most / len(rejects))
        rng = np.random.default_rng([self.seed, self.choices, EXPLORING])
        count = int(rate * len(rejects) + rng.random())  # rounded up or down so that its mean is exact
        return rng.choice(np.array(rejects), min(count, most), replace=False).tolist(), rate

    def _issue(self, rows: Sequence[int], propensity: float) -> None:
        logits = [self.estimates.logits(row) for row in rows]
        if self.rule.heads:
            predicted = self.estimates.pass_rates(np.array([mean for mean, _ in logits])).tolist()
        else:
            predicted = self._guarded.predicted(rows)
        for row, scores, mean in zip(rows, logits, predicted, strict=True):
            self.tickets.issue(row, self.steps, propensity, scores, mean)

    # --- learning ---

    def _labels(self, groups: Sequence[tuple[Ticket, Group]]) -> list[GroupLabel]:
        """What the groups teach, without those that have no reward."""
        labels = []
        for ticket, group in groups:
            label = self.estimates.label(ticket, group, self.steps)
            if label is None:
                continue
            labels.append(label)
            if ticket.propensity < 1.0:
                self._explored = [self._explored[0] + 1, self._explored[1] + (label.spread > 0)]
        return labels

    def _step_metrics(self, labels: Sequence[GroupLabel]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if labels:
            metrics["depo/pass_rate"] = sum(label.quality for label in labels) / len(labels)
            metrics["depo/zero_advantage_share"] = sum(label.spread == 0 for label in labels) / len(labels)
        explored, useful = self._explored
        if explored:
            metrics["depo/false_reject_rate"] = useful / explored
        if "explore" in self.rule.reads:  # without rejects nothing tells how many of them had an advantage
            saved = self._rejected * self.config.group_size * (1.0 - (useful / explored if explored else 0.0))
            metrics["depo/rollouts_saved_estimate"] = saved
        return {**metrics, **self.estimates.metrics()}


def _id_of(ticket: Ticket | int) -> int:
    return ticket if isinstance(ticket, int) else ticket.id
