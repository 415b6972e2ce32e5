"""Selection, on a real learner over a tiny BERT; where only the choice matters, scores are given by the test."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator.learner import FAITHFUL, Learner
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.rl.pass_rate_belief import PassRateBeliefs
from depo_gateway.training.rl.prompt_estimates import HEAVIEST
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import SCHEMA, Selector
from depo_gateway.training.rl.selectors.names import rule_of
from depo_gateway.training.rl.tickets import Ticket

Score = Callable[[Sequence[str]], np.ndarray]
NAN = float("nan")


@pytest.fixture
def learner(tiny_encoder: Path) -> Callable[[SelectionConfig], Learner]:
    def make(config: SelectionConfig) -> Learner:
        text = TextConfig(pooling="cls", max_tokens=32)
        model, tokenizer = create_model(
            ModelConfig(rule_of(config).heads, text, str(tiny_encoder), 0, wide=False, trunk=True)
        )
        faster = replace(FAITHFUL, trunk_learning_rate=1e-3, encoder_learning_rate=1e-3)  # runs here are short
        return Learner(model, tokenizer, faster)

    return make


def prompts_of(rates: Sequence[float]) -> list[str]:
    return [f"{rate} of prompt {row}" for row, rate in enumerate(rates)]


def knowing(heads: int = 1) -> Score:
    """Scores that read the pass rate off the prompt's first word."""

    def score(prompts: Sequence[str]) -> np.ndarray:
        rates = np.array([float(prompt.split()[0]) for prompt in prompts])
        logits = np.log(rates.clip(1e-9, 1 - 1e-9) / (1 - rates).clip(1e-9, 1))
        return np.repeat(np.repeat(logits[:, None, None], heads, 1), 2, 2)

    return score


def rows_of(tickets: Sequence[Ticket]) -> list[int]:
    return [ticket.row for ticket in tickets]


def learn(selector: Selector, tickets: Sequence[Ticket], rates: Sequence[float], size: int = 8) -> dict[str, float]:
    """Report groups of exactly these pass rates, and step."""
    for ticket in tickets:
        passed = round(rates[ticket.row] * size)
        selector.report(ticket, (1.0,) * passed + (0.0,) * (size - passed), (-0.5,) * size)
    return selector.step()


def test_step_100_keeps_every_prompt_and_101_filters(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = SelectionConfig.faithful()
    rates = [0.0, 0.5] * 8
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    for step in range(1, 101):
        chosen = selector.take(4)
        assert not selector.active, step
        learn(selector, chosen, rates)
    selector_at_100 = [rates[row] for row in rows_of(chosen)]
    assert 0.0 in selector_at_100
    chosen = selector.take(4)
    assert [rates[row] for row in rows_of(chosen)] == [0.5] * 4
    assert selector.take_metrics()["depo/kept"] < 1


def test_both_ends_of_the_band_are_kept(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0, low=0.25, high=0.75)
    rates = [0.25, 0.75, 0.2499, 0.7501, 0.5]

    low, high = PassRateBeliefs(False, 0).predicted(knowing()(prompts_of(rates[:2]))[:, 0, 0]).tolist()
    config = replace(config, low=low, high=high)  # the ends as they are in floating point, whatever the libm
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    assert {rates[row] for row in rows_of(selector.take(3))} == {0.25, 0.5, 0.75}


def test_surplus_carries_over_and_dropped_prompts_return_next_epoch(
    learner: Callable[[SelectionConfig], Learner],
) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0)
    rates = [0.5] * 9 + [0.0] * 7
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    seen: list[int] = []
    for _ in range(3):
        chosen = selector.take(3)
        seen += rows_of(chosen)
        learn(selector, chosen, rates)
    assert sorted(seen) == list(range(9))  # each good prompt once before any of them returns
    easier = prompts_of([0.5] * 16)
    selector.estimates.prompts = easier  # the policy has learned: the hopeless prompts are hopeless no more
    later: set[int] = set()
    for _ in range(8):
        chosen = selector.take(3)
        later.update(rows_of(chosen))
        learn(selector, chosen, [0.5] * 16)
    assert later >= set(range(9, 16))


@pytest.mark.parametrize("mode", [SelectionConfig.faithful, SelectionConfig.plus])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_hard_data_never_stalls(
    mode: Callable[[], SelectionConfig], rate: float, learner: Callable[[SelectionConfig], Learner]
) -> None:
    config = replace(mode(), warmup_steps=1)
    rates = [rate] * 40
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing(len(rule_of(config).heads)))
    for _ in range(6):
        chosen = selector.take(8)
        assert len(set(rows_of(chosen))) == 8
        metrics = learn(selector, chosen, rates)
        assert metrics["depo/zero_advantage_share"] == 1.0


def test_short_of_good_prompts_the_nearest_to_the_band_fill_up(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0)
    rates = [0.0, 0.01, 0.1, 0.5, 0.95, 1.0]
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    assert set(rows_of(selector.take(3))) == {3, 2, 4}


def test_ranking_takes_the_likeliest_to_have_an_advantage(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = replace(SelectionConfig.plus(), warmup_steps=0, explore=0.0, candidates=4.0, history_half_life=0.0)
    rates = [0.01, 0.2, 0.4, 0.5, 0.6, 0.8, 0.99, 1.0]
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing(2))
    assert {rates[row] for row in rows_of(selector.take(2))} <= {0.4, 0.5, 0.6}
    assert selector.take_metrics()["depo/scored"] > 0


def test_graded_rewards_are_chosen_by_their_spread_not_their_mean(
    learner: Callable[[SelectionConfig], Learner],
) -> None:
    config = replace(SelectionConfig.plus(), warmup_steps=1, explore=0.0, history_half_life=0.0, calibrate=False)
    spreads = [0.0, 0.4] * 8

    def score(prompts: Sequence[str]) -> np.ndarray:  # every mean is .5: only the second head tells them apart
        spread = np.array([float(prompt.split()[0]) for prompt in prompts])
        logits = np.zeros((len(prompts), 2, 2))
        logits[:, 1, 0] = np.log(spread.clip(1e-6) / (1 - spread))
        return logits

    selector = Selector(prompts_of(spreads), config, learner(config), score=score)
    chosen = selector.take(8)
    for ticket in chosen:
        selector.report(ticket, (0.5 - spreads[ticket.row] / 2, 0.5 + spreads[ticket.row] / 2) * 4)
    selector.step()
    assert not selector.estimates.binary
    assert {spreads[row] for row in rows_of(selector.take(4))} == {0.4}


def test_exploration_keeps_rejects_at_its_rate_and_weighs_them_by_its_inverse(
    learner: Callable[[SelectionConfig], Learner],
) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0, explore=0.25)
    rates = [0.5, 0.0] * 400
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    explored = rejected = 0
    for _ in range(20):
        chosen = selector.take(16)
        kept = [ticket.propensity for ticket in chosen if rates[ticket.row] == 0.0]
        assert set(kept) <= {0.25}
        assert all(ticket.propensity == 1 for ticket in chosen if rates[ticket.row] == 0.5)
        explored += len(kept)
        rejected += round((16 - len(kept)) / selector.take_metrics()["depo/kept"]) - (16 - len(kept)) - len(kept)
        metrics = learn(selector, chosen, rates)
        if kept:
            assert {label.weight for label in selector.estimates.replay} <= {1.0, min(4.0, HEAVIEST)}
            assert metrics["depo/false_reject_rate"] == 0.0
    assert 0.15 < explored / (explored + rejected) < 0.36


def test_a_wrongly_rejected_prompt_shows_in_the_false_reject_rate(
    learner: Callable[[SelectionConfig], Learner],
) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0, explore=1.0)
    rates = [0.5] * 4 + [0.0] * 12
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    chosen = selector.take(4)
    explored = [ticket.propensity for ticket in chosen if rates[ticket.row] == 0.0]
    assert len(explored) == 2  # half of the batch at most, so each reject's chance is lower than was asked for
    rejects = round(2 / selector.take_metrics()["depo/kept"]) - 2
    assert explored == pytest.approx([2 / rejects] * 2)
    metrics = learn(selector, chosen, [0.5] * 16)  # the rejects had something to teach
    assert metrics["depo/false_reject_rate"] == 1.0


def test_explored_prompts_are_rejects_of_any_rank(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = replace(SelectionConfig.faithful(), warmup_steps=0, explore=0.5)  # more than half a batch of them
    rates = [0.5] * 50 + np.linspace(0, 0.14, 750).round(4).tolist()
    selector = Selector(prompts_of(rates), config, learner(config), score=knowing())
    explored = []
    for _ in range(25):
        chosen = selector.take(8)
        explored += [rates[ticket.row] for ticket in chosen if ticket.propensity < 1]
        selector.step()
    assert len(explored) == 100
    assert np.mean(explored) == pytest.approx(0.07, abs=0.015)  # of rejects best first it would be near 0.14


def test_rewards_that_are_missing_are_no_labels(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = SelectionConfig.plus()
    selector = Selector(prompts_of([0.5] * 8), config, learner(config), score=knowing(2))
    chosen = selector.take(3)
    a, b, c = chosen
    selector.report(a, (NAN,) * 8)
    selector.report(b, (1.0, NAN, 0.0, *(None,) * 5))
    selector.report(c, (*(NAN,) * 7, 1.0))
    metrics = selector.step()
    assert metrics["depo/pass_rate"] == 0.75
    assert metrics["depo/zero_advantage_share"] == 0.5
    assert [label.row for label in selector.estimates.replay] == [b.row, c.row]
    selector.report(selector.take(3)[0], (NAN,) * 8)
    assert "depo/pass_rate" not in selector.step()


def test_rewards_of_another_number_and_a_negative_count_are_refused() -> None:
    selector = Selector(prompts_of([0.5] * 8), SelectionConfig.off(4))
    (ticket,) = selector.take(1)
    for rewards in ((), (1.0,) * 3, (1.0,) * 5):
        with pytest.raises(ValueError, match=f"got {len(rewards)} rewards, but a group has 4 rollouts"):
            selector.report(ticket, rewards)
    assert selector.report(ticket, (1.0, None, 0.0, None))
    assert selector.take(0) == []
    with pytest.raises(ValueError, match=r"take\(-1\)"):
        selector.take(-1)


def test_more_prompts_in_the_same_step_are_other_prompts() -> None:
    selector = Selector(prompts_of([0.5] * 10), SelectionConfig.off())
    chosen = [*selector.take(4), *selector.take(4), *selector.take(2)]
    assert sorted(rows_of(chosen)) == list(range(10))
    learn(selector, chosen, [0.5] * 10)
    assert len(set(rows_of(selector.take(10)))) == 10


@pytest.mark.parametrize("mode", [SelectionConfig.faithful, SelectionConfig.plus])
def test_a_resumed_selector_goes_on_with_the_very_same_prompts(
    mode: Callable[[], SelectionConfig], learner: Callable[[SelectionConfig], Learner]
) -> None:
    config = replace(mode(), warmup_steps=2)
    rng = np.random.default_rng(0)
    rates = rng.integers(0, 9, 60) / 8
    selector = Selector(prompts_of(rates.tolist()), config, learner(config), seed=5)

    def run(selector: Selector, steps: int) -> list[list[int]]:
        rows = []
        for _ in range(steps):
            chosen = selector.take(6)
            rows.append(rows_of(chosen))
            learn(selector, chosen, rates.tolist())
        return rows

    run(selector, 5)
    assert selector.learner is not None
    state = json.loads(json.dumps(selector.state_dict(), allow_nan=False))
    weights = copy.deepcopy(selector.learner.state_dict())
    expected = run(selector, 5)

    again = Selector(prompts_of(rates.tolist()), config, learner(config), seed=5)
    again.load_state_dict(state)
    assert again.learner is not None
    again.learner.load_state_dict(weights)
    assert run(again, 5) == expected

    forgetful = Selector(prompts_of(rates.tolist()), config, learner(config), seed=5)
    forgetful.learner.load_state_dict(weights)  # type: ignore[union-attr]
    assert run(forgetful, 5) != expected  # the weights alone do not do it


def test_a_run_can_only_be_resumed_with_the_same_settings() -> None:
    state = Selector(prompts_of([0.5] * 10), SelectionConfig.off()).state_dict()
    with pytest.raises(ValueError, match="prompts 10, not 9"):
        Selector(prompts_of([0.5] * 9), SelectionConfig.off()).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        Selector(prompts_of([0.5] * 10), SelectionConfig.off(), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"prompts with group_size 8, not 4$"):
        Selector(prompts_of([0.5] * 10), SelectionConfig.off(4)).load_state_dict(state)


def test_a_state_of_a_newer_format_is_refused_in_one_sentence() -> None:
    selector = Selector(prompts_of([0.5] * 10), SelectionConfig.off())
    state = {**selector.state_dict(), "schema": SCHEMA + 1}
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}, but this version of depo-gateway reads schemas up to"):
        selector.load_state_dict(state)


def test_an_estimator_learns_which_prompts_teach(learner: Callable[[SelectionConfig], Learner]) -> None:
    config = replace(SelectionConfig.plus(), warmup_steps=10, explore=0.0)
    rng = np.random.default_rng(0)
    words = {"easy": 1.0, "hard": 0.0, "sum": 0.5}
    names = [list(words)[i] for i in rng.integers(0, 3, 300)]
    prompts = [f"{name} number {row}" for row, name in enumerate(names)]
    selector = Selector(prompts, config, learner(config))
    shares = []
    for _ in range(40):
        chosen = selector.take(8)
        metrics = learn(selector, chosen, [words[name] for name in names])
        shares.append(metrics["depo/zero_advantage_share"])
    assert np.mean(shares[:10]) > 0.5
    assert np.mean(shares[-10:]) < 0.2
    assert 0.5 < metrics["depo/auroc"] <= 1
