"""Rewards in DepoTrainer: those that are missing, and reward functions that fail."""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from depo_gateway.training.rewards.worker_pool import RewardError

log = logging.getLogger("depo")

# From 1.6 on TRL leaves completions without any reward (NaN rows) out of the mean and the standard deviation.
SKIPS_UNREWARDED = tuple(int(part) for part in version("trl").split(".")[:2]) >= (1, 6)


class Guarded:
    """A reward function whose failure is kept in `error`: a rank that left alone would leave the others waiting."""

    def __init__(self, function: Any) -> None:
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.function = function
        self.error = ""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        self.error = ""
        try:
            rewards: list[float | None] = self.function(prompts=prompts, completions=completions, **columns)
        except RewardError as error:
            self.error = str(error)
        except Exception as error:  # boundary: the user's code; every rank raises it as a RewardError
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.error = f"the reward function {self.__name__} raised {words}"
            log.exception("the reward function %s raised", self.__name__)
        return [None] * len(completions) if self.error else rewards

    def counts(self) -> dict[str, int]:
        """The function's own, where it counts: graded, timeouts, failures."""
        counts: dict[str, int] = self.function.counts() if hasattr(self.function, "counts") else {}
        return counts


def guarded(functions: Any) -> list[Any]:
    """Plain functions guarded; models, their names and coroutines as they are, for TRL to run."""
    several = functions if isinstance(functions, list) else [] if functions is None else [functions]
    return [
        function if isinstance(function, str | nn.Module) or _is_coroutine(function) else Guarded(function)
        for function in several
    ]


def for_trl(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (rows, functions) such that a completion without any reward gets an advantage of 0 from this TRL."""
    return rewards if SKIPS_UNREWARDED else filled(rewards, group_size)


def filled(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (rows, functions) whose rows without any reward have their group's mean, and 0 if the group has none.

    Their advantage is 0, but they make the group's standard deviation smaller and with scale_rewards=group the others'
    advantages larger: by sqrt((G - 1) / (n - 1)) where n of G have a reward. Groups without any are logged as 0.
    """
    by_group = rewards.view(-1, group_size, rewards.shape[1])
    nothing = by_group.isnan().all(2, keepdim=True)
    there = (~nothing).sum(1, keepdim=True).clamp_min(1)
    means = torch.where(nothing, 0.0, by_group.nan_to_num(0.0)).sum(1, keepdim=True) / there
    return torch.where(nothing, means, by_group).view_as(rewards)


def _is_coroutine(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
