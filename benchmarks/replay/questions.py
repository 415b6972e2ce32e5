"""The questions, and which of the two pools answers each correctly: outcome tables, or chain arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_models.chains import chains
from depo_gateway.training.outcomes.table import examples_of, parse_pools, read_tables

POOLS = ("small", "large")
MODELS = ("small=mistralai/Mixtral-8x7B-Instruct-v0.1", "large=gpt-4-1106-preview")
FILES = {"mmlu": "mmlu_mixtral_gpt4.jsonl", "gsm8k": "gsm8k_mixtral_gpt4.jsonl"}
GENERAL = ("gsm8k_mixtral_gpt4.jsonl", "gsm8k_many_models.jsonl", "math_l5_many_models.jsonl")  # of the general start
GENERAL_MODELS = (
    "small=mistralai/Mixtral-8x7B-Instruct-v0.1,Meta-Llama-3.1-8B-Instruct,Qwen2-7B-Instruct,gemma-2-9b-it",
    "large=gpt-4-1106-preview,Meta-Llama-3.1-70B-Instruct,Qwen2-72B-Instruct",
)
SMALL_ERROR, LARGE_ERROR = (
    0.45,
    0.03,
)  # error rates in a chain: of the small model at each `*`, of the large at any step


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    right: tuple[bool, bool]  # by POOLS

    @property
    def reference(self) -> str:
        """The right answer: the tables hold no answers, so each question has a made-up one."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def questions_of(data: Path, source: str) -> list[Question]:
    """A table's distinct questions, in the file's order. Raises ValueError for an invalid file, OSError for none."""
    examples = examples_of(read_tables([data / "outcomes" / FILES[source]]), parse_pools(list(MODELS)))
    return [
        Question(example.prompt, (bool(example.quality["small"]), bool(example.quality["large"])))
        for example in examples
        if all(example.quality[pool] in (0, 1) for pool in POOLS)
    ]


def chain_questions(count: int, seed: int) -> list[Question]:
    """Chain arithmetic, which needs no data: the small pool often fails at `*`, the large one seldom at all."""
    return [
        Question(prompt, (is_right(prompt, "small"), is_right(prompt, "large")))
        for prompt in chains("collect", count, seed)
    ]


def is_right(prompt: str, pool: str) -> bool:
    """Whether a pool solves a chain: pseudo-random, determined by the prompt."""
    probability = (1 - SMALL_ERROR) ** prompt.count("*") if pool == "small" else (1 - LARGE_ERROR) ** (len(prompt) // 2)
    return uniform_of(f"{pool} {prompt}") < probability


def uniform_of(text: str) -> float:
    """A pseudo-random number in [0, 1), determined by the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def token_confidence(question: Question, pool: int) -> float:
    """The token confidence of an answer: a little lower for wrong ones, and mostly random."""
    return 0.55 + 0.25 * uniform_of(f"sure {pool} {question.text}") + 0.15 * question.right[pool]


def by_text(questions: Sequence[Question]) -> dict[str, Question]:
    return {question.text: question for question in questions}
