"""The questions of each scenario, by seed. The order of a seed's questions represents time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.replay.questions import Question
from benchmarks.replay.run import Block, Plan

SCENARIOS = ("cold", "general", "switch")
EARLY, EARLY_TO, LATE = (
    100,
    500,
    500,
)  # labels between refreshes: at first, up to when, and after; the learner is restarted between
MMLU_LABELS = 1500
AFTER = 250  # labels a refresh after the switch
REQUESTS = 2300  # of each side of the switch at least, so that there are whole windows of 2,000


def plan_of(
    scenario: str, seed: int, bases: dict[str, Path], mmlu: Sequence[Question], gsm8k: Sequence[Question]
) -> Plan:
    """`cold` and `general` ask MMLU from different initial checkpoints; `switch` is `cold` followed by GSM8K."""
    mmlu = shuffled(mmlu, seed)
    asked, unlabelled, later = (
        mmlu[:MMLU_LABELS],
        mmlu[MMLU_LABELS : MMLU_LABELS + REQUESTS],
        mmlu[MMLU_LABELS + REQUESTS :],
    )
    blocks = mmlu_blocks(asked)
    fill, least = {"before": unlabelled}, {"before": 0}
    if scenario == "switch":
        new = shuffled(gsm8k, seed + 1000)
        starts = range(0, len(new), AFTER)
        blocks += [Block("after", new[i : i + AFTER], AFTER) for i in starts if len(new[i:]) >= AFTER]
        fill["after"] = [question for block in blocks if block.phase == "after" for question in block.questions]
        fill["after"] = fill["after"][:AFTER]  # asked in the first block, so never before it is measured
        least = {"before": REQUESTS, "after": REQUESTS}
    cold = scenario != "general"
    base = bases["cold" if cold else "general"]
    return Plan(scenario, seed, base, cold, blocks, fill, least, {"mmlu": later})


def mmlu_blocks(questions: Sequence[Question]) -> list[Block]:
    early = [Block("before", questions[i : i + EARLY], EARLY) for i in range(0, EARLY_TO, EARLY)]
    return early + [Block("before", questions[i : i + LATE], LATE) for i in range(EARLY_TO, len(questions), LATE)]


def quick_plan(base: Path, questions: Sequence[Question], step: int, blocks: int) -> Plan:
    """A small cold start: `blocks` refreshes, and the remaining questions to measure on."""
    cut = step * blocks
    asked = [Block("before", questions[i : i + step], step) for i in range(0, cut, step)]
    later = questions[cut:]
    return Plan("cold", 1, base, True, asked, {"before": later}, {"before": 0}, {"later": later})


def shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    return [questions[i] for i in np.random.default_rng(seed).permutation(len(questions)).tolist()]
