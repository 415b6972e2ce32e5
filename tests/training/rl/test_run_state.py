"""DepoTrainer's checkpoints: what a run resumes from, and that it goes on as it would have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from depo_gateway.training.rewards.worker_pool import RewardError
from depo_gateway.training.rl.run_state import resumable
from tests.training.rl import policy
from tests.training.rl.test_trainer import rows, trainer, watched

# deprecations between TRL and transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def resumed(place: Path, encoder: Path, **settings: Any) -> tuple[list[tuple[int, ...]], list[dict[str, Any]]]:
    made = trainer(
        place, encoder, depo="plus", depo_warmup=1, max_steps=6, save_strategy="steps", save_steps=3, **settings
    )  # fmt: skip
    chosen, _ = watched(made)
    made.train(resume_from_checkpoint=True if (place / "checkpoint-3").exists() else None)
    return chosen, rows(made)


def test_a_resumed_run_chooses_what_it_would_have_chosen(tmp_path: Path, tiny_encoder: Path) -> None:
    whole, log = resumed(tmp_path, tiny_encoder)
    assert len(whole) == 6
    for name in ("trainer_state.json", "depo/selector.json"):
        (tmp_path / "checkpoint-6" / name).unlink()  # as if the disk had been full
    again, later = resumed(tmp_path, tiny_encoder)
    assert again == whole[3:]
    state = json.loads((tmp_path / "checkpoint-3" / "depo/selector.json").read_text())
    assert "whole" not in state  # version 0.1 looks for it, and refuses a checkpoint without it
    assert [row["reward"] for row in later] == [row["reward"] for row in log]  # Trainer keeps the log
    assert [row["depo/completions"] for row in later] == [row["depo/completions"] for row in log]
    for name in ("depo/auroc", "depo/calibration_error", "loss", "depo/loss_advantage"):
        assert [row.get(name) for row in later] == [row.get(name) for row in log]
    # the negative control: without the selector's place in the stream it chooses others
    (tmp_path / "checkpoint-6" / "depo/selector.json").unlink()
    state["selector"]["stream"][1] += 5
    (tmp_path / "checkpoint-3" / "depo/selector.json").write_text(json.dumps(state))
    other, _ = resumed(tmp_path, tiny_encoder)
    assert other != whole[3:]


def test_a_finished_run_is_loaded_and_takes_no_step(tmp_path: Path, tiny_encoder: Path) -> None:
    settings: dict[str, Any] = {"depo": "faithful", "save_strategy": "steps", "save_steps": 3}
    first = trainer(tmp_path, tiny_encoder, **settings)
    first.train()
    again = trainer(tmp_path, tiny_encoder, **settings)
    chosen, _ = watched(again)
    again.train(resume_from_checkpoint=True)
    assert chosen == []
    assert (again.state.global_step, again.completions) == (3, 48)
    weights = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)


def test_a_reward_that_fails_between_two_steps_saves_and_within_one_does_not(tmp_path: Path) -> None:
    calls = 0

    def reward(prompts: list[str], completions: list[str], **_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RewardError("the reward function broke")
        return policy.reward(prompts, completions)

    settings: dict[str, Any] = {"steps_per_generation": 1, "gradient_accumulation_steps": 2}
    failing = 4  # generations: 1 and 2 are the first step's, 3 and 4 the second's
    with pytest.raises(RewardError):
        trainer(tmp_path, reward=reward, **settings).train()
    assert not resumable(tmp_path)
    calls, failing = 0, 3
    with pytest.raises(RewardError):
        trainer(tmp_path, reward=reward, **settings).train()
    assert [place.name for place in resumable(tmp_path)] == ["checkpoint-1"]
    written = (tmp_path / "checkpoint-1/trainer_state.json").stat().st_mtime_ns
    calls, failing = 0, 1
    with pytest.raises(RewardError):  # at once: the checkpoint stays as it is
        trainer(tmp_path, reward=reward, **settings).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-1/trainer_state.json").stat().st_mtime_ns == written


def test_a_run_that_ends_in_the_middle_of_a_generation_resumes_from_before(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=3, **settings).train()  # Trainer saves the third step too
    assert [place.name for place in resumable(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="in the middle of a generation"):
        trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
