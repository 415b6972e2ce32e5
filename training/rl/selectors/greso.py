"""GRESO (arXiv 2506.02177): skip prompts whose last groups had no advantage, with a probability that adapts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule

HARD, EASY, MIXED = 0, 1, 2  # all rollouts failed, all passed, they differ


class Greso(SelectionRule):
    """A prompt whose last z groups had no advantage is skipped with probability 1 - p^z.

    p has one value for prompts whose last group all passed and one for those that all failed. Each moves by `delta` a
    step towards its target share of zero-advantage groups. The paper's method also samples until the batch is full of
    informative groups: switch dynamic_sampling on.

    Args:
        hard_target, easy_target: shares of groups that all fail and that all pass; 25% together, two thirds of it hard.
        start: p at the beginning.
    """

    def __init__(
        self, hard_target: float = 1 / 6, easy_target: float = 1 / 12, start: float = 0.5, delta: float = 0.01
    ) -> None:
        self.targets, self.delta = (hard_target, easy_target), delta
        self.explore = [start, start]  # p by kind: HARD, EASY
        self.streaks: dict[int, tuple[int, int]] = {}  # row -> kind of the last group, how many of it in a row

    def select(self, need: int, candidates: Candidates) -> Selection:
        def admits(row: int) -> bool:
            return bool(candidates.rng.random() >= self.skip_probability(row))

        return Selection(candidates.draw_where(admits, need))

    def skip_probability(self, row: int) -> float:
        if row not in self.streaks:
            return 0.0
        kind, length = self.streaks[row]
        return 1.0 - self.explore[kind] ** length

    def learn(self, labels: Sequence[GroupLabel]) -> Mapping[str, float]:
        kinds = [kind_of(label) for label in labels]
        for label, kind in zip(labels, kinds, strict=True):
            if kind == MIXED:
                self.streaks.pop(label.row, None)
            else:
                _, length = self.streaks.get(label.row, (kind, 0))
                self.streaks[label.row] = (kind, length + 1)
        for kind in (HARD, EASY) if kinds else ():
            above = kinds.count(kind) / len(kinds) >= self.targets[kind]
            self.explore[kind] = float(np.clip(self.explore[kind] + (-self.delta if above else self.delta), 0.0, 1.0))
        return {"explore_easy": self.explore[EASY], "explore_hard": self.explore[HARD]}

    def state_dict(self) -> dict[str, Any]:
        return {"explore": list(self.explore), "streaks": [[row, *streak] for row, streak in self.streaks.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.explore = list(state["explore"])
        self.streaks = {row: (kind, length) for row, kind, length in state["streaks"]}


def kind_of(label: GroupLabel) -> int:
    """HARD, EASY or MIXED."""
    if label.spread > 0:
        return MIXED
    return EASY if label.quality > 0.5 else HARD
