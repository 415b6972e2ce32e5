"""Estimates from logs against a world whose truth is known."""

import dataclasses

import numpy as np
import pytest

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import route
from depo_gateway.estimator.records.types import Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.logged_traffic import traffic_of
from depo_gateway.training.evaluation.off_policy import (
    Integers,
    Logs,
    PolicyValues,
    estimate,
    label_rates,
    length_routing,
    logged_quality,
    paired_difference,
    propensity_weights,
    random_routing,
    select_records,
    usable_records,
    value_intervals,
)

THRESHOLDS = (0.75, 0.95)  # of the policies to be valued; the one that logged has 0.85
SEEDS = 150


def world(generator: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """Predicted quality (N, 2), off by noise and for the large pool by a bias too; the true one; outcomes."""
    true = np.stack([generator.uniform(0.2, 0.95, n), generator.uniform(0.6, 0.95, n)], 1)
    predicted = (true + generator.normal(0, 0.1, true.shape) - np.array([0.0, 0.15])).clip(0.01, 0.99)
    return predicted, true, (generator.uniform(size=true.shape) < true).astype(float)


def policies(predicted: Array) -> Integers:
    routed = [route(predicted, "gain", threshold) for threshold in THRESHOLDS]
    constants = [np.full(len(predicted), k) for k in range(2)]
    return np.stack([*routed, *constants], 1)


def logged(
    generator: np.random.Generator, n: int, explore: float, rates: tuple[float, float] = (1.0, 1.0), shadowed: float = 0
) -> tuple[Logs, Array]:
    """Logs of a router with threshold 0.85, labels of a share of each pool's records; and the outcomes."""
    predicted, _, outcomes = world(generator, n)
    greedy = route(predicted, "gain", 0.85)
    pool = np.where(generator.uniform(size=n) < explore, generator.integers(0, 2, n), greedy)
    propensity = explore / 2 + (1 - explore) * (pool == greedy)
    observed = np.full((n, 2), np.nan)
    labelled = generator.uniform(size=n) < np.array(rates)[pool]
    observed[labelled, pool[labelled]] = outcomes[labelled, pool[labelled]]
    complete = generator.uniform(size=n) < shadowed
    observed[complete] = outcomes[complete]
    return Logs(pool, propensity, observed, predicted, np.arange(n)), outcomes


@pytest.fixture(scope="module")
def truth() -> Array:
    predicted, true, _ = world(np.random.default_rng(99), 400_000)
    return np.array([true[np.arange(len(true)), chosen].mean() for chosen in policies(predicted).T])


def covered(values: PolicyValues, truth: Array) -> np.ndarray:
    low, high = value_intervals(values)
    return (low <= truth) & (truth <= high)


@pytest.mark.parametrize(
    ("rates", "shadowed"), [((1.0, 1.0), 0.0), ((0.8, 0.3), 0.0), ((0.6, 0.6), 0.15)], ids=["all", "uneven", "shadowed"]
)
def test_both_estimates_cover_the_truth_as_often_as_they_say_and_the_naive_mean_does_not(
    truth: Array, rates: tuple[float, float], shadowed: float
) -> None:
    snips, robust, naive, points = [], [], [], []
    for seed in range(SEEDS):
        logs, _ = logged(np.random.default_rng(seed), 1500, 0.3, rates, shadowed)
        chosen = policies(logs.predicted)
        found = estimate(logs, chosen, resamples=200)
        snips.append(covered(found.snips, truth))
        robust.append(covered(found.doubly_robust, truth))
        points.append([found.snips.point, found.doubly_robust.point])
        agrees = (chosen == logs.pool[:, None]) & ~np.isnan(logs.observed[np.arange(1500), logs.pool])[:, None]
        for t in range(len(truth)):
            label = logs.observed[agrees[:, t], logs.pool[agrees[:, t]]]
            error = label.std() / np.sqrt(len(label))
            naive.append((t, abs(label.mean() - truth[t]) < 1.96 * error))
    margin = 2.5 * np.sqrt(0.95 * 0.05 / SEEDS)
    for hits in (snips, robust):
        rate = np.mean(hits, 0)
        assert (rate > 0.95 - margin - 0.01).all(), rate
        assert (rate < 1.0).any(), rate
    assert np.mean(points, 0) == pytest.approx(np.tile(truth, (2, 1)), abs=0.008)  # unbiased, whatever is predicted
    if not shadowed:
        assert min(np.mean([hit for t, hit in naive if t == k]) for k in range(4)) < 0.6


def test_good_predictions_narrow_the_interval() -> None:
    logs, outcomes = logged(np.random.default_rng(0), 3000, 0.1)
    sharp = dataclasses.replace(logs, predicted=outcomes * 0.9 + 0.05)
    chosen = policies(logs.predicted)
    widths = {}
    for name, values in (("snips", estimate(sharp, chosen).snips), ("robust", estimate(sharp, chosen).doubly_robust)):
        low, high = value_intervals(values)
        widths[name] = high - low
    assert (widths["robust"] < 0.6 * widths["snips"]).all()


def test_complete_records_are_the_outcome_itself() -> None:
    logs, outcomes = logged(np.random.default_rng(0), 500, 0.0, shadowed=1.0)
    chosen = policies(logs.predicted)
    found = estimate(logs, chosen)
    direct = [outcomes[np.arange(500), column].mean() for column in chosen.T]
    assert found.snips.point == pytest.approx(direct)
    assert found.doubly_robust.point == pytest.approx(direct)
    assert found.effective == pytest.approx(500)
    assert not found.unsupported.any()


def test_deterministic_logs_support_only_what_was_done() -> None:
    logs, outcomes = logged(np.random.default_rng(0), 2000, 0.0)
    assert usable_records(logs)[1] == {}
    done = route(logs.predicted, "gain", 0.85)
    chosen = np.stack([done, route(logs.predicted, "gain", 0.5), np.ones(2000, np.int64)], 1)
    found = estimate(logs, chosen)
    assert found.snips.point[0] == pytest.approx(outcomes[np.arange(2000), done].mean())
    assert found.unsupported[0] == 0
    assert (found.unsupported[1:] > 0.05).all()
    for values in (found.snips, found.doubly_robust):
        assert np.isnan(values.point[1:]).all()
        low, high = value_intervals(values)
        assert np.isnan([low[1:], high[1:]]).all()


def test_a_pool_without_labels_is_not_supported() -> None:
    logs, _ = logged(np.random.default_rng(0), 1000, 0.3, rates=(1.0, 0.0))
    found = estimate(logs, policies(logs.predicted))
    assert label_rates(logs).tolist() == [1.0, 0.0]
    assert np.isnan(found.snips.point).tolist() == [True, True, False, True]


def test_what_is_left_out_and_why() -> None:
    generator = np.random.default_rng(0)
    explored, _ = logged(generator, 300, 0.2)
    fixed, _ = logged(generator, 200, 0.0)
    both = Logs(
        *(
            np.concatenate([getattr(part, name) for part in (explored, fixed)])
            for name in ("pool", "propensity", "observed", "predicted")
        ),
        np.arange(500),
    )
    used, left_out = usable_records(both)
    assert used.tolist() == [True] * 300 + [False] * 200
    assert left_out == {"without a chance for another pool (explore: 0)": 200}
    unlabelled, _ = logged(generator, 300, 0.2, rates=(0.0, 0.0), shadowed=0.1)
    used, left_out = usable_records(unlabelled)
    assert select_records(unlabelled, used).complete.all()
    assert left_out == {"without label": 300 - used.sum()}


def test_draws_for_unfamiliar_prompts_are_no_exploration_of_the_others() -> None:
    """Both kinds are used: the draws as what they are, and the others as far as a policy agrees with them."""
    generator = np.random.default_rng(0)
    drawn, _ = logged(generator, 1000, 1.0)
    fixed, _ = logged(generator, 1000, 0.0)
    names = ("pool", "propensity", "observed", "predicted")
    parts = [np.concatenate([getattr(part, name) for part in (drawn, fixed)]) for name in names]
    both = Logs(*parts, np.arange(2000), np.arange(2000) < 1000)
    used, left_out = usable_records(both)
    assert used.all()
    assert left_out == {}
    done, other = route(both.predicted, "gain", 0.85), route(both.predicted, "gain", 0.5)
    found = estimate(both, np.stack([done, other, np.where(both.unfamiliar, other, done)], 1))
    assert np.isnan(found.snips.point).tolist() == [False, True, False]
    known = select_records(both, np.arange(2000) >= 1000)
    assert known.unfamiliar is not None
    assert not known.unfamiliar.any()
    assert not known.explored.any()
    explored = select_records(both, np.arange(2000) < 1000)
    assert not explored.explored.any()
    mixed = Logs(*parts, np.arange(2000), np.arange(2000) < 500)  # the rest was explored: the fixed ones are left out
    assert usable_records(mixed)[0].tolist() == [True] * 1000 + [False] * 1000


def test_traffic_tells_which_draws_were_for_unfamiliar_prompts() -> None:
    reasons = ("unfamiliar", "confident", "overload", "unfamiliar", "explore")
    records = [
        Record(f"r{n}", float(n), pool="small", reason=reason, propensity=0.5, pools=("small", "large"), status=200,
               asked="hi", seq=n) for n, reason in enumerate(reasons)
    ]  # fmt: skip
    labelled = [Labelled(item, (Label(item.seq, "small", "exact", 1.0),)) for item in records]
    logs = traffic_of(labelled, ("small", "large"), TextConfig(), "here").logs(np.zeros((5, 2)))
    assert logs.unfamiliar is not None
    assert logs.unfamiliar.tolist() == [True, False, True, False]  # an overload is not free
    assert logs.explored.tolist() == [False, True, False, True]


def test_weights_and_effective_size_by_hand() -> None:
    logs = Logs(
        np.array([0, 0, 1, 1, 0]),
        np.array([0.9, 0.9, 0.1, 0.001, 0.9]),
        np.array([[1, np.nan], [np.nan, np.nan], [np.nan, 1], [np.nan, 0], [1, 1]]),
        np.full((5, 2), 0.5),
        np.arange(5),
    )
    assert label_rates(logs).tolist() == [0.5, 1.0]
    assert propensity_weights(logs, clip=50).tolist() == pytest.approx([1 / 0.9 / 0.5, 0, 10, 50, 1])
    found = estimate(logs, np.ones((5, 1), np.int64), clip=50, min_effective=0)
    assert found.snips.point[0] == pytest.approx((10 * 1 + 50 * 0 + 1) / 61)
    assert found.doubly_robust.point[0] == pytest.approx((4 * 0.5 + 1 + 10 * 0.5 - 50 * 0.5) / 5)
    assert found.effective[0] == pytest.approx(61**2 / (100 + 2500 + 1))
    assert found.clipped == pytest.approx(1 / 3)


def test_what_was_hardly_explored_is_not_estimated_however_well_the_weights_look() -> None:
    """No record that the router would have sent to the large pool was seen on the small one, by bad luck."""
    logs, _ = logged(np.random.default_rng(0), 400, 0.02)
    done = route(logs.predicted, "gain", 0.85)
    seen = (logs.pool == done) | (done == 0)
    unlucky = select_records(logs, seen)
    chosen = np.concatenate([policies(unlucky.predicted), done[seen, None]], 1)
    found = estimate(unlucky, chosen)
    assert found.effective[2] > 150
    assert found.expected[2] < 15
    for values in (found.snips, found.doubly_robust):
        assert np.isnan(values.point[2])
    assert found.expected[4] > 350
    assert not np.isnan(found.snips.point[4])  # what was done anyway


def test_whole_conversations_are_resampled() -> None:
    generator = np.random.default_rng(0)
    alone, _ = logged(generator, 100, 0.3)
    copies = np.repeat(np.arange(100), 20)
    parts = [getattr(alone, name)[copies] for name in ("pool", "propensity", "observed", "predicted")]
    widths = []
    for conversation in (np.arange(2000), copies):
        low, high = value_intervals(estimate(Logs(*parts, conversation), policies(parts[3])).snips)
        widths.append(high - low)
    assert (widths[1] > 3 * widths[0]).all()


def test_random_routing_and_differences_are_paired() -> None:
    logs, _ = logged(np.random.default_rng(0), 2000, 0.3)
    chosen = policies(logs.predicted)
    found = estimate(logs, chosen)
    constants = PolicyValues(found.snips.point[2:], found.snips.draws[:, 2:])
    at_random = random_routing(constants, found.shares, found.share_draws)
    assert at_random.point[0] == pytest.approx(found.shares[0] @ constants.point)
    ahead = paired_difference(found.snips, at_random)
    assert ahead.point[2:] == pytest.approx([0.0, 0.0], abs=1e-12)
    low, high = value_intervals(ahead)
    assert low[0] > 0  # the rule knows something
    assert np.ptp([low[2:], high[2:]]) < 1e-9
    assert not np.isnan(
        random_routing(PolicyValues(np.array([0.5, np.nan]), np.full((3, 2), np.nan)), *zero_large()).point
    ).any()


def zero_large() -> tuple[Array, Array]:
    return np.array([[1.0, 0.0]]), np.tile([[[1.0, 0.0]]], (3, 1, 1))


def test_length_takes_the_same_shares() -> None:
    chosen = length_routing(np.array([5.0, 1, 4, 2, 3, 6, 7, 8, 9, 10]), np.array([[0.7, 0.3], [0.0, 1.0], [1.0, 0.0]]))
    assert chosen[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert chosen[:, 1].all()
    assert not chosen[:, 2].any()


def test_what_served_is_valued_by_its_labels_whatever_their_rates() -> None:
    """Most answers of the small pool have no label: their mean would belong to the large pool."""
    generator = np.random.default_rng(5)
    logs, outcomes = logged(generator, 20_000, explore=0.1, rates=(0.2, 0.9), shadowed=0.1)
    served = outcomes[np.arange(len(logs.pool)), logs.pool].mean()
    found = logged_quality(logs)
    (low,), (high,) = value_intervals(found)
    assert found.point[0] == pytest.approx(served, abs=0.012)
    assert low < served < high
    labels = logs.observed[np.arange(len(logs.pool)), logs.pool]
    assert abs(np.nanmean(labels) - served) > 0.03
    silent = dataclasses.replace(logs, observed=np.where(logs.pool[:, None] == 0, np.nan, logs.observed))
    assert np.isnan(logged_quality(silent).point[0])


def test_the_value_of_what_served_is_paired_with_estimates() -> None:
    logs, _ = logged(np.random.default_rng(6), 3000, explore=0.2, shadowed=1.0)
    same = estimate(logs, logs.pool[:, None]).snips
    assert logged_quality(logs).draws == pytest.approx(same.draws)
