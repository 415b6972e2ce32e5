"""The task of the benchmark: chain arithmetic as in training/chains.py. Prompts, their right completions, rollouts.

Training prompts are of the split `collect`, held-out ones of `evaluate`; the policy was taught on `sft`. Both have far
more multiplications than the policy was taught, so that it starts with prompts it always solves, some it solves now and
then, and some it never does. The reward is 1 for the whole worked answer and 0 for anything else: the last digit alone
comes out right by chance once in ten, and then a hopeless prompt looks informative.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.depo.policy import Completion, Policy
from training.chains import answer_of, build_tokenizer, draw

OPERATORS = (3.0, 2.0, 6.0)  # the weights of + - * in the benchmark's prompts
LIMIT = 56  # tokens of a completion; the longest answer has 48 with its end


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts as text, as the policy's tokens, and the only completion of each that is right."""

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
        found[draw(rng, split, OPERATORS)] = None
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
