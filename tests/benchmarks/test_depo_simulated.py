"""The benchmark with a simulated policy, on questions and outcomes made here."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.depo.catalog import method_of
from benchmarks.depo.simulated import Run, RunConfig, grpo_steps, main
from benchmarks.depo.simulated_estimator import text_depo
from benchmarks.depo.simulated_policy import Domain, expected_auroc, read, text_limits
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.rl.group_labels import Group

CONFIG = RunConfig(target=40, need=4, rows=4)


def records(count: int, source: str = "gsm8k") -> list[dict[str, object]]:
    """Six models a to f, weak to strong; each question is too hard for the first (its number modulo 7) of them."""
    made = []
    for i in range(count):
        words = "How many apples are left?" if i % 7 < 4 else "Prove that the sum of all divisors is odd."
        correct = {model: int(rank >= i % 7) for rank, model in enumerate("abcdef")}
        made.append({"source": source, "question": f"{words} ({i})", "correct": correct})
    return made


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    return read([write(tmp_path / "outcomes.jsonl", records(70))])


def test_models_are_ranked_from_weak_to_strong_and_only_those_that_answered_all_count(tmp_path: Path) -> None:
    rows = records(14)
    rows[3]["correct"]["only here"] = 1  # type: ignore[index]
    shuffled = [{**row, "correct": dict(reversed(row["correct"].items()))} for row in rows]  # type: ignore[attr-defined]
    domain = read([write(tmp_path / "outcomes.jsonl", shuffled)])
    assert domain.models == ("a", "b", "c", "d", "e", "f")
    assert domain.outcomes_NM.shape == (14, 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read"), ("{not json}", "not JSON lines"), ("", "no two models")],
)
def test_files_of_no_use_are_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "outcomes.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        read([path])


def test_pass_rates_are_the_weighted_outcomes_of_models_near_a_rank(domain: Domain) -> None:
    weights = np.exp(-0.5 * ((np.arange(6) - 2.0) / 1.5) ** 2)  # strength 0.4 of ranks 0 to 5
    assert domain.rates(0.4, 1.5)[3] == pytest.approx(weights[3:].sum() / weights.sum())
    means = [domain.rates(strength, 1.5).mean() for strength in np.linspace(0, 1, 11)]
    assert all(np.diff(means) > 0)


def test_a_split_shares_no_question_and_depends_on_the_seed(domain: Domain) -> None:
    train, held_out = domain.split(0.2, seed=1)
    assert len(held_out.questions) == 14
    assert sorted(train.questions + held_out.questions) == sorted(domain.questions)
    where = domain.questions.index(train.questions[5])
    assert train.outcomes_NM[5].tolist() == domain.outcomes_NM[where].tolist()
    assert domain.split(0.2, seed=2)[1].questions != held_out.questions


def test_expected_auroc_is_the_mean_over_draws() -> None:
    score, probability = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.2, 0.7, 0.0, 0.5])
    favoured = total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                weight = probability[i] * (1 - probability[j])
                total += weight
                favoured += weight * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    assert expected_auroc(score, probability) == pytest.approx(favoured / total)
    assert expected_auroc(score, np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx(0.5)
    assert math.isnan(expected_auroc(score, np.ones(4)))


def test_only_informative_groups_make_the_policy_stronger_and_everything_is_charged(domain: Domain) -> None:
    train, held_out = domain.split(0.2, seed=1)
    method, _ = method_of("grpo", train.questions, 1, 20, 8)
    run = Run(train, held_out, CONFIG, method, seed=1)
    history = run.go()
    assert run.strength == 1.0
    assert history[-1]["strength"] == 1.0
    assert run.books.completions[-1] == 8 * run.generated == 8 * 4 * (len(run.books.completions) - 1)
    assert run.books.learned[-1] == run.informative < run.generated
    assert run.first_pass == 14  # 56 questions, 4 a step


def test_what_a_sampling_method_draws_beyond_its_need_teaches_nothing(domain: Domain) -> None:
    train, held_out = domain.split(0.2, seed=1)
    method, _ = method_of("dapo", train.questions, 1, 20, 8)
    run = Run(train, held_out, CONFIG, method, seed=1)
    run.go()
    assert max(np.diff(run.books.learned)) == CONFIG.need
    assert run.informative > run.books.learned[-1]


def test_the_first_look_of_polaris_is_charged_and_the_oracle_pays_nothing_to_know(domain: Domain) -> None:
    train, held_out = domain.split(0.2, seed=1)
    polaris = Run(train, held_out, CONFIG, method_of("polaris", train.questions, 1, 20, 8)[0], seed=1)
    polaris.go()
    assert polaris.drawn == 56 + polaris.generated
    oracle = Run(train, held_out, CONFIG, method_of("oracle@refresh=1", train.questions, 1, 20, 8)[0], seed=1)
    oracle.go()
    assert oracle.drawn == oracle.generated
    grpo = Run(train, held_out, CONFIG, method_of("grpo", train.questions, 1, 20, 8)[0], seed=1)
    grpo.go()
    assert oracle.books.completions[-1] < grpo.books.completions[-1]


def test_a_run_that_gets_nowhere_ends(domain: Domain) -> None:
    never = replace(domain, outcomes_NM=np.zeros_like(domain.outcomes_NM))
    train, held_out = never.split(0.2, seed=1)
    run = Run(train, held_out, CONFIG, method_of("grpo", train.questions, 1, 20, 8)[0], seed=1)
    assert run.go() == []
    assert run.strength == 0.0


def test_grpo_takes_as_many_steps_as_expected(domain: Domain) -> None:
    train, held_out = domain.split(0.2, seed=1)
    config = replace(CONFIG, target=400)
    run = Run(train, held_out, config, method_of("grpo", train.questions, 1, 20, 8)[0], seed=1)
    run.go()
    assert len(run.books.learned) - 1 == pytest.approx(grpo_steps(train, config), rel=0.1)


def test_a_prompt_remembered_is_scored_as_one_read_anew(domain: Domain) -> None:
    items: dict[str, object] = {}
    depo = text_depo("depo-plus", domain.questions, 1, 20, 8, items)  # type: ignore[arg-type]
    learner = depo.selector.learner
    assert learner is not None
    again = text_depo("depo-plus", domain.questions, 1, 20, 8, {}).selector.learner
    assert again is not None
    learner.score(domain.questions[:9])
    assert len(items) == 9
    assert learner.score(domain.questions[3:6]) == pytest.approx(again.score(domain.questions[3:6]), abs=1e-6)
    labelled = learner.items([Example(domain.questions[0], {"policy": 0.25}, {"policy": None}, 2.0)])[0]
    assert labelled.quality[0] == 0.25
    assert labelled.weight == 2.0
    assert math.isnan(labelled.quality[1])
    assert math.isnan(labelled.labels[1][0])
    assert len(items) == 9


def test_the_estimator_is_judged_by_text_alone(domain: Domain) -> None:
    depo = text_depo("depo-plus", domain.questions[:40], 1, 20, 8, {})
    depo.choose(4)
    before = depo.judge(domain.questions[40:50])[1]
    for row in range(10):  # memory of prompts 0 to 9 must not speak for the unseen
        depo.selector.beliefs.learn(row, float("nan"), 1.0, 8, 1.0, 0)
    assert depo.judge(domain.questions[40:50])[1] == pytest.approx(before)
    depo.observe([Group(0, (1.0,) * 8)] * 4)


def test_ridge_reads_what_can_be_read(domain: Domain) -> None:
    hard = np.array([["Prove" in question] for question in domain.questions], dtype=float)
    noise = np.random.default_rng(0).normal(size=(70, 1))
    told, not_told = (text_limits(domain, x, 0.5, 8)[3] for x in (hard, noise))
    assert told["ridge on embeddings"] > not_told["ridge on embeddings"] + 0.1
    assert told["truth"] >= told["ridge on embeddings"]


def test_the_command_writes_results_once_and_a_report_that_keeps_its_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "gsm8k_many_models.jsonl", records(70))
    write(tmp_path / "math_l5_many_models.jsonl", records(35, "math_l5"))
    page = tmp_path / "page.md"
    page.write_text("# old\n\n## Reading\n\nBy hand.\n", encoding="utf-8")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--report", str(page), "--target", "64"]
    flags += ["--methods", "grpo", "mopps", "depo-plus@warmup_steps=2", "--seeds", "1", "2"]
    assert main(flags) == 0
    results = sorted((tmp_path / "out").glob("*.json"))
    assert len(results) == 2 * 3 * 2
    written = page.read_text(encoding="utf-8")
    assert written.endswith("## Reading\n\nBy hand.\n")
    assert written.startswith("# Choosing prompts")
    assert "within math_l5" in written
    assert page.with_suffix(".png").stat().st_size > 10_000
    stamps = [path.stat().st_mtime_ns for path in results]
    assert main(flags) == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps
    assert page.read_text(encoding="utf-8") == written
    assert "completions an informative group" in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert "cannot be read" in capsys.readouterr().err.splitlines()[-1]
