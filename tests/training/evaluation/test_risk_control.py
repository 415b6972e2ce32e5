"""The guarantee holds as often as it says, saves something, and says when there is nothing to guarantee."""

import numpy as np
import pytest

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import route
from depo_gateway.training.evaluation.risk_control import Guarantee, guarantee, p_values, threshold_grid

EPSILON, DELTA, SETS = 0.02, 0.1, 200


def world(generator: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """Predicted quality (N, 2), a noisy view of the true one, which comes second, and outcomes."""
    true = np.stack([generator.uniform(0.2, 0.95, n), generator.uniform(0.7, 0.95, n)], 1)
    predicted = (true + generator.normal(0, 0.12, true.shape)).clip(0.01, 0.99)
    return predicted, true, (generator.uniform(size=true.shape) < true).astype(float)


@pytest.fixture(scope="module")
def population() -> tuple[Array, Array, Array]:
    return world(np.random.default_rng(99), 200_000)


def true_loss(population: tuple[Array, Array, Array], rule: str, threshold: float) -> float:
    predicted, true, _ = population
    served = true[np.arange(len(true)), route(predicted, rule, threshold)]
    return float((true[:, 1] - served).mean())


def naive(predicted: Array, observed: Array, rule: str, thresholds: Array) -> float:
    """The plug-in: the lowest threshold whose mean loss on the sample is within epsilon."""
    rows = np.arange(len(observed))
    losses = [(observed[:, 1] - observed[rows, route(predicted, rule, t)]).mean() for t in thresholds]
    return float(min(t for t, loss in zip(thresholds, losses, strict=True) if loss <= EPSILON))


@pytest.mark.parametrize("rule", ["gain", "difficulty"])
def test_it_is_violated_at_most_as_often_as_it_says_and_the_naive_threshold_half_the_time(
    population: tuple[Array, Array, Array], rule: str
) -> None:
    generator = np.random.default_rng(0)
    thresholds = threshold_grid(world(generator, 500)[0], rule)
    risk = {float(t): true_loss(population, rule, float(t)) for t in thresholds}
    found, saved, plugged = [], [], []
    for _ in range(SETS):
        predicted, _, observed = world(generator, 1000)
        at = guarantee(predicted, observed, rule, thresholds, EPSILON, DELTA)
        found.append(at.passed and risk[at.threshold] > EPSILON)
        saved.append(1 - at.large_share)
        plugged.append(risk[naive(predicted, observed, rule, thresholds)] > EPSILON)
    assert np.mean(found) <= DELTA + 2 * np.sqrt(DELTA * (1 - DELTA) / SETS)
    assert np.mean(plugged) > 0.3
    assert np.mean(saved) > 0.15


def test_two_thousand_prompts_save_most_of_what_perfect_knowledge_of_the_risk_would(
    population: tuple[Array, Array, Array],
) -> None:
    generator = np.random.default_rng(1)
    thresholds = threshold_grid(world(generator, 500)[0], "gain")
    possible = min(t for t in thresholds if true_loss(population, "gain", float(t)) <= EPSILON)
    best = float((route(population[0], "gain", float(possible)) == 0).mean())
    saved = []
    for _ in range(20):
        predicted, _, observed = world(generator, 2000)
        saved.append(1 - guarantee(predicted, observed, "gain", thresholds, EPSILON, 0.05).large_share)
    assert np.mean(saved) > 0.5 * best > 0.1


@pytest.mark.parametrize("values", [(1.0, -1.0), (1.0, 0.0), (1.0, 0.0, 0.0, -1.0), (0.02, 0.02)])
def test_p_values_are_below_delta_no_more_than_delta_of_the_time_at_the_edge(values: tuple[float, ...]) -> None:
    """Losses whose mean is epsilon exactly: the hardest case that a test must not reject."""
    generator = np.random.default_rng(0)
    centre = np.array(values) - np.mean(values)
    losses = (EPSILON + 0.98 * centre)[generator.integers(0, len(values), (500, 2000))].clip(-1, 1)
    assert (p_values(losses, EPSILON, DELTA) <= DELTA).mean() <= DELTA + 0.02


def test_p_values_fall_with_the_loss_and_with_prompts() -> None:
    generator = np.random.default_rng(0)
    noise = generator.choice([-0.5, 0.5], (4000, 1))
    losses = noise - np.array([[0.1, 0.0, -0.03]])
    few, many = p_values(losses[:400], EPSILON, 0.05), p_values(losses, EPSILON, 0.05)
    assert many[0] < 1e-6 < many[2]
    assert many[0] < few[0]
    assert p_values(np.zeros((2000, 1)), EPSILON, 0.05)[0] < 1e-3  # the same loss always: far beyond Hoeffding's e^-0.4


def test_each_bet_is_made_before_its_loss_is_seen() -> None:
    """The sums of p_values, one loss after the other."""
    losses = np.random.default_rng(0).choice([-0.8, 0.1, 0.6], 300)
    mean, capital, most, total, squares = (1 + EPSILON) / 2, 1.0, 1.0, 0.5, 0.25
    for i, loss in enumerate(losses):
        z = (1 + loss) / 2
        stake = np.sqrt(2 * np.log(1 / DELTA) / (300 * squares / (i + 1)))
        capital *= 1 - min(stake, 0.75 / (1 - mean)) * (z - mean)
        most = max(most, capital)
        total += z
        squares += (z - total / (i + 2)) ** 2
    assert p_values(losses[:, None], EPSILON, DELTA)[0] == pytest.approx(1 / most)


def test_the_first_threshold_that_fails_ends_it() -> None:
    """Of two kinds of prompts the surer one loses all; the other gains so much that both together look safe."""
    predicted = np.repeat([[0.6, 0.8], [0.4, 0.9]], [400, 1600], 0)
    observed = np.repeat([[0.0, 1.0], [1.0, 0.0]], [400, 1600], 0)
    at = guarantee(predicted, observed, "gain", np.array([1.0, 0.75, 0.45]), EPSILON, DELTA)
    assert (at.threshold, at.large_share) == (1.0, 1.0)
    assert guarantee(predicted, observed, "gain", np.array([0.45]), EPSILON, DELTA).passed  # tested alone it is safe


def test_a_table_sorted_by_outcome_is_no_proof() -> None:
    observed = np.repeat(
        [[1.0, 0.0], [0.0, 1.0]], [1000, 1100], 0
    )  # first all gains, then all losses: 0.048 on average
    at = guarantee(np.full((2100, 2), 0.5), observed, "gain", np.array([1.0]), EPSILON, DELTA)
    assert not at.passed


def test_where_nothing_passes_it_says_so_and_gives_threshold_1() -> None:
    predicted = np.tile([[0.9, 0.5]], (300, 1))  # sure of the small pool, and wrong
    observed = np.tile([[0.0, 1.0]], (300, 1))
    at = guarantee(predicted, observed, "gain", threshold_grid(predicted, "gain"), EPSILON, 0.05)
    assert (at.passed, at.threshold, at.loss, at.large_share) == (False, 1.0, 1.0, 0.0)


def test_all_large_needs_no_proof() -> None:
    predicted = np.tile([[0.4, 0.5]], (3, 1))
    at = guarantee(predicted, np.tile([[0.0, 1.0]], (3, 1)), "difficulty", np.array([1.0, 0.3]), EPSILON, 0.05)
    assert at == Guarantee(EPSILON, 0.05, True, 1.0, 0.0, 0.0, 1.0, 3)


def test_three_pools_and_an_order_of_rows_that_does_not_matter_much() -> None:
    generator = np.random.default_rng(3)
    true = np.stack([generator.uniform(0.2, 0.9, 3000), generator.uniform(0.5, 0.9, 3000), np.full(3000, 0.9)], 1)
    observed = (generator.uniform(size=true.shape) < true).astype(float)
    order = np.argsort(observed[:, 0], kind="stable")  # sorted by outcome, as a table may be
    at = guarantee(true[order], observed[order], "gain", threshold_grid(true[:500], "gain"), 0.05, 0.05)
    assert at.passed
    assert 0.05 < 1 - at.large_share < 1
    assert at.loss <= 0.05


def test_the_grid_is_fixed_by_scores_alone_safest_first() -> None:
    predicted, _, _ = world(np.random.default_rng(0), 500)
    thresholds = threshold_grid(predicted, "gain")
    assert thresholds[0] == 1.0
    assert (np.diff(thresholds) < 0).all()
    shares = [(route(predicted, "gain", float(t)) == 1).mean() for t in thresholds]
    assert max(-np.diff(shares)) < 0.02
