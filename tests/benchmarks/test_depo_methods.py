"""The methods by name, and what they add to the trainer's rules."""

from collections.abc import Sequence

import pytest

from benchmarks.depo.catalog import TITLES, method_of, parse
from benchmarks.depo.estimated import Depo
from benchmarks.depo.methods import EASY, HOPELESS, kind_of
from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.selectors.polaris import Polaris
from depo_gateway.training.rl.tickets import Ticket


def group(index: int, passed: int, size: int = 8) -> Group:
    return Group(index, (1.0,) * passed + (0.0,) * (size - passed))


def test_a_group_is_easy_hopeless_or_informative() -> None:
    assert [kind_of(group(0, passed)) for passed in (0, 1, 7, 8)] == [HOPELESS, 2, 2, EASY]


def rows_of(tickets: Sequence[Ticket]) -> list[int]:
    return [ticket.row for ticket in tickets]


def test_grpo_and_dapo_take_the_same_prompts_and_none_twice_in_a_step() -> None:
    grpo, dapo = (method_of(name, [""] * 10, 3, 20, 8)[0] for name in ("grpo", "dapo"))
    first, more = rows_of(dapo.choose(4)), rows_of(dapo.choose(4))
    assert rows_of(grpo.choose(4)) == first
    assert not set(first) & set(more)
    assert dapo.dynamic
    assert dapo.refill(4, 1, 0.9) == 4


def test_polaris_drops_what_the_start_has_mastered() -> None:
    polaris, _ = method_of("polaris@stages=3", [""] * 6, 0, steps=6, group_size=8)

    def counted(indices: Sequence[int]) -> list[Group]:
        assert list(indices) == list(range(6))
        return [group(index, 8 if index < 2 else 0) for index in indices]

    polaris.prepare(counted, counted)
    assert set(rows_of(polaris.choose(4))) == {2, 3, 4, 5}
    assert isinstance(polaris.selector.rule, Polaris)
    assert polaris.selector.rule.stage_steps == 2


def test_greso_refills_by_what_is_missing() -> None:
    greso, _ = method_of("greso", [""] * 8, 0, 20, 8)
    assert greso.refill(16, 4, 0.5) == 10  # ceil(1.25 * 4 / 0.5)
    assert greso.refill(16, 14, 0.5) == 16


def test_the_oracle_reads_the_pass_rates_of_free_rollouts() -> None:
    rates = {0: 8, 1: 0, 2: 1, 3: 7}  # 1 - (7/8)^8 - (1/8)^8 = 0.66
    oracle, _ = method_of("oracle@refresh=1", [""] * 4, 0, 20, group_size=8)

    def free(indices: Sequence[int]) -> list[Group]:
        return [group(index, rates[index]) for index in indices]

    oracle.prepare(free, free)
    chosen = rows_of(oracle.choose(2))
    assert sorted(chosen) == [2, 3]
    rates[2], rates[0] = 8, 4
    oracle.observe([group(row, 4) for row in chosen])
    assert sorted(rows_of(oracle.choose(2))) == [0, 3]


@pytest.mark.parametrize("name", TITLES)
def test_every_method_chooses_and_observes(name: str) -> None:
    prompts = [f"{index}+1=" for index in range(10)] * 4
    method, grpo = method_of(name, prompts, 0, steps=20, group_size=4)

    def rolled(indices: Sequence[int]) -> list[Group]:
        return [Group(index, (0.0, 1.0, 1.0, float(index % 2)), (-0.1,) * 4) for index in indices]

    method.prepare(rolled, rolled)
    for _ in range(4):  # past the warm-up of two steps
        rows = rows_of(method.choose(4))
        assert len(set(rows)) == 4
        method.observe(rolled(rows))
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
