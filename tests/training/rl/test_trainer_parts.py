"""DepoTrainer's pure parts: missing rewards, the size of a round, how prompts are read."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.training.rl import estimator_replica
from depo_gateway.training.rl.config import DepoConfig
from depo_gateway.training.rl.dynamic_sampling import next_size
from depo_gateway.training.rl.missing_rewards import SKIPS_UNREWARDED, GuardedReward, filled, for_trl, guarded_rewards
from depo_gateway.training.rl.prompt_text import text_config
from tests.training.rl import policy


def test_filled_rewards() -> None:
    nan = torch.nan
    found = filled(torch.tensor([[1.0, nan], [nan, nan], [0.0, 0.5], [nan, nan], [nan, nan], [nan, nan]]), 3)
    assert found[1].tolist() == [0.5, 0.25]  # so that its sum is the mean of the others' sums
    assert torch.isnan(found[0, 1])
    assert (found[3:] == 0).all()


def test_rewards_are_filled_only_for_a_trl_that_needs_it() -> None:
    skips = "unscorable_mask" in inspect.getsource(GRPOTrainer)
    assert skips == SKIPS_UNREWARDED
    assert for_trl(torch.tensor([[1.0], [torch.nan]]), 2).isnan().any() == skips


def test_a_failing_reward_function_is_kept_as_a_sentence_until_the_next_call() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [1 / len(text) for text in completions]

    (function,) = guarded_rewards(reward)
    assert function(prompts=["a", "b"], completions=["a", ""]) == [None, None]
    assert function.error == "the reward function reward raised ZeroDivisionError: division by zero"
    assert function(prompts=["a", "b"], completions=["a", "bb"]) == [1.0, 0.5]
    assert function.error == ""


def test_coroutines_are_left_to_trl() -> None:
    class Later:
        async def __call__(self, **_: Any) -> list[float]:
            return []

    async def later(**_: Any) -> list[float]:
        return []

    assert not any(isinstance(function, GuardedReward) for function in guarded_rewards([Later(), later, "a/model"]))


def test_rounds_divide_over_ranks() -> None:
    assert next_size(3, 100, 8, 4) == 3
    assert next_size(3, 100, 4, 8) == 4  # 3 groups of 4 rows can't be shared by 8
    assert next_size(3, 3, 4, 8) == 2
    assert next_size(3, 1, 4, 8) == 0


def test_chat_options_are_part_of_the_template() -> None:
    made = policy.tokenizer(chat=True)
    made.chat_template = "{% if thinking %}think {% endif %}{{ messages[0].content }}{{ eos_token }}"
    config = text_config(made, {"thinking": True, "tools": []}, 32)
    assert extract_text(config, [{"role": "user", "content": "hello"}])[0] == "think hello<eos>"
    assert text_config(policy.tokenizer(), None, 32).chat == ""


@pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecations between TRL and transformers
def test_an_estimator_with_a_wide_part_knows_its_words_before_the_first_step(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    args = DepoConfig(
        output_dir=str(tmp_path), depo="plus", depo_encoder=str(tiny_encoder), depo_wide=True, depo_trunk=False,
        use_cpu=True, bf16=False,
    )  # fmt: skip
    prompts = ["easy sum", "easy number", "hard sum", "easy please"]
    learner = estimator_replica.new_replica(
        args, TextConfig(pooling="cls", max_tokens=32), prompts, Accelerator(cpu=True)
    )
    sum_id, please_id = (learner.tokenizer.token_to_id(word) for word in ("sum", "please"))
    assert learner.model.idf[please_id] > learner.model.idf[sum_id]
    assert (learner.model.surface_scale > 0).any()
    assert learner.score(prompts)[:, :, 0] == pytest.approx(0)
