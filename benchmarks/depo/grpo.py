"""GRPO's update: advantages of a group, the clipped token-mean loss, and statistics of its gradients.

Shapes: N completions of a mini-batch, P prompts, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.depo.policy import Completion, Policy

EPSILON = 1e-4  # added to the standard deviation of a group's rewards, as in TRL


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt's completions with their rewards, ready to learn from."""

    index: int
    prompt: tuple[int, ...]
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]

    @property
    def informative(self) -> bool:
        """Whether some advantage is not zero."""
        return max(self.rewards) > min(self.rewards)


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    clip_low: float = 0.2
    clip_high: float = 0.2
    updates: int = 2  # mini-batches a step; with a single one every ratio is 1 and nothing is clipped
    max_norm: float = 1.0
    chunk: int = 32  # completions in one forward pass, of similar lengths


@dataclass(slots=True)
class Gradients:
    """Statistics of the gradients of an interval. Signal and noise come from the two halves a, b of each step.

    E[a.b] is the squared norm of the expected gradient, E[|a - b|^2] / 2 the variance of a half's; their ratio is the
    signal-to-noise ratio. The second half follows the first one's update, whose effect counts as noise.
    """

    norms: list[float] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    clipped: float = 0.0
    tokens: int = 0

    def summary(self) -> dict[str, float]:
        norms = torch.tensor(self.norms or [0.0])
        return {
            "grad_norm": norms.mean().item(),
            "grad_norm_stability": (norms.mean() / norms.std(correction=0).clamp_min(1e-9)).item(),
            "grad_snr": self.signal / self.noise if self.noise else 0.0,
            "clipped": self.clipped / max(1, self.tokens),
        }


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (standard deviation + 1e-4) of a group's rewards, the deviation with G - 1."""
    values = torch.tensor(rewards, dtype=torch.float32)
    return ((values - values.mean()) / (values.std() + EPSILON)).tolist()


def surrogate(ratio_N: Tensor, advantage_N: Tensor, config: GrpoConfig) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), token by token (PPO, arXiv 1707.06347; DAPO's two bounds)."""
    clipped = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(ratio_N * advantage_N, clipped * advantage_N)


class Trainer:
    """The policy's optimizer. KL weight 0, AdamW without decay, a constant rate after a short warm-up."""

    def __init__(self, policy: Policy, config: GrpoConfig) -> None:
        self.policy, self.config = policy, config
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.steps = 0
        self.gradients = Gradients()

    def step(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from the rollouts of one step, in `updates` mini-batches of prompts.

        Groups without an advantage have no gradient and are not run, but their tokens count in the mean of the loss.
        """
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, self.steps / max(1, self.config.warmup_steps))
        gradients = []
        for part in range(self.config.updates):
            batch = rollouts[part :: self.config.updates]
            if any(rollout.informative for rollout in batch):
                gradients.append(self._update(batch))
        if len(gradients) == 2:
            first, second = gradients
            self.gradients.signal += float(first @ second)
            self.gradients.noise += float((first - second).square().sum()) / 2

    def _update(self, batch: Sequence[Rollout]) -> Tensor:
        tokens = sum(len(completion.tokens) for rollout in batch for completion in rollout.completions)
        rows = [
            (rollout.prompt, completion, advantage)
            for rollout in batch
            if rollout.informative
            for completion, advantage in zip(rollout.completions, advantages(rollout.rewards), strict=True)
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1].tokens))
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(rows), self.config.chunk):
            part = rows[first : first + self.config.chunk]
            new = self.policy.log_probs([(prompt, completion.tokens) for prompt, completion, _ in part])
            old = torch.tensor([value for _, completion, _ in part for value in completion.log_probs])
            weight = torch.tensor([advantage for _, completion, advantage in part for _ in completion.tokens])
            ratio = torch.exp(new - old)
            torch.autograd.backward(surrogate(ratio, weight, self.config).sum() / tokens)
            with torch.no_grad():
                outside = torch.where(weight > 0, ratio > 1 + self.config.clip_high, ratio < 1 - self.config.clip_low)
                self.gradients.clipped += float(outside.sum())
                self.gradients.tokens += len(old)
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        self.gradients.norms.append(float(flat.norm()))
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_norm)
        self.optimizer.step()
        return flat
