"""The tickets of a Selector: overlapping generations, single draws, late, repeated and aborted reports, resuming."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depo_gateway.estimator.records.types import Example
from depo_gateway.training.rl.prompt_estimates import HEAVIEST
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.tickets import InFlight, PromptSelector, Ticket, tickets_digest

ROOT = Path(__file__).parents[3]
MIXED, FLAT = (1.0,) * 4 + (0.0,) * 4, (1.0,) * 8
NAN = float("nan")


class Estimator:
    """Stands in for a Learner, whose weights would not matter here: odd rows are hopeless. Records label weights."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []

    def score(self, prompts: Sequence[str]) -> np.ndarray:
        logits = np.zeros((len(prompts), 2, 2))
        logits[:, 0, 0] = [-6.0 if int(prompt) % 2 else 0.0 for prompt in prompts]
        return logits

    def step(self, batch: Sequence[Example]) -> dict[str, float]:
        self.weights.append(sorted({round(example.weight, 2) for example in batch}))
        return {}


def selector(rows: int = 400, block: int = 16, **settings: Any) -> tuple[Selector, Estimator]:
    given = {"warmup_steps": 0, "explore": 0.2, "replay": 0, "updates": 1, **settings}
    config, estimator = replace(SelectionConfig.plus(8), **given), Estimator()
    return Selector([str(row) for row in range(rows)], config, estimator, block=block), estimator  # type: ignore[arg-type]


def rows_of(tickets: Sequence[Ticket]) -> set[int]:
    return {ticket.row for ticket in tickets}


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    return loaded


def test_a_selector_is_a_prompt_selector() -> None:
    made, _ = selector()
    assert isinstance(made, PromptSelector)


def test_the_interface_needs_no_torch() -> None:
    script = "from depo_gateway import PromptSelector, Ticket; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_two_generations_in_flight_lose_nothing() -> None:
    made, estimator = selector()
    first, second = made.take(16), made.take(16)
    assert not rows_of(first) & rows_of(second)
    assert all(made.report(ticket, MIXED) for ticket in first)
    made.step()
    assert len(made.beliefs.recent) == 16
    assert not rows_of(made.take(16)) & rows_of(second)  # what is in flight is not chosen again
    assert all(made.report(ticket, MIXED) for ticket in reversed(second))
    metrics = made.step()
    assert len(made.beliefs.recent) == 32  # the second generation's scores are calibrated on, too
    assert metrics["depo/pass_rate"] == 0.5
    for tickets, weights in zip((first, second), estimator.weights, strict=True):  # explored rejects keep their weight
        (rate,) = {ticket.propensity for ticket in tickets if ticket.propensity < 1}
        assert weights == [1.0, round(min(1 / rate, HEAVIEST), 2)]


def test_a_row_in_flight_is_not_chosen_again() -> None:
    made, _ = selector(rows=24, block=8)
    first, second, third = made.take(8), made.take(8), made.take(8)
    assert rows_of([*first, *second, *third]) == set(range(24))
    for ticket in first:
        made.report(ticket, MIXED)
    made.step()
    assert rows_of(made.take(8)) == rows_of(first)  # the only ones that are free
    made.release(second[0])
    assert rows_of(made.take(1)) == {second[0].row}


def test_a_ticket_keeps_the_scores_of_its_own_choice() -> None:
    made, estimator = selector(rows=32, explore=0.0)
    (ticket,) = made.take(1)
    estimator.score = lambda prompts: np.ones((len(prompts), 2, 2))  # type: ignore[method-assign]
    for other in made.take(31):
        made.report(other, MIXED)
    made.step()
    made.report(ticket, MIXED)
    made.step()
    assert made.beliefs.recent[-1][0] == ticket.logits[0] == 0.0


def test_prompts_taken_one_by_one_are_explored_like_a_block() -> None:
    one, many, bare = selector()[0], selector()[0], selector(block=1)[0]
    singles = [one.take(1)[0] for _ in range(16)]
    assert singles == many.take(16)
    assert any(ticket.propensity < 1 for ticket in singles)
    assert all(bare.take(1)[0].propensity == 1 for _ in range(64))  # of one prompt nothing can be explored


def test_at_a_step_prompts_not_taken_yet_are_ranked_anew_and_explored_ones_stay() -> None:
    made, _ = selector()
    (taken,) = made.take(1)
    waiting = list(made.tickets.waiting)
    explored = [ticket for ticket in waiting if ticket.propensity < 1]
    assert len(waiting) == 15
    assert explored
    made.report(taken, MIXED)
    made.step()
    assert made.tickets.waiting == explored
    given = made.take(16)
    assert given[: len(explored)] == explored
    assert rows_of(given) >= rows_of(waiting)  # carried over, and chosen again as nothing better has come


def test_a_late_or_repeated_report_changes_nothing() -> None:
    made, _ = selector()
    first, second = made.take(2)
    assert made.report(first, MIXED)
    assert not made.report(first.id, FLAT)
    assert not made.report(999, MIXED)
    assert made.release(second.id)
    assert not made.release(second)
    assert not made.report(second, MIXED)
    assert not made.release(first)  # it was reported
    made.step()
    assert not made.report(first, MIXED)
    assert len(made.beliefs.recent) == 1


def test_more_in_flight_than_rows_repeats_and_never_stalls() -> None:
    made, _ = selector(rows=8, block=4)
    tickets = made.take(20)
    assert len({ticket.id for ticket in tickets}) == 20
    assert rows_of(tickets[:8]) == set(range(8))


def test_unreported_tickets_expire_and_their_rows_may_be_chosen_again() -> None:
    made, _ = selector(rows=32)
    lost = made.take(16)
    for _ in range(3):
        for ticket in made.take(16):
            made.report(ticket, MIXED)
        made.step()
    assert made.expire(3) == 0
    assert made.expire(2) == 16
    assert not made.report(lost[0], MIXED)
    assert rows_of(made.take(32)) == set(range(32))


@pytest.mark.parametrize("in_flight", ["again", "kept", "dropped"])
def test_resuming_with_tickets_in_flight(in_flight: InFlight) -> None:
    made, _ = selector()
    flying = made.take(16)
    made.report(flying[0], (NAN, *MIXED[1:]), (-0.5,) * 8)
    for ticket in flying[1:8]:
        made.report(ticket, MIXED)
    resumed, _ = selector()
    resumed.load_state_dict(reloaded(made.state_dict()), in_flight)
    fresh = resumed.take(8)
    if in_flight == "again":
        assert fresh == flying[8:]
    elif in_flight == "kept":
        assert not rows_of(fresh) & rows_of(flying)
        assert all(resumed.report(ticket, MIXED) for ticket in flying[8:])
    else:
        assert not resumed.report(flying[9], MIXED)
    resumed.step()
    assert len(resumed.beliefs.recent) == (16 if in_flight == "kept" else 8)
    assert not resumed.report(flying[1], MIXED)


def test_a_run_resumed_within_a_block_goes_on_with_the_very_same_tickets() -> None:
    def run(made: Selector, first: int, last: int) -> list[Ticket]:
        taken = []
        for count in range(first, last):
            (ticket,) = made.take(1)
            taken.append(ticket)
            made.report(ticket, MIXED if ticket.row % 4 == 0 else FLAT)
            if count % 20 == 19:
                made.step()
        return taken

    whole = run(selector()[0], 0, 160)
    before, after = selector()[0], selector()[0]
    taken = run(before, 0, 75)
    after.load_state_dict(reloaded(before.state_dict()))
    assert taken + run(after, 75, 160) == whole


def test_a_state_of_version_0_1_is_continued() -> None:
    """The file was written by version 0.1: after five steps, with the rows that it chose next."""
    saved = json.loads((Path(__file__).parent / "data/selector-0.1.json").read_text())
    rates = [(row * 7 % 9) / 8 for row in range(48)]

    def score(prompts: Sequence[str]) -> np.ndarray:
        clipped = np.array([float(prompt.split()[0]) for prompt in prompts]).clip(0.01, 0.99)
        return np.repeat(np.repeat(np.log(clipped / (1 - clipped))[:, None, None], 2, 1), 2, 2)

    config = replace(SelectionConfig.plus(), warmup_steps=2, explore=0.2, replay=8)
    prompts = [f"{rate} of prompt {row}" for row, rate in enumerate(rates)]
    made = Selector(prompts, config, Estimator(), 3, score=score)  # type: ignore[arg-type]
    made.load_state_dict(saved["state"])
    for rows in saved["next"]:
        tickets = made.take(6)
        assert [ticket.row for ticket in tickets] == rows
        for ticket in tickets:
            passed = round(rates[ticket.row] * 8)
            made.report(ticket, (1.0,) * passed + (0.0,) * (8 - passed), (-0.5,) * 8)
        made.step()


def test_threads_may_take_and_report_at_once() -> None:
    made, _ = selector(rows=2000)
    accepted: list[bool] = []

    def worker() -> None:
        for _ in range(50):
            (ticket,) = made.take(1)
            accepted.extend((made.report(ticket, MIXED), made.report(ticket, MIXED)))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        made.step()
    for thread in threads:
        thread.join()
    made.step()
    assert sum(accepted) == 200
    assert len(made.beliefs.recent) == 200


def test_a_digest_depends_on_rows_and_propensities_alone() -> None:
    ticket = Ticket(0, 5, 0, 0.5)
    assert tickets_digest([ticket]) == tickets_digest([Ticket(7, 5, 3, 0.5)])
    assert tickets_digest([ticket]) != tickets_digest([Ticket(0, 5, 0, 0.25)])
    assert tickets_digest([ticket]) != tickets_digest([Ticket(0, 6, 0, 0.5)])
