from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.training.rewards.reward_functions import PairReward, reward_function, text_of
from depo_gateway.training.rewards.worker_pool import RewardError

OWN = """
import asyncio, math

def length(completion, reference, most=10):
    if completion == "raise":
        raise KeyError(reference)
    if completion == "text":
        return "1"
    return min(len(completion), most) / 10

def batch(prompts, completions, **columns):
    return [float(a == b) for a, b in zip(completions, columns["answer"])]

async def later(prompts, completions, **columns):
    loops.add(id(asyncio.get_running_loop()))
    await asyncio.sleep(0)
    return [None, math.nan, len(loops)]
loops = set()

def raises(prompts, completions, **columns): raise KeyError("solution")
def short(prompts, completions, **columns): return [1.0]
def nothing(prompts, completions, **columns): return None
def words(prompts, completions, **columns): return ["good"] * len(completions)
def mapping(prompts, completions, **columns): return {"a": 1.0, "b": 2.0, "c": 3.0}
def fixed(prompts, completions, answer): return [0.0]
def pair(prediction, gold): return 1.0
def three(completion, reference, more): return 1.0
"""
BATCH: dict[str, Any] = {
    "prompts": ["What is 1+1?"] * 2 + [[{"role": "user", "content": "Name\na colour"}]],
    "completions": ["12", "1234", [{"role": "assistant", "content": "123"}]],
    "completion_ids": [[1], [2], [3]],
    "answer": ["12", 3, "x"],
    "trainer_state": None,
}


def counted(**counts: int) -> dict[str, int]:
    return dict.fromkeys(("graded", "unreadable", "references", "timeouts", "failures"), 0) | counts


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    (tmp_path / "own.py").write_text(OWN)
    made: list[Any] = []

    def named(function: str) -> Any:
        made.append(reward_function(f"{tmp_path}/own.py:{function}"))
        return made[-1]

    yield named
    for reward in made:
        reward.close()


def test_a_verifier_as_a_reward_function() -> None:
    with closing(reward_function("number", answer_column="solution")) as reward:
        assert reward.__name__ == "number"
        columns = {**BATCH, "solution": [12, None, "123"]}
        assert reward(**columns) == [1, None, 1]
        assert reward.counts() == counted(graded=2, references=1)
        assert reward.counts() == counted()
        with pytest.raises(ValueError, match="no column 'solution' to grade against, only answer, completion_ids"):
            reward(**BATCH)
    with closing(reward_function("math")) as reward:
        assert reward.__name__ == "math"
        assert reward(**BATCH) == [1, 0, 0]


def test_answers_that_cannot_be_used_are_named_by_row() -> None:
    with closing(reward_function("number")) as reward:
        assert isinstance(reward, PairReward)
        reward.check_references(["1", None, "2 1/2"])
        words = (
            "^the answer of the data set's row 2, 'none at all', holds no number that the verifier number can read; "
        )
        with pytest.raises(ValueError, match=words + "correct or remove them, or set another reward$"):
            reward.check_references(["1", "none at all", None])
        with pytest.raises(ValueError, match=words + "2 more rows have such answers: 4, 5; correct"):
            reward.check_references(["1", "none at all", None, "x", "y"])


def test_the_users_function_is_recognised_by_its_parameters(own: Callable[[str], Any]) -> None:
    assert own("length")(**BATCH) == [0.2, 0.4, 0.3]
    assert own("length").__name__ == "length"
    assert own("batch").__name__ == "batch"
    assert own("batch")(**BATCH) == [1, 0, 0]
    for wrong in ("pair", "three", "fixed"):
        with pytest.raises(
            ValueError, match=r"a verifier takes \(completion, reference\), a reward function \(prompts"
        ):
            own(wrong)
    with pytest.raises(
        ValueError, match="unknown verifier 'maths': known are exact, number, choice, math, or your own func"
    ):
        reward_function("maths")


def test_none_and_nan_are_no_reward_and_coroutines_share_a_loop(own: Callable[[str], Any]) -> None:
    later = own("later")
    assert later(**BATCH) == [None, None, 1]
    assert later(**BATCH) == [None, None, 1]
    assert later.counts() == counted(graded=2, failures=4)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", r"raised KeyError: 'solution', in a batch of 3 whose first prompt is 'What is 1\+1\?'"),
        ("short", "returned 1 values for 3 completions in a batch of 3"),
        ("nothing", "returned None for 3 completions"),
        ("mapping", "returned {'a': 1.0, 'b': 2.0, 'c': 3.0} for 3 completions"),
        ("words", "returned 'good', not a finite number or None, in a batch of 3"),
    ],
)
def test_a_reward_function_that_fails_is_one_sentence(own: Callable[[str], Any], function: str, words: str) -> None:
    with pytest.raises(RewardError, match=rf"^the reward function .*own\.py:{function} {words}") as caught:
        own(function)(**BATCH)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError) == (function == "raises")


def test_a_verifier_that_fails_names_its_completion_and_prompt(own: Callable[[str], Any]) -> None:
    length = own("length")
    words = r"raised KeyError: 'x', at the completion 'raise' of the prompt 'Name a colour'$"
    with pytest.raises(RewardError, match=rf"^the verifier .*own\.py:length {words}") as caught:
        length(**{**BATCH, "answer": ["12", None, "x"], "completions": ["12", "raise", "raise"]})
    assert "line 6, in length" in str(caught.value.__cause__)
    with pytest.raises(RewardError, match=r"returned '1', not a finite number or None, at the completion 'text' of"):
        length(**{**BATCH, "completions": ["text"] * 3})
    assert length(**BATCH) == [0.2, 0.4, 0.3]


def test_the_text_of_a_completion() -> None:
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert text_of([{"role": "assistant", "content": None}]) == text_of([]) == ""
