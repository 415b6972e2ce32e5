"""The ways to choose prompts that the benchmark compares: the trainer's Selector under each of its rules.

A method's life: prepare() once, then choose() and, after the rollouts, observe(), step by step. A `dynamic` method
repeats the generation of a step, refill() prompts at a time, until enough groups are informative.

Shapes: P prompts needed, G rollouts a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.oracle import Oracle
from depo_gateway.training.rl.selectors.polaris import Polaris
from depo_gateway.training.rl.tickets import Ticket

RollOut = Callable[[Sequence[int]], list[Group]]
Refill = Callable[[int, int, float], int]  # (P, informative groups missing, share of zero-advantage groups) -> prompts
CLIP_HIGHER = 0.28  # DAPO's upper bound; GRPO's is 0.2
HOPELESS, EASY, INFORMATIVE = 0, 1, 2


def kind_of(group: Group) -> int:
    """HOPELESS (no advantage, all wrong), EASY (no advantage, all right) or INFORMATIVE."""
    if max(group.rewards) > min(group.rewards):
        return INFORMATIVE
    return EASY if min(group.rewards) > 0.5 else HOPELESS


def whole_batches(need: int, missing: int, zero_share: float) -> int:
    """DAPO's refill."""
    return need


def expected_to_suffice(need: int, missing: int, zero_share: float) -> int:
    """GRESO's refill: min(P, 1.25 missing / (1 - zero share))."""
    return min(need, math.ceil(1.25 * missing / max(1.0 - zero_share, 1e-3)))


class Method:
    """A method whose prompts a Selector chooses.

    With the rule off it is GRPO (arXiv 2402.03300) or, if `dynamic`, DAPO (arXiv 2503.14476), which samples until P
    groups have an advantage and discards the surplus, as its authors' code truncates the last batch.
    """

    def __init__(
        self, selector: Selector, dynamic: bool = False, clip_high: float = 0.2, refill: Refill = whole_batches
    ) -> None:
        self.selector, self.dynamic, self.clip_high, self._refill = selector, dynamic, clip_high, refill
        self._chosen: list[Ticket] = []  # since the last observe()

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        """Called before the first step. `counted`: rollouts charged to the budget. `free`: those for the oracle."""

    def choose(self, need: int) -> Sequence[Ticket]:
        """`need` prompts for the next generation. Before observe(), a second call returns other prompts."""
        tickets = self.selector.take(need)
        self._chosen += tickets
        return tickets

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        """How many prompts to generate next when `missing` of `need` informative groups are; if `dynamic`."""
        return self._refill(need, missing, zero_share)

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """The groups of all prompts chosen since the last call, in their order. Returns metrics."""
        for ticket, group in zip(self._chosen, groups, strict=True):
            self.selector.report(ticket, group.rewards, group.log_probs)
        self._chosen = []
        return self.selector.step()


def selector_of(size: int, seed: int, group_size: int, rule: str, **options: Any) -> Selector:
    """A Selector without an estimator, under a rule with its options."""
    return Selector([""] * size, SelectionConfig(rule, group_size, options=options), seed=seed)


class PolarisMethod(Method):
    """The starting policy first rolls out every prompt once, G times, and those it has mastered are dropped."""

    def __init__(self, size: int, seed: int, group_size: int, steps: int, stages: int = 3, **options: Any) -> None:
        stage_steps = max(1, steps // stages)
        super().__init__(selector_of(size, seed, group_size, "polaris", stage_steps=stage_steps, **options))

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        assert isinstance(self.selector.rule, Polaris)
        groups = counted(range(len(self.selector.prompts)))
        self.selector.rule.drop({group.row: float(np.mean(group.rewards)) for group in groups})


class OracleMethod(Method):
    """The policy of the moment rolls out all prompts, free of charge, whenever the oracle reads its pass rates."""

    def __init__(self, size: int, seed: int, group_size: int, refresh: int = 32) -> None:
        oracle = Oracle(self._pass_rates, group_size, refresh)
        super().__init__(Selector([""] * size, SelectionConfig("oracle", group_size), seed=seed, rule=oracle))
        self._free: RollOut | None = None

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        self._free = free

    def _pass_rates(self) -> list[float]:
        assert self._free is not None
        rates = {group.row: float(np.mean(group.rewards)) for group in self._free(range(len(self.selector.prompts)))}
        return [rates[row] for row in range(len(rates))]
