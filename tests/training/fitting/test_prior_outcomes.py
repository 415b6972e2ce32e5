"""The prior in outcome tables: which rows and models it takes, and what it refuses."""

from collections.abc import Mapping

import numpy as np
import pytest

from depo_gateway.training.fitting.prior_outcomes import FEWEST_QUESTIONS, prior_outcomes
from depo_gateway.training.outcomes.table import Row


def row(question: str, correct: Mapping[str, float], group: str = "", context: str = "") -> Row:
    return Row(question, context, correct, {}, group, "exam")


def rows(count: int, correct: Mapping[str, float]) -> list[Row]:
    return [row(f"question {number}", correct) for number in range(count)]


def test_own_models_are_left_out_and_named() -> None:
    prior = prior_outcomes(rows(60, {"own": 1.0, "a": 0.0, "b": 1.0}), {"own", "absent"})
    assert (prior.models, prior.left_out) == (("a", "b"), ("own",))
    assert prior.outcomes.tolist() == [[0.0, 1.0]] * 60


def test_rows_of_one_question_are_merged() -> None:
    table = [
        *rows(60, {"a": 1.0}),
        row("QUESTION  0", {"a": 0.0, "b": 0.5}),
        row("question 0", {"a": 0.0}, "", "before"),
    ]
    prior = prior_outcomes(table, set())
    assert len(prior.examples) == 61
    np.testing.assert_array_equal(prior.outcomes[0], [0.5, 0.5])
    np.testing.assert_array_equal(prior.outcomes[[1, 60]], [[1.0, np.nan], [0.0, np.nan]])


def test_rows_with_outcomes_of_own_models_only_are_no_questions_of_the_prior() -> None:
    table = [*rows(60, {"a": 1.0}), row("another", {"own": 1.0})]
    assert len(prior_outcomes(table, {"own"}).examples) == 60


def test_groups_are_named_as_in_own_tables() -> None:
    prior = prior_outcomes([row(f"q {n}", {"a": 1.0}, "algebra" if n else "") for n in range(60)], set())
    assert [prior.examples[0].group, prior.examples[1].group] == ["", "exam/algebra"]


def test_tables_of_own_models_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no models but the pools' own: own$"):
        prior_outcomes(rows(60, {"own": 1.0}), {"own"})


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=f"have 20 questions .* needs {FEWEST_QUESTIONS} or more"):
        prior_outcomes(rows(20, {"a": 1.0}), set())
