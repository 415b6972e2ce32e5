"""The controller of routing.target, by simulation: what it promises holds for every window, whatever comes."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Curve
from depo_gateway.gateway import threshold_controller
from depo_gateway.gateway.threshold_controller import SHARE_WINDOW, ThresholdController

BOUND = 2 * (threshold_controller.REACH + 1) / SHARE_WINDOW  # of the docstring
Source = Callable[[random.Random], float]

SOURCES: dict[str, Source] = {
    "sure": lambda chance: chance.betavariate(30, 2),
    "even": lambda chance: chance.random(),
    "unsure": lambda chance: chance.betavariate(2, 30),
    "ties": lambda chance: 1.0 if chance.random() < 0.9 else chance.random(),
    "all tied": lambda _: 1.0,
    "three values": lambda chance: chance.choice((0.0, 0.5, 1.0)),
    "none": lambda _: 0.0,
}


def routed(controller: ThresholdController, confidences: Sequence[float]) -> list[int]:
    """Where a gateway sends prompts of these confidences: 1 is the last pool."""
    large = []
    for confidence in confidences:
        large.append(int(confidence < controller.threshold))
        controller.decided(large[-1], confidence)
    return large


def worst(values: Sequence[float], wanted: float, window: int = SHARE_WINDOW) -> float:
    """The largest error of the mean over any `window` values in a row."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return float(np.abs((sums[window:] - sums[:-window]) / window - wanted).max())


def stream(chance: random.Random, parts: Sequence[tuple[str, int]]) -> Iterator[float]:
    for name, count in parts:
        for _ in range(count):
            yield SOURCES[name](chance)


@given(
    seed=st.integers(0, 2**32),
    wanted=st.one_of(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.95, 1.0]), st.floats(0.0, 1.0)),
    parts=st.lists(st.tuples(st.sampled_from(sorted(SOURCES)), st.integers(1, 2500)), min_size=1, max_size=4),
    calibrated=st.sampled_from([None, "sure", "unsure", "ties"]),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_every_window_is_within_two_points(
    seed: int, wanted: float, parts: list[tuple[str, int]], calibrated: str | None
) -> None:
    chance = random.Random(seed)
    curve = None if calibrated is None else curve_of([SOURCES[calibrated](chance) for _ in range(500)])
    confidences = list(stream(chance, [*parts, ("even", SHARE_WINDOW)]))
    large = routed(ThresholdController(wanted, wanted, curve), confidences)
    assert worst(large, wanted) <= BOUND < 0.02
    assert (
        worst(large, wanted, 100) <= BOUND * SHARE_WINDOW / 100
    )  # the bound is one on the count, in a window of any length


def test_a_threshold_that_adapts_by_its_reference_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above says something: without the balance the same change of traffic breaks the bound."""
    monkeypatch.setattr(ThresholdController, "rank", property(lambda self: self.start))
    confidences = list(stream(random.Random(0), [("sure", 4000), ("unsure", 4000)]))
    assert worst(routed(ThresholdController(0.3, 0.3, None), confidences), 0.3) > 0.1


def test_a_change_of_traffic_that_knows_the_controller() -> None:
    """An adversary that always sends what moves the balance the wrong way gains no more than the bound."""
    for wanted in (0.1, 0.3, 0.7):
        controller = ThresholdController(wanted, wanted, None)
        large = []
        for index in range(12_000):
            threshold = controller.threshold
            up = (index // 3000) % 2 == 0  # for a while all to the large pool, then all away from it
            confidence = 0.0 if up else 1.0
            large.append(int(confidence < threshold))
            controller.decided(large[-1], confidence)
        assert worst(large, wanted) <= BOUND


def test_the_threshold_hardly_moves_where_nothing_is_wrong() -> None:
    """What jitter costs: of the advantage over a coin at most 1% (a linear rank of step .03 lost 1.5%)."""
    chance = np.random.default_rng(0)
    confidences = chance.random(30_000)
    for wanted in (0.1, 0.3, 0.5):
        large = np.array(routed(ThresholdController(wanted, wanted, None), list(confidences)), bool)[4000:]
        gains = 1.0 - confidences[4000:]
        count = int(large.sum())
        best = np.sort(gains)[::-1][:count].sum()
        coin = gains.mean() * count
        assert (gains[large].sum() - coin) / (best - coin) > 0.99


def curve_of(confidences: Sequence[float]) -> Curve:
    """What a calibration says of two pools whose confidences were these."""
    small = np.array(confidences)
    quality = np.stack([small, np.ones_like(small)], 1)
    return calibration.measure_curve(quality, np.full_like(quality, np.nan), np.ones(len(small)), "gain")


def test_it_starts_at_the_calibrations_threshold() -> None:
    chance = random.Random(1)
    confidences = [SOURCES["sure"](chance) for _ in range(5000)]
    for wanted in (0.1, 0.3, 0.8):
        threshold = ThresholdController(wanted, wanted, curve_of(confidences)).threshold
        assert threshold == pytest.approx(float(np.quantile(confidences, wanted)), abs=0.01)


def test_equal_confidences_at_the_end_of_a_curve_keep_their_mass() -> None:
    sampled = threshold_controller.sample(curve_of([1.0] * 80 + [0.2] * 20), 100)
    assert sampled.count(1.0) == pytest.approx(80, abs=2)


@pytest.mark.parametrize("name", ["all tied", "ties", "three values"])
def test_equal_confidences_stay_or_go_around_a_balance_of_nothing(name: str) -> None:
    """Not around one of REACH, from where the next change of traffic would have no room."""
    controller = ThresholdController(0.3, 0.3, None)
    routed(controller, list(stream(random.Random(5), [(name, 4000)])))
    assert abs(controller.balance) < 3.0


def test_another_checkpoints_confidences_begin_anew() -> None:
    controller = ThresholdController(0.5, 0.5, None)
    routed(controller, [0.9] * 3000)
    controller.expect(curve_of([index / 1000 for index in range(1000)]))
    controller.balance = 0.0
    assert controller.threshold == pytest.approx(0.5, abs=0.02)


def test_what_the_threshold_does_not_decide_is_made_up_for() -> None:
    """Every fifth request is bound to the large pool, every tenth to the small one."""
    chance = random.Random(2)
    controller, large = ThresholdController(0.4, 0.4, None), []
    for index in range(12_000):
        confidence = chance.random()
        bound = 1 if index % 5 == 0 else 0 if index % 10 == 1 else None
        spent = int(confidence < controller.threshold) if bound is None else bound
        large.append(spent)
        controller.decided(spent, confidence if bound is None else None)
    assert worst(large, 0.4) < 0.02
    assert abs(controller.balance) < threshold_controller.REACH


def test_after_an_outage_the_target_holds_at_once() -> None:
    """The small pool is down for 3,000 requests. What was spent then is not taken back from those that follow."""
    chance = random.Random(3)
    controller, large = ThresholdController(0.3, 0.3, None), []
    for index in range(9000):
        confidence = chance.random()
        spent = int(confidence < controller.threshold)
        step = controller.decided(spent, confidence)
        if 3000 <= index < 6000:
            controller.correct(step, 1.0)
            spent = 1
        large.append(spent)
    assert worst(large[:3000], 0.3) < 0.02
    assert worst(large[6000:], 0.3) < 0.02


def test_a_correction_is_as_if_it_had_been_so_from_the_start() -> None:
    one, two = ThresholdController(0.3, 0.3, None), ThresholdController(0.3, 0.3, None)
    for spent in (0.0, 1.0, 0.0):
        one.correct(one.decided(0.0, 0.5), spent)
        two.decided(spent, 0.5)
    assert one.balance == pytest.approx(two.balance)
    assert one.realised == two.realised == pytest.approx(1 / 3)
    step = one.decided(1.0, 0.5)
    one.correct(step, None)  # nobody answered
    assert one.balance == pytest.approx(two.balance)
    assert one.realised == two.realised


def test_the_share_shown_is_that_of_the_last_decisions() -> None:
    controller = ThresholdController(0.3, 0.3, None)
    assert math.isnan(controller.realised)
    first = controller.decided(1.0, 0.5)
    for _ in range(SHARE_WINDOW):
        controller.decided(0.0, 0.5)
    assert controller.realised == 0.0
    controller.correct(first, 0.0)  # long out of the window
    assert controller.realised == 0.0
    assert controller._weight == SHARE_WINDOW


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8])
def test_a_cost_is_weighed_by_tokens(wanted: float) -> None:
    """Answers come 50 requests later, hard prompts have the longer ones, and then all become three times as long."""
    chance = random.Random(4)
    price = 0.2
    controller = ThresholdController(wanted, (wanted - price) / (1 - price), None)
    spent, tokens, open_steps = [], [], []
    for index in range(12_000):
        confidence = chance.random() if index < 6000 else chance.betavariate(2, 30)
        spent.append(1.0 if confidence < controller.threshold else price)
        length = 100 if index < 4000 else 300
        tokens.append(1 + int(chance.expovariate(1.0) * (1.5 - confidence) * length))
        open_steps.append(controller.decided(spent[-1], confidence))
        if index >= 50:
            controller.correct(open_steps[index - 50], spent[index - 50], controller.weight(tokens[index - 50]))
    spent_sums, token_sums = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (np.array(spent) * np.array(tokens), tokens)
    )
    cost = (spent_sums[SHARE_WINDOW:] - spent_sums[:-SHARE_WINDOW]) / (
        token_sums[SHARE_WINDOW:] - token_sums[:-SHARE_WINDOW]
    )
    assert np.abs(cost - wanted).max() < 0.02
    assert controller.realised == pytest.approx(cost[-1], abs=0.01)
