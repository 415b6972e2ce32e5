"""The ways to choose prompts that DEPO is compared with, each from its formulas. DEPO's own are in estimated.py.

A method's life: prepare() once, then choose() and, after the rollouts, observe(), step by step. A `dynamic` method has
its step's generation repeated, refill() prompts at a time, until enough groups are informative.

Shapes: P prompts needed, G rollouts a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.pass_rate_belief import nonzero_advantage
from depo_gateway.training.rl.selection_config import Choice, SelectionConfig, Stream
from depo_gateway.training.rl.selector import Selector

RollOut = Callable[[Sequence[int]], list[Group]]
CLIP_HIGHER = 0.28  # DAPO's upper bound; GRPO's is 0.2
HOPELESS, EASY, INFORMATIVE = 0, 1, 2


class Method(Protocol):
    """What the loop asks of a way to choose prompts."""

    dynamic: bool
    clip_high: float

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        """Before the first step. What `counted` rolls out is charged to the budget; `free` is for the oracle alone."""

    def choose(self, need: int) -> Choice:
        """`need` prompts for the next generation; before observe() again: further ones, none twice."""

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        """How many prompts to generate next when `missing` of `need` informative groups are; dynamic methods only."""

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """The step's rollouts, all that were generated. Returns metrics."""


def kind_of(group: Group) -> int:
    """HOPELESS (no advantage, all wrong), EASY (no advantage, all right) or INFORMATIVE."""
    if max(group.rewards) > min(group.rewards):
        return INFORMATIVE
    return EASY if min(group.rewards) > 0.5 else HOPELESS


def choice_of(indices: Sequence[int], predicted: Sequence[float] | None = None) -> Choice:
    nothing = [float("nan")] * len(indices)
    return Choice(tuple(indices), tuple(predicted or nothing), (1.0,) * len(indices), {})


class Baseline:
    """Prompts in the stream's order, none twice in a step: GRPO (arXiv 2402.03300), or DAPO (arXiv 2503.14476).

    DAPO samples until P groups have an advantage, and throws away what is more: its authors' code cuts the last batch.
    """

    def __init__(self, size: int, seed: int, dynamic: bool = False, clip_high: float = 0.2) -> None:
        self.dynamic, self.clip_high = dynamic, clip_high
        self.selector = Selector([""] * size, SelectionConfig.off(), None, seed)

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        pass

    def choose(self, need: int) -> Choice:
        return self.selector.choose(need)

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        return need

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        return self.selector.observe(groups)


class Filtered:
    """The stream's order with rows left out by `admits`, none twice in a step. Never stalls: see `draw`."""

    dynamic = False
    clip_high = 0.2

    def __init__(self, size: int, seed: int) -> None:
        self.stream = Stream(size, seed)
        self.rng = np.random.default_rng([seed, 7])
        self.in_step: set[int] = set()

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        pass

    def admits(self, row: int) -> bool:
        return True

    def draw(self, need: int) -> list[int]:
        """`need` admitted rows. After two passes without enough of them, the next ones in order, admitted or not."""
        rows: list[int] = []
        for _ in range(2 * self.stream.size):
            if len(rows) == need:
                break
            (row,) = self.stream.draw(1)
            if row not in self.in_step and self.admits(row):
                rows.append(row)
                self.in_step.add(row)
        while len(rows) < need:
            (row,) = self.stream.draw(1)
            if row not in self.in_step or len(self.in_step) >= self.stream.size:
                rows.append(row)
                self.in_step.add(row)
        return rows

    def choose(self, need: int) -> Choice:
        return choice_of(self.draw(need))

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        return need

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        self.in_step.clear()
        return {}


class Polaris(Filtered):
    """Polaris (An et al. 2025, hkunlp.github.io/blog/2025/Polaris): prompts dropped by pass rates from before.

    The starting policy rolls out every prompt once, G times; those it always solves are dropped. At the end of each of
    three stages those that passed more than 0.9 of their rollouts in that stage are dropped too.
    """

    def __init__(self, size: int, seed: int, steps: int, above: float = 0.9, stages: int = 3) -> None:
        super().__init__(size, seed)
        self.above, self.stage_steps = above, max(1, steps // stages)
        self.kept = set(range(size))
        self.passed: dict[int, list[float]] = {}
        self.steps = 0

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        self.drop({group.index: list(group.rewards) for group in counted(range(self.stream.size))})

    def drop(self, passed: dict[int, list[float]]) -> None:
        self.kept -= {row for row, rewards in passed.items() if np.mean(rewards) > self.above}

    def admits(self, row: int) -> bool:
        return row in self.kept

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        super().observe(groups)
        for group in groups:
            self.passed.setdefault(group.index, []).extend(group.rewards)
        self.steps += 1
        if self.steps % self.stage_steps == 0:
            self.drop(self.passed)
            self.passed = {}
        return {"kept": len(self.kept) / self.stream.size}


class Greso(Filtered):
    """GRESO (arXiv 2506.02177): a prompt whose last z groups had no advantage is skipped with probability 1 - p^z.

    p has one value for prompts last seen all right and one for those all wrong, each moved by `delta` a step towards
    its target share of zero-advantage groups, 25% in all, two thirds of it hard. Sampling goes on until P groups are
    informative, refilled by min(P, 1.25 missing / (1 - zero share)).
    """

    dynamic = True
    clip_high = CLIP_HIGHER

    def __init__(
        self,
        size: int,
        seed: int,
        targets: tuple[float, float] = (1 / 6, 1 / 12),
        start: float = 0.5,
        delta: float = 0.01,
    ) -> None:
        super().__init__(size, seed)
        self.targets, self.delta = targets, delta  # by kind: HOPELESS, EASY
        self.explore = [start, start]
        self.streak: dict[int, tuple[int, int]] = {}  # row -> kind of the last group, how many alike in a row

    def skip_probability(self, row: int) -> float:
        if row not in self.streak:
            return 0.0
        kind, length = self.streak[row]
        return 1.0 - self.explore[kind] ** length

    def admits(self, row: int) -> bool:
        return bool(self.rng.random() >= self.skip_probability(row))

    def refill(self, need: int, missing: int, zero_share: float) -> int:
        return min(need, int(np.ceil(1.25 * missing / max(1.0 - zero_share, 1e-3))))

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        super().observe(groups)
        kinds = [kind_of(group) for group in groups]
        for group, kind in zip(groups, kinds, strict=True):
            if kind == INFORMATIVE:
                self.streak.pop(group.index, None)
            else:
                self.streak[group.index] = (kind, self.streak.get(group.index, (kind, 0))[1] + 1)
        for kind in (HOPELESS, EASY):
            above = kinds.count(kind) / len(kinds) >= self.targets[kind]
            self.explore[kind] = float(np.clip(self.explore[kind] + (-self.delta if above else self.delta), 0.0, 1.0))
        return {"explore_easy": self.explore[EASY], "explore_hopeless": self.explore[HOPELESS]}


class Mopps(Filtered):
    """MoPPS (arXiv 2507.04632): a Beta posterior a prompt; of some candidates, the Thompson draws nearest to 0.5.

    After s of k rollouts pass: a <- d a + (1 - d) a0 + s, b <- d b + (1 - d) b0 + k - s, with a0 = b0 = 1.
    """

    def __init__(self, size: int, seed: int, decay: float = 0.5, candidates: float = 4.0, target: float = 0.5) -> None:
        super().__init__(size, seed)
        self.decay, self.candidates, self.target = decay, candidates, target
        self.passed, self.failed = np.ones(size), np.ones(size)

    def choose(self, need: int) -> Choice:
        rows = np.array(self.draw(round(need * self.candidates)))
        drawn = self.rng.beta(self.passed[rows], self.failed[rows])
        chosen = rows[np.argsort((drawn - self.target) ** 2, kind="stable")[:need]].tolist()
        mean = self.passed[chosen] / (self.passed[chosen] + self.failed[chosen])
        return choice_of(chosen, mean.tolist())

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        super().observe(groups)
        for group in groups:
            row, passed = group.index, float(sum(group.rewards))
            self.passed[row] = self.decay * self.passed[row] + (1 - self.decay) + passed
            self.failed[row] = self.decay * self.failed[row] + (1 - self.decay) + len(group.rewards) - passed
        return {}


class Oracle(Filtered):
    """Knows the pass rates: every `refresh` steps the policy of the moment rolls out all prompts, free of charge.

    Keeps a prompt if G rollouts are likelier to differ than not.
    """

    def __init__(self, size: int, seed: int, group_size: int, refresh: int = 32) -> None:
        super().__init__(size, seed)
        self.group_size, self.refresh, self.steps = group_size, refresh, 0
        self.rates = np.full(size, 0.5)
        self.free: RollOut | None = None

    def prepare(self, counted: RollOut, free: RollOut) -> None:
        self.free = free
        self.look()

    def look(self) -> None:
        assert self.free is not None
        for group in self.free(range(self.stream.size)):
            self.rates[group.index] = np.mean(group.rewards)

    def admits(self, row: int) -> bool:
        return bool(nonzero_advantage(self.rates[row : row + 1], self.group_size)[0] >= 0.5)

    def choose(self, need: int) -> Choice:
        rows = self.draw(need)
        return choice_of(rows, self.rates[rows].tolist())

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        super().observe(groups)
        self.steps += 1
        if self.steps % self.refresh == 0:
            self.look()
        return {}
