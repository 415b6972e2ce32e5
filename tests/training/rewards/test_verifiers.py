import importlib.util
from contextlib import closing
from pathlib import Path

import pytest

from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RIGHT, WRONG
from depo_gateway.training.rewards.verifiers import Grader

COUNTED = dict.fromkeys(("graded", "unreadable", "references", "timeouts", "failures"), 0)
BATCH_FUNCTION = "def batch(prompts, completions, **columns): return [0.0] * len(completions)"


def test_the_verdicts_are_counted_by_outcome() -> None:
    with closing(Grader("number")) as grader:
        pairs = [("it is 18", "18"), ("17", "18"), ("I give up", "18"), ("18", "unknown")]
        assert grader.verdicts(pairs) == [RIGHT, WRONG, NOT_READABLE, NO_REFERENCE]
        assert grader.counts() == {**COUNTED, "graded": 2, "unreadable": 1, "references": 1}
        assert grader.counts() == COUNTED
        assert grader.grade(pairs) == [1, 0, 0, None]


@pytest.mark.parametrize(
    ("name", "usable", "unusable", "why"),
    [
        ("number", "#### 18", "unknown", "holds no number that the verifier number can read"),
        ("choice", "C. Vitamin D", "Vitamins", "names no letter, as A, (B) or C. text do, and no index"),
        ("exact", "!", " ", "is empty"),
        (
            "math",
            r"\frac{1}{2}",
            "It is left as an exercise.",
            "holds no answer that math-verify can read",
        ),
    ],
)
def test_references_that_cannot_be_used_are_told_apart(name: str, usable: str, unusable: str, why: str) -> None:
    with closing(Grader(name, deadline_s=20.0)) as grader:
        assert grader.unusable([usable, unusable, usable, unusable]) == [None, why, None, why]
        assert grader.counts() == COUNTED


def test_the_references_of_a_function_of_the_users_are_taken_as_usable(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def own(completion, reference): raise KeyError(reference)")
    with closing(Grader(f"{tmp_path}/own.py:own")) as grader:
        assert grader.unusable(["", "x"]) == [None, None]


def test_math_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ValueError, match=r"math needs math-verify; install it: pip install 'depo-gateway\[training\]'"):
        Grader("math")


def test_collect_takes_no_batch_function(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BATCH_FUNCTION)
    with pytest.raises(ValueError, match=r"own\.py:batch must take parameters named \(completion, reference\)"):
        Grader(f"{tmp_path}/own.py:batch")
    with pytest.raises(ValueError, match="deadline must be above 0 seconds, not 0"):
        Grader("number", deadline_s=0)
