"""The replay benchmark's pure parts: the order of questions, the backends' answers, and the measurements."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay.backends import WRONG, answer_of
from benchmarks.replay.figures import EVERY, advantage_curve, at_labels, moving, runs_from, share_curve
from benchmarks.replay.plans import AFTER, MMLU_LABELS, REQUESTS, plan_of, quick_plan
from benchmarks.replay.processes import Place
from benchmarks.replay.questions import Question, chain_questions, token_confidence
from benchmarks.replay.score import Served, advantage, chance_errors, measured, share_errors, windows

MMLU = [Question(f"m{i}", (i % 3 > 0, i % 7 > 0)) for i in range(MMLU_LABELS + REQUESTS + 500)]
GSM8K = [Question(f"g{i}", (i % 2 > 0, True)) for i in range(3 * AFTER + 20)]


def served(pool: str, right: tuple[bool, bool], phase: str = "before") -> Served:
    return Served(phase, True, Question("q", right), "id", pool, "confident", "v1")


def test_a_backend_answers_with_the_reference_or_not_and_its_token_confidence() -> None:
    question = Question("2+2=", (False, True))
    small, large = (answer_of(question, pool, logprobs=True)["choices"][0] for pool in (0, 1))
    assert small["message"]["content"] == WRONG
    assert large["message"]["content"] == question.reference
    assert np.exp(large["logprobs"]["content"][0]["logprob"]) == pytest.approx(token_confidence(question, 1))
    assert "logprobs" not in answer_of(question, 0, logprobs=False)["choices"][0]


def test_every_question_has_a_reference_of_its_own() -> None:
    assert len({question.reference for question in MMLU}) == len(MMLU)


def test_chains_are_the_same_each_time_and_worth_routing() -> None:
    questions = chain_questions(300, 1)
    assert questions == chain_questions(300, 1)
    small, large = np.mean([question.right for question in questions], 0)
    assert small + 0.05 < large


def test_no_question_is_labelled_that_a_version_is_measured_on(tmp_path: Path) -> None:
    bases = {"cold": tmp_path, "general": tmp_path}
    for scenario in ("cold", "general", "switch"):
        plan = plan_of(scenario, 1, bases, MMLU, GSM8K)
        labelled = [question for block in plan.blocks for question in block.questions]
        assert len(set(labelled)) == len(labelled)
        assert not set(labelled) & set(plan.later["mmlu"])
        assert not set(plan.fill["before"]) & (set(labelled) | set(plan.later["mmlu"]))
        assert plan.cold == (scenario != "general")


def test_after_the_switch_only_what_was_asked_first_is_asked_again(tmp_path: Path) -> None:
    plan = plan_of("switch", 1, {"cold": tmp_path}, MMLU, GSM8K)
    after = [block for block in plan.blocks if block.phase == "after"]
    assert [len(block.questions) for block in after] == [AFTER] * 3
    assert set(plan.fill["after"]) == set(after[0].questions)


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    first, again, other = (plan_of("cold", seed, {"cold": tmp_path}, MMLU, []) for seed in (1, 1, 2))
    assert first == again
    assert first.blocks != other.blocks


def test_a_quick_plan_holds_questions_out(tmp_path: Path) -> None:
    plan = quick_plan(tmp_path, MMLU[:100], 20, 3)
    assert [len(block.questions) for block in plan.blocks] == [20, 20, 20]
    assert list(plan.later["later"]) == MMLU[60:100]


def test_the_advantage_is_over_random_routing_at_the_same_share() -> None:
    best = [served("large", (False, True)), served("small", (True, True))]
    assert advantage(best) == pytest.approx(1.0 - 0.75)
    assert advantage([served("large", (False, True))] * 4) == 0.0
    worst = [served("small", (False, True)), served("large", (True, True))]
    assert advantage(worst) == pytest.approx(0.5 - 0.75)


def test_windows_slide_by_one() -> None:
    assert windows(np.array([True, False, False, True]), 2).tolist() == [0.5, 0.0, 0.5]
    assert windows(np.array([True]), 2).tolist() == []
    assert moving(np.array([1.0, 2.0, 6.0]), 2).tolist() == [1.5, 4.0]


def test_the_share_is_judged_before_across_and_after_the_switch() -> None:
    stream = [served("large", (True, True))] * 2 + [served("small", (True, True))] * 2
    stream += [served("large", (True, True), "after")] * 2
    assert share_errors(stream, 0.5, 2) == {"before": 0.5, "across": 0.0, "after": 0.5}
    assert share_errors(stream, 0.5, 9) == {"before": None, "across": None, "after": None}


def test_a_right_model_has_the_error_of_chance_alone() -> None:
    generator = np.random.default_rng(1)
    quality = generator.random((4000, 2))
    observed = (generator.random((4000, 2)) < quality).astype(float)
    chance = chance_errors(quality, observed, draws=20)
    found = measured(quality, observed, generator.random(4000))
    for name in ("small", "large", "gain"):
        assert found[f"ece_{name}"] == pytest.approx(chance[name], abs=0.012)
    wrong = measured(quality[:, ::-1], observed, generator.random(4000))
    assert wrong["ece_gain"] > 0.2
    assert found["apgr"] != found["length"]


def test_refusals_and_the_last_training_are_read_from_the_learners_files(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.trained_to == 0
    assert place.refusals() == []
    place.checkpoints.mkdir()
    (place.checkpoints / "learner.json").write_text(json.dumps({"seq": 12, "time": 1.0}))
    (place.checkpoints / "refusals.jsonl").write_text('{"labels": 3, "reasons": ["x"]}\n')
    assert place.trained_to == 12
    assert [one["labels"] for one in place.refusals()] == [3]


def test_a_switch_tells_of_the_cold_start_too() -> None:
    versions = [
        {"labels": 100, "phase": "before", "mmlu": {"apgr": 0.6}},
        {"labels": 350, "phase": "after", "mmlu": {"apgr": 0.4}},
    ]
    run = {"scenario": "switch", "start": {"mmlu": {"apgr": 0.5}}, "versions": versions}
    other = {**run, "scenario": "general"}
    assert runs_from([run, other], "cold") == [run]
    assert runs_from([run, other], "general") == [other]
    assert at_labels([run], 0, "apgr") == [0.5]
    assert at_labels([run], 100, "apgr") == [0.6]


def test_a_plotted_share_has_a_point_every_so_many_requests() -> None:
    ends, share = share_curve({"stream": {"large": [1, 0] * 50}}, 10)
    assert ends[:2].tolist() == [10, 30]
    assert set(share.tolist()) == {0.5}


def test_what_a_version_had_learned_does_not_count_after_the_switch() -> None:
    half = 2 * EVERY
    stream = {
        "phase": ["before"] * half + ["after"] * 2 * half,
        "first": [0] * half + [1] * half + [0] * half,
        "large": [0, 1] * half + [1] * half,
        "small_right": [1, 0] * half + [0] * half,
        "large_right": [1] * 3 * half,
    }
    since, over = advantage_curve({"stream": stream}, EVERY)
    assert since.tolist() == [-EVERY, 0, EVERY, half]
    assert over.tolist() == pytest.approx([0.25] * 4)  # the large pool served just where the small one fails
