"""The lean policy against transformers' own, and GRPO's update against values worked by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.demo_models.chains import RECIPES, answer_of, build_model, build_tokenizer, split_of
from benchmarks.depo import run
from benchmarks.depo.figures import interval, ratio, reached, smoothed
from benchmarks.depo.grpo import GrpoConfig, Rollout, Trainer, advantages, surrogate
from benchmarks.depo.policy import Completion, Policy
from benchmarks.depo.report import main as report
from benchmarks.depo.task import LIMIT, task_of


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(build_model(RECIPES[0], build_tokenizer()))


def test_sampling_and_the_loss_give_the_log_probabilities_of_transformers(policy: Policy) -> None:
    prompts = [tuple(build_tokenizer().encode(text)) for text in ("1+2=", "3*4-5+6=", "7-8+9*1-2*3=")]
    groups = policy.sample(prompts, 3, 12, torch.Generator().manual_seed(1))
    assert [len(group) for group in groups] == [3, 3, 3]
    rows = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    together = policy.log_probs([(prompt, completion.tokens) for prompt, completion in rows])
    start = 0
    for prompt, completion in rows:
        whole = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logits = policy.model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        mine = together[start : start + len(expected)]
        start += len(expected)
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(mine.detach(), expected, atol=1e-4, rtol=0)
    assert start == len(together)


def test_sampling_follows_the_distribution_and_stops_at_the_end_token(policy: Policy) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()  # uniform over all tokens, the end among them
    (group,) = policy.sample([(1, 5)], 4000, 3, torch.Generator().manual_seed(0))
    vocabulary = policy.model.config.vocab_size
    assert group[0].log_probs[0] == pytest.approx(-math.log(vocabulary), abs=1e-4)
    ended = [completion for completion in group if completion.tokens[-1] == policy.end]
    assert all(policy.end not in completion.tokens[:-1] for completion in group)
    assert len(ended) / 4000 == pytest.approx(1 - (1 - 1 / vocabulary) ** 3, abs=0.008)
    assert all(len(completion.tokens) == 3 for completion in group if completion not in ended)


def test_advantages_and_clipping() -> None:
    # mean 0.25, deviation with G - 1: sqrt((3 * 0.0625 + 0.5625) / 3) = 0.5
    assert advantages([1, 0, 0, 0]) == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], abs=1e-5)
    ratio_N, advantage_N = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert surrogate(ratio_N, advantage_N, GrpoConfig()).tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    higher = surrogate(ratio_N, advantage_N, GrpoConfig(clip_high=0.28)).tolist()
    assert higher == pytest.approx([-1.28, 1.5, -0.5, 0.8])


def test_an_update_makes_what_was_rewarded_likelier_and_counts_every_token(policy: Policy) -> None:
    good, bad = (5, 6, policy.end), (7, policy.end)
    values = [tuple(policy.log_probs([((1, 4), tokens)]).tolist()) for tokens in (good, bad)]
    completions = tuple(Completion(tokens, value) for tokens, value in zip((good, bad), values, strict=True))
    useful = Rollout(0, (1, 4), completions, (1.0, 0.0))
    useless = Rollout(1, (1, 4), completions, (1.0, 1.0))
    trainer = Trainer(policy, GrpoConfig(learning_rate=1e-3, warmup_steps=0, updates=1, max_norm=1e9))
    alone = trainer._update([useful])
    assert policy.log_probs([((1, 4), good)]).sum() > sum(values[0])
    assert policy.log_probs([((1, 4), bad)]).sum() < sum(values[1])
    torch.manual_seed(0)
    again = Trainer(Policy(build_model(RECIPES[0], build_tokenizer())), trainer.config)
    diluted = again._update([useful, useless])  # twice the tokens, no more gradient
    torch.testing.assert_close(diluted, alone / 2, atol=1e-6, rtol=1e-3)


def test_prompts_are_of_disjoint_splits_and_only_the_whole_answer_is_right() -> None:
    train, held_out = task_of("collect", 50), task_of("evaluate", 50)
    assert {split_of(prompt) for prompt in train.prompts} == {"collect"}
    assert {split_of(prompt) for prompt in held_out.prompts} == {"evaluate"}
    assert max(map(len, train.solutions)) <= LIMIT
    right = train.solutions[0]
    assert build_tokenizer().decode(right, skip_special_tokens=True) == answer_of(train.prompts[0])
    assert train.reward(0, Completion(right, ())) == 1.0
    assert train.reward(0, Completion(right[:-1], ())) == 0.0
    assert train.reward(0, Completion((right[0] + 1, *right[1:]), ())) == 0.0


def test_figures() -> None:
    assert smoothed([0.0, 3.0, 6.0, 0.0]) == [0.0, 3.0, 3.0, 3.0]
    assert reached([0, 10, 20], [0.1, 0.2, 0.4], 0.3) == pytest.approx(15)
    assert reached([0, 10], [0.1, 0.2], 0.3) is None
    assert reached([0, 10], [0.1, 0.2], 0.05) == 0
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert ratio([1.0, 4.0], [2.0, 8.0]) == pytest.approx((0.5, 0.5, 0.5))


def test_a_tiny_benchmark_runs_goes_on_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "2", "--budget", "512", "--rows", "2", "--jobs", "1", "--prompts", "48"]
    arguments += ["--held-out", "8", "--start-steps", "2", "--out", str(tmp_path)]
    assert run.main(["--methods", "grpo", "dapo", "depo-plus", *arguments]) == 0
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 6
    kept = {path: path.stat().st_mtime_ns for path in files}
    assert run.main(["--methods", "grpo", "dapo", "depo-plus", *arguments]) == 0
    assert "6 of 6 runs are there already" in capsys.readouterr().out
    assert kept == {path: path.stat().st_mtime_ns for path in files}
    history = json.loads((tmp_path / "grpo-seed1.json").read_text())["history"]
    assert [row["completions"] for row in history] == [0, 256, 512]
    out = tmp_path / "page"
    assert report(["--runs", str(tmp_path), "--seeds", "1", "2", "--out", str(out)]) == 0
    page = (out / "README.md").read_text()
    assert "| DEPO plus" in page
    for name in ("curves", "groups", "estimator", "phases"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert f"({name}.png)" in page


def test_an_unknown_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--methods", "gpro"])
    assert stopped.value.code == 2
    assert "the method 'gpro' is unknown; use one of grpo, dapo" in capsys.readouterr().err
