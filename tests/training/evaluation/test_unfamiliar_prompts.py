"""Unfamiliar prompts in a routing's figures: as many to each pool as of the familiar ones, and at random."""

import numpy as np
import pytest

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import RULES, route
from depo_gateway.training.evaluation.routing_metrics import apgr, routing_scores
from depo_gateway.training.evaluation.unfamiliar_prompts import deciding_quality, unfamiliar_message, unfamiliar_note

COUNT = 6000


def world(pools: int = 2) -> tuple[Array, Array, np.ndarray]:
    """Predicted and observed quality (N, K), and which prompts are unfamiliar: a third, all with the same prediction.

    Half of these are hard, which their prediction does not say, and the hard ones come first.
    """
    chance = np.random.default_rng(0)
    hard = chance.uniform(size=COUNT)
    unfamiliar = np.arange(COUNT) % 3 == 0
    hard[unfamiliar] = np.where(np.arange(unfamiliar.sum()) < unfamiliar.sum() / 2, 0.9, 0.1)
    more = np.linspace(0.1, 1.0, pools)
    truth = 0.95 - 0.8 * hard[:, None] * (1.1 - more)
    predicted = np.where(unfamiliar[:, None], truth[unfamiliar].mean(0), truth)
    return predicted, (chance.uniform(size=truth.shape) < truth).astype(float), unfamiliar


@pytest.mark.parametrize("pools", [2, 3])
def test_unfamiliar_prompts_have_the_shares_of_the_others_at_every_threshold(pools: int) -> None:
    predicted, _, unfamiliar = world(pools)
    deciding = deciding_quality(predicted, unfamiliar)
    assert (deciding[~unfamiliar] == predicted[~unfamiliar]).all()
    for rule in RULES:
        for threshold in (0.3, 0.5, 0.7, 0.85, 0.95):
            pool = route(deciding, rule, threshold)
            of = [np.bincount(pool[rows], minlength=pools) / rows.sum() for rows in (unfamiliar, ~unfamiliar)]
            assert of[0] == pytest.approx(of[1], abs=0.002)
            alone = route(predicted, rule, threshold)[unfamiliar]
            assert len(set(alone)) == 1  # by their own prediction all would go to the same pool


def test_their_outcomes_do_not_matter() -> None:
    predicted, observed, unfamiliar = world()
    score = routing_scores(deciding_quality(predicted, unfamiliar))["gain"]
    found = {rows: apgr(score[of], *observed[of].T) for rows, of in (("new", unfamiliar), ("known", ~unfamiliar))}
    assert found["new"] == pytest.approx(0.5, abs=0.05)
    assert found["known"] > 0.65
    mixture = [apgr(routing_scores(deciding_quality(predicted, unfamiliar, s))["gain"], *observed.T) for s in range(20)]
    assert np.std(mixture) < 0.02
    assert 0.5 < np.mean(mixture) < found["known"]


def test_the_draw_is_the_same_every_time_and_none_where_all_is_known() -> None:
    predicted, _, unfamiliar = world()
    assert (deciding_quality(predicted, unfamiliar) == deciding_quality(predicted, unfamiliar)).all()
    assert deciding_quality(predicted, np.zeros(COUNT, bool)) is predicted
    with pytest.raises(ValueError, match="all 6000 prompts are unlike those that the checkpoint was fitted on"):
        deciding_quality(predicted, np.ones(COUNT, bool))


def test_a_checkpoint_of_one_pool_is_ranked_by_difficulty() -> None:
    deciding = deciding_quality(np.array([[0.1], [0.9], [0.5], [0.5]]), np.array([False, False, True, True]))
    assert sorted(deciding[2:, 0]) == [0.1, 0.9]


def test_nothing_is_said_where_nothing_is_unfamiliar() -> None:
    assert unfamiliar_note(None) == unfamiliar_note(0.0) == unfamiliar_message(np.zeros(3, bool)) == ""
    assert unfamiliar_note(0.124).startswith("12.4% of the prompts are unfamiliar")
    assert unfamiliar_message(np.array([True, False])).startswith("1 of 2 prompts are unfamiliar")
