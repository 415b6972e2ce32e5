"""Scores and a threshold -> a pool. All of it pure."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depo_gateway.estimator.configuration.shared import BackendConfig
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import routing
from depo_gateway.gateway.config import Modality, PoolConfig
from depo_gateway.gateway.routing import Decision, Eligible, eligible

POOLS = ("small", "middle", "large")
ALL = Eligible(POOLS)
BELOW_ONE = math.nextafter(1.0, 0.0)


def pool(context: int | None = None, accepts: tuple[Modality, ...] = ("text", "tools", "image", "audio")) -> PoolConfig:
    return PoolConfig("m", (BackendConfig("http://x"),), context_tokens=context, accepts=accepts)


def quality(*values: float) -> dict[str, float]:
    return dict(zip(POOLS, values, strict=False))


def test_gain_is_what_is_lost_against_the_best_pool() -> None:
    assert routing.confidences(quality(0.5, 0.7, 0.9), "gain", ALL) == pytest.approx(quality(0.6, 0.8, 1.0))
    assert routing.confidences(quality(0.1, 0.1, 0.1), "gain", ALL) == quality(1.0, 1.0, 1.0)  # all will fail: cheap
    assert routing.confidences(quality(0.9, 0.5, 0.2), "gain", ALL) == pytest.approx(quality(1.0, 0.6, 0.3))
    assert routing.confidences(quality(0.0, 0.5, 1.0), "gain", ALL)["small"] == 0.0


def test_a_pool_that_can_not_serve_is_no_loss() -> None:
    two = Eligible(("small", "middle"))
    assert routing.confidences(quality(0.5, 0.5, 0.9), "gain", two) == {"small": 1.0, "middle": 1.0}


def test_difficulty_is_the_pools_own_quality() -> None:
    assert routing.confidences(quality(0.5, 0.7, 0.9), "difficulty", ALL) == quality(0.5, 0.7, 0.9)
    assert routing.confidences({"small": 0.4}, "difficulty", ALL) == {"small": 0.4}  # a policy's checkpoint: one pool


@pytest.mark.parametrize(
    ("confidence", "threshold", "chosen", "reason"),
    [
        (quality(0.9, 0.95, 1.0), 0.85, "small", "confident"),
        (quality(0.85, 0.95, 1.0), 0.85, "small", "confident"),
        (quality(0.84, 0.95, 1.0), 0.85, "middle", "unsure"),
        (quality(0.1, 0.2, 0.3), 0.85, "large", "unsure"),
        (quality(0.0, 0.0, 0.0), 0.0, "small", "confident"),
        ({"small": 0.4}, 0.5, "large", "unsure"),
        ({"small": 0.6}, 0.5, "small", "confident"),
    ],
)
def test_the_cheapest_confident_pool_serves(
    confidence: dict[str, float], threshold: float, chosen: str, reason: str
) -> None:
    decision = routing.by_threshold(confidence, ALL, threshold, "v1")
    assert (decision.pool, decision.reason) == (chosen, reason)
    assert (decision.confidence, decision.threshold) == (confidence["small"], threshold)
    assert (decision.estimator, decision.propensity) == ("v1", 1.0)


@pytest.mark.parametrize("excluded", ["context", "accepts"])
def test_the_reason_tells_why_the_cheapest_could_not(excluded: str) -> None:
    candidates = Eligible(("middle", "large"), Reason(excluded))
    decision = routing.by_threshold(quality(1.0, 0.9, 1.0), candidates, 0.85, "v1")
    assert (decision.pool, decision.reason, decision.confidence) == ("middle", excluded, 0.9)
    assert routing.by_threshold(quality(1.0, 0.1, 1.0), candidates, 0.85, "v1").reason == "unsure"


@pytest.mark.parametrize(
    ("needs", "tokens", "expected"),
    [
        (set(), 10, Eligible(("a", "b", "c"))),
        (set(), 101, Eligible(("b", "c"), Reason.CONTEXT)),
        (set(), 100, Eligible(("a", "b", "c"))),
        (set(), 10_000, Eligible(("c",), Reason.CONTEXT)),
        ({"tools"}, 10, Eligible(("a", "b", "c"))),
        ({"image"}, 10, Eligible(("b", "c"), Reason.ACCEPTS)),
        ({"image"}, 2_000, Eligible(("c",), Reason.ACCEPTS)),
        ({"image", "tools"}, 10, Eligible(("c",), Reason.ACCEPTS)),
        ({"audio"}, 10, Eligible((), Reason.ACCEPTS)),
    ],
)
def test_eligibility(needs: set[str], tokens: int, expected: Eligible) -> None:
    pools = {
        "a": pool(100, ("text", "tools")),
        "b": pool(1_000, ("text", "image")),
        "c": pool(None, ("text", "image", "tools")),
    }
    # b takes no tools, so a request with tools leaves a and c
    if needs == {"tools"}:
        expected = Eligible(("a", "c"))
    assert routing.eligible(pools, frozenset(needs), tokens) == expected


def test_a_prompt_too_long_for_all_goes_where_there_is_most_room() -> None:
    pools = {"a": pool(100), "b": pool(300), "c": pool(200)}
    assert routing.eligible(pools, frozenset(), 1_000) == Eligible(("b",), Reason.CONTEXT)
    assert routing.eligible({"a": pool(300), "b": pool(100)}, frozenset(), 1_000) == Eligible(("a",))


@given(
    explore=st.floats(1e-9, 1.0),
    draw=st.floats(0.0, 1.0, exclude_max=True),
    count=st.integers(1, 3),
)
def test_propensities_are_those_of_the_draw(explore: float, draw: float, count: int) -> None:
    pools = POOLS[:count]
    decision = routing.by_threshold(quality(0.1, 0.9, 1.0), Eligible(pools), 0.5, "v", explore, draw)
    greedy = pools[min(1, count - 1)]
    if decision.reason != "explore":
        assert decision.pool == greedy
        assert draw >= explore or count == 1
    expected = explore / count + (1 - explore) * (decision.pool == greedy) if count > 1 else 1.0
    assert decision.propensity == pytest.approx(expected)
    assert 0 < decision.propensity <= 1


@pytest.mark.parametrize("explore", [0.05, 0.3, 1.0])
def test_propensities_sum_to_one_and_match_frequencies(explore: float) -> None:
    confidence = quality(0.1, 0.9, 1.0)
    steps = 30_000
    seen: Counter[str] = Counter()
    propensity: dict[str, float] = {}
    for step in range(steps):
        decision = routing.by_threshold(confidence, ALL, 0.5, "v", explore, step / steps)
        seen[decision.pool] += 1
        propensity[decision.pool] = decision.propensity
    assert sum(propensity.values()) == pytest.approx(1.0)
    for name in POOLS:
        assert seen[name] / steps == pytest.approx(propensity[name], abs=2e-4)


def test_without_exploring_the_draw_means_nothing() -> None:
    for draw in (0.0, 0.5, BELOW_ONE):
        decision = routing.by_threshold(quality(0.9, 1.0, 1.0), ALL, 0.5, "v", 0.0, draw)
        assert (decision.pool, decision.reason, decision.propensity) == ("small", "confident", 1.0)


def test_overload_goes_to_the_pool_named() -> None:
    decision = routing.without_scores(ALL, "large", {}, 0.85, 0.0)
    assert decision == Decision("large", Reason.OVERLOAD, None, 0.85, "", 1.0)


def test_overload_tosses_a_coin_at_the_usual_shares() -> None:
    shares = quality(0.5, 0.2, 0.3)
    draws = [(0.0, "small"), (0.49, "small"), (0.51, "middle"), (0.71, "large"), (BELOW_ONE, "large")]
    for draw, expected in draws:
        decision = routing.without_scores(ALL, "share", shares, 0.85, draw)
        assert (decision.pool, decision.reason) == (expected, "overload")
        assert decision.propensity == pytest.approx(shares[expected])


def test_by_share_the_scores_are_only_shown() -> None:
    shares, sure = quality(0.5, 0.2, 0.3), quality(1.0, 1.0, 1.0)
    for draw, expected in [(0.0, "small"), (0.51, "middle"), (0.71, "large"), (BELOW_ONE, "large")]:
        decision = routing.by_share(sure, ALL, shares, 0.85, "v", draw)
        assert (decision.pool, decision.reason, decision.confidence) == (expected, "explore", 1.0)
        assert (decision.threshold, decision.estimator) == (0.85, "v")
        assert decision.propensity == pytest.approx(shares[expected])
    two = Eligible(("middle", "large"), Reason.CONTEXT)
    assert routing.by_share(sure, two, shares, 0.85, "v", 0.39).propensity == pytest.approx(0.4)
    alone = routing.by_share(sure, Eligible(("large",), Reason.CONTEXT), shares, 0.85, "v", 0.5)
    assert (alone.pool, alone.reason, alone.propensity) == ("large", "context", 1.0)  # nothing was drawn


def test_overload_among_fewer_pools_keeps_their_proportions() -> None:
    two = Eligible(("middle", "large"), Reason.CONTEXT)
    decision = routing.without_scores(two, "small", quality(0.5, 0.2, 0.3), 0.85, 0.39)  # the named one can't serve
    assert (decision.pool, decision.propensity) == ("middle", pytest.approx(0.4))
    even = routing.without_scores(two, "share", {}, 0.85, 0.6)
    assert (even.pool, even.propensity) == ("large", 0.5)


def decided(name: str, reason: str = "unsure") -> Decision:
    return Decision(name, Reason(reason), 0.5, 0.85, "v", 1.0)


@pytest.mark.parametrize(
    ("decision", "before", "looping", "expected"),
    [
        (decided("small", "confident"), "small", False, ("small", "sticky")),
        (decided("small", "confident"), "large", False, ("large", "sticky")),
        (decided("large"), "small", False, ("large", "unsure")),
        (decided("large"), "middle", False, ("large", "unsure")),
        (decided("large"), "small", True, ("small", "sticky")),
        (decided("small", "confident"), "large", True, ("large", "sticky")),
        (decided("large", "overload"), "small", False, ("small", "sticky")),  # a random draw is no need to move up
        (decided("small", "overload"), "large", False, ("large", "sticky")),
        (decided("large", "explore"), "small", False, ("small", "sticky")),
        (decided("middle", "confident"), "gone", False, ("middle", "confident")),
    ],
)
def test_a_conversation_keeps_its_pool_unless_it_must_move_up(
    decision: Decision, before: str, looping: bool, expected: tuple[str, str]
) -> None:
    kept = routing.keep(decision, before, POOLS, ALL, looping)
    assert (kept.pool, kept.reason) == expected
    assert (kept.confidence, kept.threshold, kept.estimator) == (0.5, 0.85, "v")


def test_a_conversation_leaves_a_pool_that_can_take_it_no_more() -> None:
    candidates = Eligible(("middle", "large"), Reason.CONTEXT)
    kept = routing.keep(decided("middle", "context"), "small", POOLS, candidates, True)
    assert (kept.pool, kept.reason) == ("middle", "context")


def test_a_prompt_too_long_for_all_is_still_routed_among_the_longest() -> None:
    pools = {
        "a": PoolConfig("a", (), context_tokens=100),
        "b": PoolConfig("b", (), context_tokens=200),
        "c": PoolConfig("c", (), context_tokens=200),
    }
    assert eligible(pools, frozenset(), 500) == Eligible(("b", "c"), Reason.CONTEXT)
    assert eligible({"b": pools["b"], "c": pools["c"]}, frozenset(), 500) == Eligible(("b", "c"), None)
