"""The baselines' arithmetic, against values worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.depo.catalog import TITLES, method_of, parse
from benchmarks.depo.estimated import Depo
from benchmarks.depo.methods import EASY, HOPELESS, Baseline, Greso, Mopps, Oracle, Polaris, kind_of
from depo_gateway.training.rl.group_labels import Group


def group(index: int, passed: int, size: int = 8) -> Group:
    return Group(index, (1.0,) * passed + (0.0,) * (size - passed))


def test_a_group_is_easy_hopeless_or_informative() -> None:
    assert [kind_of(group(0, passed)) for passed in (0, 1, 7, 8)] == [HOPELESS, 2, 2, EASY]


def test_grpo_and_dapo_take_the_same_prompts_and_none_twice_in_a_step() -> None:
    grpo, dapo = Baseline(10, 3), Baseline(10, 3, dynamic=True)
    first, more = dapo.choose(4).indices, dapo.choose(4).indices
    assert grpo.choose(4).indices == first
    assert not set(first) & set(more)
    assert dapo.refill(4, 1, 0.9) == 4


def test_polaris_drops_what_always_passed_before_and_what_mostly_passes_within_a_stage() -> None:
    polaris = Polaris(6, 0, steps=6)  # stages of two steps

    def counted(indices: Sequence[int]) -> list[Group]:
        assert list(indices) == list(range(6))
        return [group(index, 8 if index < 2 else 0) for index in indices]

    polaris.prepare(counted, counted)
    assert polaris.kept == {2, 3, 4, 5}
    assert set(polaris.choose(4).indices) == {2, 3, 4, 5}
    polaris.observe([group(2, 7), group(3, 8)])
    assert polaris.kept == {2, 3, 4, 5}
    polaris.observe([group(2, 8), group(3, 6)])  # 15 of 16 = 0.94 and 14 of 16 = 0.88
    assert polaris.kept == {3, 4, 5}


def test_polaris_goes_on_when_nothing_is_left() -> None:
    polaris = Polaris(3, 0, steps=3)
    polaris.drop({0: [1.0], 1: [1.0], 2: [1.0]})
    assert sorted(polaris.choose(3).indices) == [0, 1, 2]


def test_greso_skips_by_the_streak_and_moves_its_exploration_to_the_target() -> None:
    greso = Greso(8, 0)
    assert greso.skip_probability(0) == 0.0
    # 1 easy, 1 hopeless of 10: 0.1 is above the easy target 1/12 and below the hard one 1/6
    groups = [group(0, 8), group(1, 0), *(group(2, 4) for _ in range(8))]
    metrics = greso.observe(groups)
    assert metrics == pytest.approx({"explore_easy": 0.49, "explore_hopeless": 0.51})
    greso.observe(groups)
    assert greso.skip_probability(0) == pytest.approx(1 - 0.48**2)
    assert greso.skip_probability(1) == pytest.approx(1 - 0.52**2)
    greso.observe([group(0, 3)])  # informative: its streak is over
    assert greso.skip_probability(0) == 0.0


def test_greso_refills_by_what_is_missing() -> None:
    greso = Greso(8, 0)
    assert greso.refill(16, 4, 0.5) == 10  # ceil(1.25 * 4 / 0.5)
    assert greso.refill(16, 14, 0.5) == 16


def test_greso_never_stalls() -> None:
    greso = Greso(4, 0)
    greso.explore = [0.0, 0.0]
    greso.observe([group(index, 0) for index in range(4)])
    greso.explore = [0.0, 0.0]
    assert sorted(greso.choose(4).indices) == [0, 1, 2, 3]


def test_mopps_updates_its_posterior_and_takes_the_draws_nearest_to_a_half() -> None:
    mopps = Mopps(4, 0, decay=0.5, candidates=2.0)
    mopps.observe([group(0, 6)])
    assert (mopps.passed[0], mopps.failed[0]) == (7.0, 3.0)  # 0.5 * 1 + 0.5 * 1 + 6; the same + 2
    mopps.observe([group(0, 8)])
    assert (mopps.passed[0], mopps.failed[0]) == (12.0, 2.0)  # 3.5 + 0.5 + 8; 1.5 + 0.5 + 0
    mopps.passed, mopps.failed = np.array([1e6, 1.0, 1e6, 1.0]), np.array([1e6, 1e6, 1e6, 1e6])
    choice = mopps.choose(2)
    assert sorted(choice.indices) == [0, 2]
    assert choice.predicted == pytest.approx((0.5, 0.5))


def test_the_oracle_keeps_what_is_likelier_than_not_to_be_informative() -> None:
    oracle = Oracle(4, 0, group_size=8, refresh=1)
    rates = {0: 8, 1: 0, 2: 1, 3: 7}  # 1 - (7/8)^8 - (1/8)^8 = 0.66

    def free(indices: Sequence[int]) -> list[Group]:
        return [group(index, rates[index]) for index in indices]

    oracle.prepare(free, free)
    assert sorted(oracle.choose(2).indices) == [2, 3]
    rates[2], rates[0] = 8, 4
    oracle.observe([])
    assert sorted(oracle.choose(2).indices) == [0, 3]


@pytest.mark.parametrize("name", TITLES)
def test_every_method_chooses_and_observes(name: str) -> None:
    prompts = [f"{index}+1=" for index in range(10)] * 4
    method, grpo = method_of(name, prompts, 0, steps=20, group_size=4)

    def rolled(indices: Sequence[int]) -> list[Group]:
        return [Group(index, (0.0, 1.0, 1.0, float(index % 2)), (-0.1,) * 4) for index in indices]

    method.prepare(rolled, rolled)
    for _ in range(4):  # past the warm-up of two steps
        choice = method.choose(4)
        assert len(set(choice.indices)) == 4
        method.observe(rolled(choice.indices))
    assert grpo.clip_high == (0.28 if name in ("dapo", "dapo-parts", "greso", "depo-dapo") else 0.2)


def test_settings_in_a_name_reach_the_method() -> None:
    method, grpo = method_of("depo-plus@candidates=3,explore=0,lr=2e-4,estimator_lr=0.002", ["1+1="] * 8, 0, 40, 8)
    assert isinstance(method, Depo)
    assert method.selector.config.candidates == 3
    assert method.selector.config.explore == 0
    assert method.learner.config.trunk_learning_rate == method.learner.config.encoder_learning_rate == 0.002
    assert grpo.learning_rate == 2e-4
    with pytest.raises(ValueError, match="the method 'gpro' is unknown"):
        parse("gpro")
    with pytest.raises(ValueError, match="no value"):
        parse("depo@explore")
    with pytest.raises(ValueError, match="'exlpore' is unknown"):
        method_of("depo@exlpore=1", ["1+1="] * 8, 0, 40, 8)
