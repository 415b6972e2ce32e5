"""Missing rewards and failing reward functions in DepoTrainer."""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from depo_gateway.training.rewards.worker_pool import RewardError

log = logging.getLogger("depo")

# TRL 1.6 and newer leave completions without a reward (NaN rows) out of the mean and the standard deviation.
SKIPS_UNREWARDED = tuple(int(part) for part in version("trl").split(".")[:2]) >= (1, 6)


class GuardedReward:
    """A reward function whose failure goes to `error`: one rank that raised alone would leave the others waiting."""

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
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.error = f"the reward function {self.__name__} raised {message}"
            log.exception("the reward function %s raised", self.__name__)
        return [None] * len(completions) if self.error else rewards

    def counts(self) -> dict[str, int]:
        """The function's own counts, where it has them, as Grader.counts."""
        counts: dict[str, int] = self.function.counts() if hasattr(self.function, "counts") else {}
        return counts


def guarded_rewards(functions: Any) -> list[Any]:
    """Wraps plain functions; leaves models, their names and coroutines to TRL."""
    several = functions if isinstance(functions, list) else [] if functions is None else [functions]
    return [
        function if isinstance(function, str | nn.Module) or _is_coroutine(function) else GuardedReward(function)
        for function in several
    ]


def for_trl(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (rows, functions) with which the installed TRL gives completions without a reward an advantage of 0."""
    return rewards if SKIPS_UNREWARDED else filled(rewards, group_size)


def filled(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (rows, functions) in which rows without a reward have the mean of their group, or 0 if it has none.

    Their advantage is 0. But they reduce the group's standard deviation, and so with scale_rewards=group the others'
    advantages grow by sqrt((G - 1) / (n - 1)), where n of G have a reward. Groups without rewards are logged as 0.
    """
    by_group = rewards.view(-1, group_size, rewards.shape[1])
    missing = by_group.isnan().all(2, keepdim=True)
    present = (~missing).sum(1, keepdim=True).clamp_min(1)
    means = torch.where(missing, 0.0, by_group.nan_to_num(0.0)).sum(1, keepdim=True) / present
    return torch.where(missing, means, by_group).view_as(rewards)


def _is_coroutine(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
