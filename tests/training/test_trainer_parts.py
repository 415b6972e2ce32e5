"""DepoTrainer's pure parts: missing rewards, the size of a round, how prompts are read."""

import torch

from estimator.text import read
from tests.training import policy
from training.trainer_prompts import text_config
from training.trainer_rewards import filled
from training.trainer_rounds import next_size


def test_filled_rewards() -> None:
    nan = torch.nan
    found = filled(torch.tensor([[1.0, nan], [nan, nan], [0.0, 0.5], [nan, nan], [nan, nan], [nan, nan]]), 3)
    assert found[1].tolist() == [0.5, 0.25]  # so that its sum is the mean of the others' sums
    assert torch.isnan(found[0, 1])
    assert (found[3:] == 0).all()


def test_rounds_divide_over_ranks() -> None:
    assert next_size(3, 100, 8, 4) == 3
    assert next_size(3, 100, 4, 8) == 4  # 3 groups of 4 rows can't be shared by 8
    assert next_size(3, 3, 4, 8) == 2
    assert next_size(3, 1, 4, 8) == 0


def test_chat_options_are_part_of_the_template() -> None:
    made = policy.tokenizer(chat=True)
    made.chat_template = "{% if thinking %}think {% endif %}{{ messages[0].content }}{{ eos_token }}"
    config = text_config(made, {"thinking": True, "tools": []}, 32)
    assert read(config, [{"role": "user", "content": "hello"}])[0] == "think hello<eos>"
    assert text_config(policy.tokenizer(), None, 32).chat == ""
