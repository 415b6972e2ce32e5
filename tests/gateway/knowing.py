"""A checkpoint's runtime that knows tasks by name and tells unfamiliar prompts: real scores, changed by rules."""

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from depo_gateway.estimator.runtime import Runtime, Scores
from depo_gateway.estimator.text import Prepared
from depo_gateway.gateway import scoring

PROOFS = "proofs"  # the task whose prompts all need the large pool
SUMS = "sums"  # a known task whose prompts need no other pool
UNFAMILIAR = "number"  # the word that makes a prompt unfamiliar


class Knowing(Runtime):
    """The full stage knows the task PROOFS, and prompts with the word UNFAMILIAR are unlike those of its fit."""

    __slots__ = ()

    def score(self, batch: Sequence[Prepared]) -> list[Scores]:
        word = self.tokenizer.token_to_id(UNFAMILIAR)
        answers = []
        for prepared, scores in zip(batch, Runtime.score(self, batch), strict=True):
            by_head = {**scores.by_head, "quality": (0.0, 1.0)} if prepared.group == PROOFS else scores.by_head
            answers.append(replace(scores, by_head=by_head, unfamiliar=word in prepared.ids))
        return answers


def knowing(runtime: Runtime) -> Knowing:
    """The same checkpoint with that knowledge."""
    known = {item.name: getattr(runtime, item.name) for item in fields(runtime)}
    return Knowing(**{**known, "groups": {PROOFS: 0, SUMS: 1}})


@pytest.fixture
def knowing_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint that a gateway loads, its candidate too, has that knowledge."""
    load = scoring.load_runtime

    def load_knowing(path: str, pools: tuple[str, ...], rule: str) -> tuple[Runtime, dict[str, int]]:
        runtime, columns = load(path, pools, rule)
        return knowing(runtime), columns

    monkeypatch.setattr(scoring, "load_runtime", load_knowing)
