import importlib.util
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.training.rewards.verifiers import (
    VERIFIERS,
    Grader,
    choice,
    exact,
    last_number,
    number,
    reward_function,
    text_of,
)
from depo_gateway.training.rewards.worker_pool import RewardError


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("3+4=7;7*9=3;3-2=1", "1", 1),
        ("3+4=7;7*9=3;3-2=2", "1", 0),
        ("3+4=7;7-3", "3", 1),  # a minus between operands is no sign
        ("so x = -3", "-3", 1),
        ("so x=-3.", "-3", 1),
        ("The answer is **1,234.50**.", "1234.5", 1),
        ("$18.00", "18", 1),
        ("#### 42", "She has 6 * 7 = <<6*7=42>>42\n#### 42", 1),
        ("no digits", "1", 0),
        ("7", "no digits", 0),
        ("", "0", 0),
        ("v2 is version 3.", "3", 1),
        ("it is .5", "0.5", 1),
        ("x = -.5.", "-0.5", 1),
        ("3-.5", ".5", 1),
        ("3 and then...5", "3", 1),
    ],
)
def test_number_compares_the_last_numbers(completion: str, reference: str, reward: float) -> None:
    assert number(completion, reference) == reward


def test_last_number_of_a_long_digit_string_is_exact() -> None:
    assert str(last_number("9" * 40)) == "9" * 40


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("B", "B", 1),
        ("b", "B", 0),  # a lone small letter is a word in English
        ("The answer is (b).", "B", 1),
        ("A looks right at first, but the answer is C.", "C", 1),
        ("Answer: **D**", "d", 1),
        ("I'd say E", "A", 0),
        ("It is C)", "C", 1),
        ("", "A", 0),
        ("The answer is Berlin", "B", 0),
        ("The answer is a tricky one to see. Only B fits.", "A", 0),
        ("The answer is a tricky one to see. Only B fits.", "B", 1),
        ("ANSWER: b", "B", 1),
        ("The Answer is **c**.\nA closer look confirms it.", "C", 1),
        ("I choose option d) here", "D", 1),
        ("It starts at 9. The answer is a.m. then, so E", "E", 1),
    ],
)
def test_choice_reads_the_letter_chosen(completion: str, reference: str, reward: float) -> None:
    assert choice(completion, reference) == reward


def test_exact_is_blind_to_case_space_and_outer_punctuation() -> None:
    assert exact("  The  Nile.\n", "the nile") == 1
    assert exact("The Nile river", "the nile") == 0


def test_the_pure_verifiers_by_name() -> None:
    assert dict(VERIFIERS) == {"exact": exact, "number": number, "choice": choice}
    with closing(Grader("number")) as grader:
        assert grader.grade([("it is 18", "18"), ("17", "18")]) == [1, 0]
        assert grader.counts() == {"graded": 2, "timeouts": 0, "failures": 0}
        assert grader.counts() == {"graded": 0, "timeouts": 0, "failures": 0}


def test_math_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ValueError, match=r"math needs math-verify; install it: pip install 'depo-gateway\[training\]'"):
        reward_function("math")


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
        assert reward.counts() == {"graded": 2, "timeouts": 0, "failures": 1}
        assert reward.counts() == {"graded": 0, "timeouts": 0, "failures": 0}
        with pytest.raises(ValueError, match="no column 'solution' to grade against, only answer, completion_ids"):
            reward(**BATCH)
    with closing(reward_function("math")) as reward:
        assert reward.__name__ == "math"
        assert reward(**BATCH) == [1, 0, 0]


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
    assert later.counts() == {"graded": 2, "timeouts": 0, "failures": 4}


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


def test_collect_takes_no_batch_function(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ValueError, match=r"own\.py:batch must take parameters named \(completion, reference\)"):
        Grader(f"{tmp_path}/own.py:batch")
    with pytest.raises(ValueError, match="deadline must be above 0 seconds, not 0"):
        Grader("number", deadline_s=0)


def test_the_text_of_a_completion() -> None:
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert text_of([{"role": "assistant", "content": None}]) == text_of([]) == ""
