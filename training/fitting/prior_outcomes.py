"""Outcomes of models other than the pools' own, by question: the prior of a fit with few labels.

Shapes: Q questions of the prior, J other models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.outcomes.table import Row, question_key

FEWEST_QUESTIONS = 50  # fewer can't tell one difficulty from another


@dataclass(frozen=True, slots=True)
class PriorOutcomes:
    """Questions, and how other models did on them."""

    examples: tuple[Example, ...]  # Q, without labels
    outcomes: Array  # (Q, J); NaN: no outcome
    models: tuple[str, ...]  # J
    left_out: tuple[str, ...]  # the pools' own models that the tables name as well


def prior_outcomes(rows: Sequence[Row], own: Collection[str]) -> PriorOutcomes:
    """The prior in outcome tables. `own`: the pools' models, whose outcomes are left out.

    Rows of the same question are merged, a model's outcome their mean. Raises ValueError if too little is left.
    """
    named = sorted({model for row in rows for model in row.correct})
    models = [model for model in named if model not in own]
    if not models:
        raise ValueError(f"the prior outcomes name no models but the pools' own: {', '.join(named)}")
    merged: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if any(model in row.correct for model in models):
            merged.setdefault((question_key(row.question), row.context), []).append(row)
    if len(merged) < FEWEST_QUESTIONS:
        raise ValueError(
            f"the prior outcomes have {len(merged)} questions with outcomes of other models; a prior needs"
            f" {FEWEST_QUESTIONS} or more"
        )
    column = {model: number for number, model in enumerate(models)}
    sums, counts = np.zeros((2, len(merged), len(models)))
    examples = []
    for number, same in enumerate(merged.values()):
        first = same[0]
        examples.append(Example(first.question, {}, group=_group(first), context=first.context))
        for row in same:
            for model, outcome in row.correct.items():
                if model in column:
                    sums[number, column[model]] += outcome
                    counts[number, column[model]] += 1
    outcomes = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    left_out = tuple(model for model in named if model in own)
    return PriorOutcomes(tuple(examples), outcomes, tuple(models), left_out)


def _group(row: Row) -> str:
    """The group under the name that examples_of gives it, so that a held-out group is held out here as well."""
    return f"{row.source}/{row.group}" if row.group else ""
