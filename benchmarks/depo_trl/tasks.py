"""The two tasks: chain arithmetic, and graded sums as chat messages. Rows of prompt, answer and grade."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.demo_models.chains import answer_of, length_of
from benchmarks.depo.task import LIMIT, task_of

DIGITS, TERMS = range(1, 7), range(2, 5)
SPLITS = {"sft": range(0, 6), "train": range(6, 14), "evaluate": range(14, 16)}  # sixteenths of all sums
VERIFIERS = {"sums": "number", "chains": "exact"}  # names in depo_gateway.training.rewards.verifiers
LIMITS = {"sums": 32, "chains": LIMIT}  # tokens of a completion
Row = dict[str, Any]


def rows(task: str, split: str, count: int, seed: int = 0) -> list[Row]:
    """`count` different prompts of a split (sft, train or evaluate): {"prompt": messages, "answer", "grade"}."""
    return sums(split, count, seed) if task == "sums" else chains(split, count, seed)


def sums(split: str, count: int, seed: int) -> list[Row]:
    """All grades are equally frequent, as far as there are enough sums: there are only a few hundred small ones."""
    rng = random.Random(f"sums {split} {seed}")
    found: dict[str, Row] = {}
    while len(found) < count:
        digits, terms = rng.choice(DIGITS), rng.choice(TERMS)
        numbers = sum_of(rng, digits, terms)
        text = question(numbers)
        if split_of(text) == split:
            found[text] = row(text, str(sum(numbers)), f"{terms} terms, {digits} digit{'s' * (digits > 1)}")
    return list(found.values())


def sum_of(rng: random.Random, digits: int, terms: int) -> list[int]:
    """Terms, one of which has `digits` digits and the others one to as many."""
    lengths = [digits, *(rng.randint(1, digits) for _ in range(terms - 1))]
    rng.shuffle(lengths)
    return [rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for length in lengths]


def question(numbers: Sequence[int]) -> str:
    return f"What is {' + '.join(map(str, numbers))}?"


def split_of(text: str) -> str:
    """The split that a sum belongs to, by a hash of its text."""
    slot = hashlib.sha256(text.encode()).digest()[0] % 16
    return next(name for name, slots in SPLITS.items() if slot in slots)


def chains(split: str, count: int, seed: int) -> list[Row]:
    """The prompts of benchmarks.depo; only the whole worked answer is right."""
    prompts = task_of({"train": "collect"}.get(split, split), count, seed).prompts
    return [row(prompt, answer_of(prompt), f"length {length_of(prompt)}") for prompt in prompts]


def row(text: str, answer: str, grade: str) -> Row:
    return {"prompt": [{"role": "user", "content": text}], "answer": answer, "grade": grade}
