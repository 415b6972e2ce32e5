"""Rewards in DepoTrainer: those that are missing, and reward functions that fail."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from training.verify import RewardError


class Guarded:
    """A reward function whose RewardError is kept: a rank that left alone would leave the others waiting for it."""

    def __init__(self, function: Any) -> None:
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.function = function
        self.error = ""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        try:
            rewards: list[float | None] = self.function(prompts=prompts, completions=completions, **columns)
        except RewardError as error:
            self.error = str(error)
            rewards = [None] * len(completions)
        return rewards

    def counts(self) -> dict[str, int]:
        """The function's own, where it counts: graded, timeouts, failures."""
        counts: dict[str, int] = self.function.counts() if hasattr(self.function, "counts") else {}
        return counts


def guarded(functions: Any) -> list[Any]:
    """Plain functions guarded; models, their names and coroutines as they are, for TRL to run."""
    several = functions if isinstance(functions, list) else [] if functions is None else [functions]
    return [
        function
        if isinstance(function, str | nn.Module) or inspect.iscoroutinefunction(function)
        else Guarded(function)
        for function in several
    ]


def filled(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (rows, functions) whose rows without any reward have their group's mean, and 0 if the group has none."""
    by_group = rewards.view(-1, group_size, rewards.shape[1])
    nothing = by_group.isnan().all(2, keepdim=True)
    there = (~nothing).sum(1, keepdim=True).clamp_min(1)
    means = torch.where(nothing, 0.0, by_group.nan_to_num(0.0)).sum(1, keepdim=True) / there
    return torch.where(nothing, means, by_group).view_as(rewards)
