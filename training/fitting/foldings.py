"""Divides the examples of a fit into folds, each to be predicted by a model that was not fitted on it.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.records.types import Example
from depo_gateway.training.outcomes.table import folds_of, question_key


def foldings_of(examples: Sequence[Example], folds: int, seed: int) -> list[NDArray[np.int64]]:
    """Assignments of examples to folds (N,): by question and, if the table has groups, by group.

    The first measures predictions for questions like the known ones, the second for questions of a new kind. If there
    are fewer groups than folds, each group is a fold. Raises ValueError for fewer questions than folds.
    """
    foldings = [folds_of(questions_of(examples), folds, seed)]
    if any(example.group for example in examples):
        groups = groups_of(examples)
        foldings.append(folds_of(groups, min(folds, len(set(groups))), seed))
    return foldings


def questions_of(examples: Sequence[Example]) -> list[str]:
    """The key of each example's question; the same question never stands on both sides."""
    return [question_key(example.prompt) for example in examples]


def groups_of(examples: Sequence[Example]) -> list[str]:
    """The unit in which each example is held out: its group, or its question if it has no group."""
    return [example.group or question_key(example.prompt) for example in examples]
