"""PromptSelector and Ticket: the interface between an RL trainer and the selection of its prompts.

A trainer takes tickets, rolls out the prompt of each, reports the rewards and calls step() once a generation, when the
policy has learned from it. Several generations may overlap: tickets are reported one at a time, in any order, late,
twice or never.

This module imports neither torch nor a trainer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

InFlight = Literal["again", "kept", "dropped"]
UNSCORED = (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to roll out one prompt once. Plain values, so that it can cross processes."""

    id: int  # unique within a run
    row: int  # of the data set
    version: int  # generations learned from when the prompt was chosen
    propensity: float = 1.0  # probability of the choice; below 1 for rejects rolled out as exploration
    logits: tuple[float, float] = UNSCORED  # the estimator's scores at the time: mean reward, spread; NaN: none
    predicted: float = math.nan  # mean reward predicted at the time; NaN: no prediction


@runtime_checkable
class PromptSelector(Protocol):
    """Chooses the prompts to roll out and learns from the rewards.

    Every method is thread-safe and idempotent by ticket id. A selector may also have `take_metrics() -> Mapping[str,
    float]`: metrics of the choices since the last call, which DepoTrainer logs with their generation.
    """

    def take(self, count: int) -> Sequence[Ticket]:
        """Tickets for the next `count` rollouts. No prompt has two tickets at a time while there are others."""
        ...

    def report(self, ticket: Ticket | int, rewards: Sequence[float | None], log_probs: Sequence[float] = ()) -> bool:
        """Record a finished group, to learn from at the next step(). False: the ticket is unknown or was reported.

        `rewards`: one for each of the group's rollouts, NaN or None for one without. `log_probs`: the completions' mean
        token log-probabilities.
        """
        ...

    def release(self, ticket: Ticket | int) -> bool:
        """Give up an aborted rollout; its prompt may be chosen again. False: the ticket is unknown or was reported."""
        ...

    def expire(self, steps: int) -> int:
        """Release the unreported tickets that were chosen more than `steps` generations ago; their number."""
        ...

    def step(self) -> Mapping[str, float]:
        """Learn from the groups reported since the last call: a generation is done. Returns metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next choices, as values for JSON; at any moment, tickets in flight included."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], in_flight: InFlight = "again") -> None:
        """Continue from state_dict(). `in_flight`: what the trainer does with the unreported tickets of that moment.

        "again": it lost the rollouts, and take() returns the same tickets first. "kept": it continues the rollouts
        and reports their tickets. "dropped": it lost the rollouts, and their prompts may be chosen again.
        """
        ...


def tickets_digest(tickets: Sequence[Ticket]) -> str:
    """A digest that is equal on every process that chose the same prompts."""
    choice = [[ticket.row for ticket in tickets], [ticket.propensity for ticket in tickets]]
    return hashlib.sha256(json.dumps(choice).encode()).hexdigest()[:16]
