import pytest

from depo_gateway.training.rewards.reasoning import final_text


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7", "7"),
        ("<think>3</think>\n\n7\n", "7"),
        ("3</think>7", "7"),  # the chat template wrote the opening tag
        ("<think>a</think>5<think>b</think>7", "7"),
        ("<THINKING>3</THINKING>7", "7"),
        ("<thought>3</thought>7", "7"),
        ("<reasoning>3</reasoning>7", "7"),
        ("◁think▷3◁/think▷7", "7"),
        ("[THINK]3[/THINK]7", "7"),
        ("<|begin_of_thought|>3<|end_of_thought|>7", "7"),
        ("<think>3</think>7<|im_end|>\n</s>", "7"),
        ("<think>3", None),
        ("5 <think>3", None),
        ("<think>a</think>5<think>b", None),
        ("<think>3</think>", ""),
        ("<|channel|>analysis<|message|>3<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>", "7"),
        ("<|channel|>final <|constrain|>JSON<|message|>7", "7"),
        ("<|channel|>analysis<|message|>3", None),
        ("analysisWe add 1 and 2.assistantfinal7", "7"),
        ("analysisWe add 1 and 2.assistantfinalThe answer is 7.", "The answer is 7."),
        ("analysisWe add 1 and 2", None),
        ("analysis of 7", "analysis of 7"),
        ("x < 7 and [7]", "x < 7 and [7]"),
        ("", ""),
    ],
)
def test_what_follows_the_reasoning(completion: str, answer: str | None) -> None:
    assert final_text(completion) == answer
