"""Which prompts to roll out: DEPO's filter before the rollout (arXiv 2602.06375), and what we add to it.

A run's life: choose() before each generation, observe() after it. The rule `off` takes prompts in order, as GRPO does;
`band` is the paper's; `informative` ranks by the probability that the rollouts will differ. One stream serves all.

Shapes: P prompts, G rollouts a group.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Learner
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.routing_metrics import auroc, calibration_error
from depo_gateway.training.rl.group_labels import (
    Group,
    Label,
    Seen,
    is_binary,
    quality_of,
    spread_of,
    token_confidence_of,
)
from depo_gateway.training.rl.pass_rate_belief import WINDOW, Beliefs
from depo_gateway.training.rl.selection_config import POLICY, SPREAD, Choice, SelectionConfig, Stream

Array = NDArray[np.float64]
EXPLORING, REPLAYING = 1, 2  # streams of random numbers
UNKNOWN = (float("nan"), float("nan"))
HEAVIEST = 5.0  # of inverse-propensity weights: a kept reject at 5% would weigh 20 and drown its batch


class Selector:
    """Chooses the prompts of each generation and teaches the estimator what came of them."""

    def __init__(
        self,
        prompts: Sequence[str],
        config: SelectionConfig,
        learner: Learner | None = None,
        seed: int = 0,
        score: Callable[[Sequence[str]], Array] | None = None,
    ) -> None:
        """`prompts`: as the estimator reads them, by row. `score`: prompts -> logits (P, K, H), by default the
        learner's own; a trainer of many processes shares the work out.
        """
        if config.rule != "off" and learner is None:
            raise ValueError(f"the selection rule {config.rule!r} needs an estimator to score prompts with")
        self.prompts, self.config, self.learner, self.seed = prompts, config, learner, seed
        self.stream = Stream(len(prompts), seed)
        self.beliefs = Beliefs(config.calibrate, config.history_half_life)
        self.steps = 0  # policy steps observed
        self.choices = 0
        self.binary = True  # until a reward is neither of the two ends
        self._score = score or (learner.score if learner is not None else None)
        self._carried: list[int] = []
        self._in_step: set[int] = set()  # rows rolled out since the last observe()
        self._logits: dict[int, tuple[float, ...]] = {}  # of rows scored since then or carried: policy's, spread's
        self._propensity: dict[int, float] = {}
        self._replay: deque[Label] = deque(maxlen=config.replay)
        self._seen: deque[Seen] = deque(maxlen=WINDOW)
        self._explored = [0, 0]  # groups, and those of them that had a non-zero advantage
        self._rejected = 0

    @property
    def active(self) -> bool:
        """Whether prompts are filtered yet."""
        return self.config.rule != "off" and self.steps >= self.config.warmup_steps

    def choose(self, need: int) -> Choice:
        """`need` different prompts for the next generation. Before the next observe(): more of them, none again.

        Never stalls: when as many were scored as refill_cap allows, the best of the rejects fill up. Raises ValueError
        only if the data set has fewer prompts than are needed.
        """
        left = len(self.prompts) - len(self._in_step)
        if not 0 < need <= left:
            raise ValueError(f"a generation needs {need} more prompts, but the data set has {left} left")
        began = time.perf_counter()
        self.choices += 1
        explored: list[int] = []
        scored = rejected = 0
        if self.active:
            kept, explored, scored, rejected = self._filter(need)
        else:
            kept = self._take(need, self._in_step)
            if self.config.rule != "off":  # to see how well it predicts, and to calibrate
                self._score_rows(kept)
                scored = need
        self._in_step.update(kept)
        self._rejected += rejected
        metrics: dict[str, float] = {}
        if self.config.rule != "off":
            metrics = {
                "depo/kept": (need - len(explored)) / (need + rejected),
                "depo/scored": float(scored),
                "depo/explored": float(len(explored)),
                "depo/epoch": self.stream.epoch + self.stream.cursor / self.stream.size,
                "depo/seconds_scoring": time.perf_counter() - began,
            }
        predicted = tuple(self._predicted(row) for row in kept)
        return Choice(tuple(kept), predicted, tuple(self._propensity.get(row, 1.0) for row in kept), metrics)

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from the rollouts of the prompts chosen since the last call: one policy step. Returns metrics."""
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        if self.config.rule != "off":
            labels = [label for label in map(self._label, groups) if label is not None]
            terms = self._learn(labels)
            self.beliefs.refit()
            metrics = {**self._report(labels), **terms, "depo/seconds_updating": time.perf_counter() - began}
        self.steps += 1
        self._forget_step()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything but the learner that decides the next choice, as plain values for JSON. Between two steps."""
        return {
            "config": asdict(self.config),
            "size": len(self.prompts),
            "seed": self.seed,
            "stream": [self.stream.epoch, self.stream.cursor],
            "steps": self.steps,
            "choices": self.choices,
            "binary": self.binary,
            "carried": [[row, *_plain(self._logits.get(row, UNKNOWN))] for row in self._carried],
            "replay": [list(astuple(label)) for label in self._replay],
            "seen": [list(astuple(seen)) for seen in self._seen],
            "explored": list(self._explored),
            "rejected": self._rejected,
            "beliefs": self.beliefs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where state_dict() was taken. Raises ValueError for another data set, seed or configuration."""
        here = {"prompts": len(self.prompts), "seed": self.seed, **asdict(self.config)}
        there = {"prompts": state["size"], "seed": state["seed"], **state["config"]}
        if changed := [
            f"{name} {there.get(name)}, not {value}" for name, value in here.items() if there.get(name) != value
        ]:
            raise ValueError(f"the run to resume chose its prompts with {'; '.join(changed)}")
        epoch, cursor = state["stream"]
        self.stream = Stream(len(self.prompts), self.seed, epoch, cursor)
        self.steps, self.choices, self.binary = state["steps"], state["choices"], state["binary"]
        self._carried, self._rejected = [row for row, *_ in state["carried"]], state["rejected"]
        self._replay = deque((Label(*label) for label in state["replay"]), maxlen=self.config.replay)
        self._seen = deque((Seen(*seen) for seen in state["seen"]), maxlen=WINDOW)
        self._explored = list(state["explored"])
        self.beliefs.load_state_dict(state["beliefs"])
        self._forget_step()
        self._logits = {row: tuple(np.nan if x is None else x for x in logits) for row, *logits in state["carried"]}

    # --- choosing ---

    def _take(self, count: int, taken: set[int]) -> list[int]:
        """The next `count` rows that are not in `taken`: those carried over, then the stream's."""
        rows: dict[int, None] = {}
        while len(rows) < count:
            drawn = [self._carried.pop(0)] if self._carried else self.stream.draw(count - len(rows))
            rows |= dict.fromkeys(row for row in drawn if row not in taken)
        return list(rows)

    def _filter(self, need: int) -> tuple[list[int], list[int], int, int]:
        """(kept rows, those of them that are kept rejects, how many were scored, how many rejected)."""
        good, rejects, scored = self._band(need) if self.config.rule == "band" else self._informative(need)
        short = max(0, need - len(good))
        filled, rejects = rejects[:short], rejects[short:]  # surely kept, so their propensity is 1
        if len(good) + len(filled) < need:  # the data set is small, or most of it was rolled out in this step
            filled += self._take(need - len(good) - len(filled), {*self._in_step, *good, *filled, *rejects})
        lucky, rate = self._explore(rejects, need // 2)
        self._propensity |= dict.fromkeys(lucky, rate)
        kept = [*good, *filled][: need - len(lucky)]
        self._carried = good[len(kept) :] + self._carried
        return kept + lucky, lucky, scored, len(rejects) - len(lucky)

    def _explore(self, rejects: Sequence[int], most: int) -> tuple[list[int], float]:
        """(rejects to keep all the same, each one's chance of it). At most `most`; of many rejects the chance is less.

        All have the same chance, whatever their rank: what is seen of them is then true of all rejects.
        """
        if not rejects or not self.config.explore:
            return [], 1.0
        rate = min(self.config.explore, most / len(rejects))
        rng = np.random.default_rng([self.seed, self.choices, EXPLORING])
        count = int(rate * len(rejects) + rng.random())  # rounded up or down so that its mean is exact
        return rng.choice(np.array(rejects), min(count, most), replace=False).tolist(), rate

    def _band(self, need: int) -> tuple[list[int], list[int], int]:
        """Raw batches until enough lie in the band: (kept in order, rejects best first, how many were scored)."""
        low, high, cap = self.config.low, self.config.high, self._cap(need)
        taken = set(self._in_step)
        good = [row for row in self._carried if row not in taken]
        self._carried = []
        taken.update(good)
        distance: dict[int, float] = {}
        scored = 0
        while len(good) < need and scored < cap:
            raw = self.stream.draw(min(need, cap - scored))
            scored += len(raw)
            rows = [row for row in dict.fromkeys(raw) if row not in taken]
            taken.update(rows)
            predicted = self.beliefs.predicted(self._score_rows(rows)[:, 0])
            for row, p in zip(rows, predicted.tolist(), strict=True):
                if low <= p <= high:
                    good.append(row)
                else:
                    distance[row] = max(low - p, p - high)
        return good, sorted(distance, key=distance.__getitem__), scored

    def _informative(self, need: int) -> tuple[list[int], list[int], int]:
        """Rank the carried-over and new prompts: (likely ones best first, rejects best first, how many were scored)."""
        cap, wanted = self._cap(need), round(need * self.config.candidates)
        rows = [row for row in dict.fromkeys(self._carried) if row not in self._in_step]
        self._carried = []
        taken = self._in_step | set(rows)
        usable: dict[int, float] = {}
        drawn, missing = len(rows), max(wanted - len(rows), 0)
        while True:
            fresh = [row for row in dict.fromkeys(self.stream.draw(missing)) if row not in taken]
            taken.update(fresh)
            rows += fresh
            drawn += missing
            usable |= zip(rows, self._usable(rows, self._score_rows(rows)).tolist(), strict=True)
            good = sum(value >= self._cut() for value in usable.values())
            if good >= need or drawn >= cap:
                break
            rows, missing = [], min(need, cap - drawn)
        ranked = sorted(usable, key=lambda row: -usable[row])
        kept = min(good, wanted)  # what is good but too much for this batch and the next returns with the next epoch
        return ranked[:kept], ranked[kept:], len(usable)

    def _cap(self, need: int) -> int:
        return round(self.config.refill_cap * need) or len(self.prompts)

    def _cut(self) -> float:
        """What a prompt must be worth to count as good: likelier than not to have a non-zero advantage or, of graded
        rewards, half the usual spread."""
        if self.binary:
            return 0.5
        spreads = [seen.spread for seen in self._seen if seen.spread > 0]
        return 0.5 * sum(spreads) / len(spreads) if spreads else 0.5

    def _usable(self, rows: Sequence[int], logits_P2: Array) -> Array:
        """What each prompt (P,) is worth: the probability of a non-zero advantage or, of graded rewards, the spread."""
        if self.binary or SPREAD not in self.config.pools:
            return self.beliefs.nonzero_advantage(rows, logits_P2[:, 0], self.config.group_size, self.steps)
        return sigmoid(logits_P2[:, 1])

    def _score_rows(self, rows: Sequence[int]) -> Array:
        """Logits (P, 2): of the mean reward, and of its spread (NaN where the estimator has no head for it)."""
        logits_P2 = np.full((len(rows), 2), np.nan)
        if rows:
            assert self._score is not None
            scored = self._score([self.prompts[row] for row in rows])[:, :, QUALITY]
            logits_P2[:, : scored.shape[1]] = scored
        self._logits |= zip(rows, map(tuple, logits_P2.tolist()), strict=True)
        return logits_P2

    def _predicted(self, row: int) -> float:
        logit, _ = self._logits.get(row, UNKNOWN)
        return float(self.beliefs.predicted(np.array([logit]))[0])

    # --- learning ---

    def _label(self, group: Group) -> Label | None:
        """What a group teaches; None if no rollout has a reward. Also noted: how well it was predicted."""
        ends = self.config.reward_low, self.config.reward_high
        quality = quality_of(group.rewards, *ends)
        if quality is None:
            return None
        self.binary = self.binary and is_binary(group.rewards, *ends)
        spread = spread_of(group.rewards, *ends)
        propensity = self._propensity.get(group.index, 1.0)
        weight = min(1.0 / propensity, HEAVIEST)
        logits = self._logits.get(group.index, UNKNOWN)
        if np.isfinite(logits[0]):
            worth = float(self._usable([group.index], np.array([logits]))[0])
            self._seen.append(Seen(self._predicted(group.index), quality, worth, spread))
        if propensity < 1.0:
            self._explored = [self._explored[0] + 1, self._explored[1] + (spread > 0)]
        count = int(np.isfinite(group.rewards).sum())
        self.beliefs.learn(group.index, logits[0], quality, count, weight, self.steps)
        return Label(group.index, quality, spread, token_confidence_of(group.log_probs), weight)

    def _learn(self, labels: Sequence[Label]) -> dict[str, float]:
        """The estimator's updates: on these labels and, with replay, as many recent ones."""
        terms: dict[str, float] = {}
        if not labels:
            return terms
        assert self.learner is not None
        order = np.random.default_rng([self.seed, self.steps, REPLAYING])
        for _ in range(self.config.updates):
            again = order.choice(len(self._replay), min(len(labels), len(self._replay)), replace=False).tolist()
            batch = [*labels, *(self._replay[i] for i in again)]
            last = self.learner.step([self._example(label) for label in batch])
            terms = terms or last  # before any of this step's updates
        self._replay.extend(labels)
        return {f"depo/loss_{name}": value for name, value in terms.items()}

    def _example(self, label: Label) -> Example:
        quality = {POLICY: label.quality, SPREAD: label.spread}
        return Example(
            self.prompts[label.index],
            {pool: quality[pool] for pool in self.config.pools},
            {POLICY: label.token_confidence},
            label.weight,
        )

    def _report(self, labels: Sequence[Label]) -> dict[str, float]:
        """Metrics of a step; those of predictions are over the recent WINDOW groups."""
        metrics: dict[str, float] = {}
        if labels:
            metrics["depo/pass_rate"] = sum(label.quality for label in labels) / len(labels)
            metrics["depo/zero_advantage_share"] = sum(label.spread == 0 for label in labels) / len(labels)
        explored, useful = self._explored
        if explored:
            metrics["depo/false_reject_rate"] = useful / explored
        saved = self._rejected * self.config.group_size * (1.0 - (useful / explored if explored else 0.0))
        metrics["depo/rollouts_saved_estimate"] = saved
        if self._seen:
            predicted, quality, worth, spread = np.array([astuple(seen) for seen in self._seen]).T
            metrics["depo/calibration_error"] = calibration_error(predicted, quality)["ece"]
            if 0 < (spread > 0).sum() < len(spread):
                metrics["depo/auroc"] = auroc(worth, spread > 0)
        return metrics

    def _forget_step(self) -> None:
        self._in_step.clear()
        self._logits = {row: self._logits[row] for row in self._carried if row in self._logits}
        self._propensity.clear()


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values]
