"""The task of the benchmark: chain arithmetic as in benchmarks/demo_models/chains.py.

Prompts, their correct completions, rollouts.

Training prompts are of the split `collect`, held-out ones of `evaluate`; the policy was fine-tuned on `sft` with hardly
any multiplication. Both are a mix of three kinds, which the policy solves nearly always, sometimes, and hardly ever, so
that at the start three in five groups of eight have no advantage. The reward is 1 for the whole worked answer and 0
otherwise: the last digit alone is right by chance once in ten, and then a hopeless prompt looks informative.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.demo_models.chains import answer_of, build_tokenizer, draw, length_of
from benchmarks.depo.policy import Completion, Policy

LIMIT = 56  # tokens of a completion; the longest answer has 48 with its end


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of prompts: its share, the weights of + - * in it, its shortest and longest chain."""

    share: float
    operators: tuple[float, float, float]
    shortest: int
    longest: int


KINDS = (
    Kind(0.42, (3.0, 2.0, 0.001), 1, 8),  # easy
    Kind(0.18, (3.0, 2.0, 3.0), 1, 5),  # middling
    Kind(0.40, (1.0, 1.0, 8.0), 5, 8),  # hopeless, at first
)


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts as text and as the policy's tokens, with the only right completion of each."""

    prompts: tuple[str, ...]
    encoded: tuple[tuple[int, ...], ...]
    solutions: tuple[tuple[int, ...], ...]

    def reward(self, index: int, completion: Completion) -> float:
        return float(completion.tokens == self.solutions[index])


def task_of(split: str, count: int, seed: int = 0) -> Task:
    """`count` different prompts of a split."""
    rng = random.Random(f"depo benchmark {split} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        (kind,) = rng.choices(KINDS, [kind.share for kind in KINDS])
        prompt = draw(rng, split, kind.operators)
        while not kind.shortest <= length_of(prompt) <= kind.longest:
            prompt = draw(rng, split, kind.operators)
        found[prompt] = None
    tokenizer = build_tokenizer()
    end = (int(tokenizer.eos_token_id),)
    return Task(
        tuple(found),
        tuple(tuple(tokenizer.encode(prompt)) for prompt in found),
        tuple((*tokenizer.encode(answer_of(prompt), add_special_tokens=False), *end) for prompt in found),
    )


def roll_out(
    policy: Policy, task: Task, indices: Sequence[int], group_size: int, generator: torch.Generator, rows: int = 1024
) -> list[list[Completion]]:
    """`group_size` completions of each prompt, about `rows` at a time."""
    at_once = max(1, rows // group_size)
    groups: list[list[Completion]] = []
    for first in range(0, len(indices), at_once):
        chunk = [task.encoded[index] for index in indices[first : first + at_once]]
        groups += policy.sample(chunk, group_size, LIMIT, generator)
    return groups
