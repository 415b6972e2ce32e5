"""The choice between a fit with the prior and one without."""

import numpy as np
import pytest

from depo_gateway.estimator.learner import NO_NGRAMS, Item
from depo_gateway.estimator.text import Prepared
from depo_gateway.training.fitting.prior_choice import PriorChoice, compare_losses, is_used, prior_text

MISSING = float("nan")


def item(labels: tuple[float, ...], weight: float = 1.0) -> Item:
    missing = (MISSING,) * len(labels)
    return Item(Prepared((), False, ()), *NO_NGRAMS, None, (labels, missing), weight)


def logits(*qualities: tuple[float, ...]) -> np.ndarray:
    return np.stack([np.array(qualities), np.zeros((len(qualities), len(qualities[0])))], 2)


def test_losses_are_weighted_means_over_labelled_examples() -> None:
    items = [item((1.0, 1.0)), item((0.0, MISSING), 3.0), item((MISSING, MISSING))]
    sure, unsure = logits((2.0, 2.0), (-2.0, 9.0), (9.0, 9.0)), logits((0.0, 0.0), (0.0, 9.0), (0.0, 0.0))
    loss, without, error = compare_losses(sure, unsure, items)
    one = np.log1p(np.exp(-2.0))
    assert loss == pytest.approx((2 * one + 3 * one) / 4)
    assert without == pytest.approx((2 * np.log(2) + 3 * np.log(2)) / 4)
    assert error > 0


def test_equal_predictions_differ_by_nothing() -> None:
    items = [item((1.0, 0.0)), item((0.0, 1.0))]
    same = logits((1.0, 0.5), (0.2, 0.1))
    loss, without, error = compare_losses(same, same, items)
    assert (loss, error) == (without, 0.0)
    assert is_used(loss, without, error)


def test_the_prior_is_dropped_where_it_is_shown_to_hurt() -> None:
    assert is_used(0.50, 0.55, 0.01)
    assert is_used(0.555, 0.55, 0.01)  # within one standard error
    assert not is_used(0.57, 0.55, 0.01)


def test_the_text_says_what_was_chosen_and_why() -> None:
    used = prior_text(PriorChoice(True, 38, 1569, 200, 0.812, 0.835, 0.01))
    assert used == (
        "Prior used: 38 other models, 1,569 questions besides yours (200 of yours known to it); held-out cross-entropy"
        " 0.8120 with it, 0.8350 without; standard error of the difference 0.0100\n"
    )
    dropped = prior_text(PriorChoice(False, 2, 60, 0, 0.9, 0.8, 0.02))
    assert dropped.startswith("Prior not used, because it makes held-out predictions worse: 2 other models")
