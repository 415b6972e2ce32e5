"""What is asked: questions, and which of the two pools answers each rightly: outcome tables, or chain arithmetic."""

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
SMALL_FORGETS, LARGE_FORGETS = 0.45, 0.03  # a chain's part that goes wrong: a `*` for the small model, any step


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    right: tuple[bool, bool]  # by POOLS

    @property
    def reference(self) -> str:
        """What a client says is right. The tables hold no answers, so that each question has a word of its own."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def questions_of(data: Path, source: str) -> list[Question]:
    """A table's distinct questions, in the file's order. Raises ValueError for a file that is none, OSError without."""
    examples = examples_of(read_tables([data / "outcomes" / FILES[source]]), parse_pools(list(MODELS)))
    return [
        Question(example.prompt, (bool(example.quality["small"]), bool(example.quality["large"])))
        for example in examples
        if all(example.quality[pool] in (0, 1) for pool in POOLS)
    ]


def chain_questions(count: int, seed: int) -> list[Question]:
    """Chain arithmetic, which runs anywhere: the small pool fails where `*` stands, the large one seldom."""
    return [
        Question(prompt, (draw(prompt, "small"), draw(prompt, "large"))) for prompt in chains("collect", count, seed)
    ]


def draw(prompt: str, pool: str) -> bool:
    """Whether a pool gets a chain right: a coin that the prompt itself decides, so that nobody has to remember it."""
    kept = (1 - SMALL_FORGETS) ** prompt.count("*") if pool == "small" else (1 - LARGE_FORGETS) ** (len(prompt) // 2)
    return share_of(f"{pool} {prompt}") < kept


def share_of(text: str) -> float:
    """A number in [0, 1) that looks random and belongs to the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def token_confidence(question: Question, pool: int) -> float:
    """What the answer's log-probabilities say: of a wrong answer a little less, with much chance."""
    return 0.55 + 0.25 * share_of(f"sure {pool} {question.text}") + 0.15 * question.right[pool]


def by_text(questions: Sequence[Question]) -> dict[str, Question]:
    return {question.text: question for question in questions}
