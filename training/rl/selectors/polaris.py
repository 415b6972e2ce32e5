"""Polaris (An et al. 2025, hkunlp.github.io/blog/2025/Polaris): drop the prompts that the policy has mastered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selectors.pass_rates import PassRates, pass_rates_from
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Polaris(SelectionRule):
    """At the end of each stage, drops for good the prompts that passed more than `above` of the stage's rollouts.

    Args:
        stage_steps: generations a stage; Polaris has three stages a run.
        above: the pass rate above which a prompt is dropped.
        pass_rates: of the starting policy, where they were measured: prompts above `above` are dropped at once.
    """

    def __init__(self, stage_steps: int, above: float = 0.9, pass_rates: PassRates | None = None) -> None:
        if stage_steps < 1:
            raise ValueError(f"stage_steps is {stage_steps}; it must be 1 or more")
        self.stage_steps, self.above, self.pass_rates = stage_steps, above, pass_rates
        self.size = self.steps = 0
        self.dropped: set[int] = set()
        self.outcomes: dict[int, tuple[float, int]] = {}  # row -> rollouts of this stage that passed, that there were

    def select(self, need: int, candidates: Candidates) -> Selection:
        if not self.size:
            self.size = len(candidates.prompts)
            if self.pass_rates is not None and not self.steps:
                self.drop(dict(enumerate(pass_rates_from(self.pass_rates, self.size).tolist())))
        return Selection(candidates.draw_where(lambda row: row not in self.dropped, need))

    def drop(self, rates: Mapping[int, float]) -> None:
        """Drop the rows whose pass rate is above the limit."""
        self.dropped |= {row for row, rate in rates.items() if rate > self.above}

    def learn(self, labels: Sequence[GroupLabel]) -> Mapping[str, float]:
        for label in labels:
            passed, count = self.outcomes.get(label.row, (0.0, 0))
            self.outcomes[label.row] = (passed + label.quality * label.count, count + label.count)
        self.steps += 1
        if self.steps % self.stage_steps == 0:
            self.drop({row: passed / count for row, (passed, count) in self.outcomes.items()})
            self.outcomes = {}
        return {"dropped": float(len(self.dropped))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "dropped": sorted(self.dropped),
            "outcomes": [[row, *outcome] for row, outcome in self.outcomes.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.dropped = state["steps"], set(state["dropped"])
        self.outcomes = {row: (passed, count) for row, passed, count in state["outcomes"]}
