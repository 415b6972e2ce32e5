"""standing.json: what is written is read, and what can't be is said in one sentence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator import standing
from depo_gateway.estimator.standing import Standing

GOOD = Standing("20260101-000000-abcdef01", 1.5, 200, -0.01, -0.03, 0.01, False, 0.3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert standing.read_standing(tmp_path) is None
    standing.write_standing(tmp_path, GOOD)
    standing.write_standing(tmp_path, dataclasses.replace(GOOD, beats_random=True))
    assert standing.read_standing(tmp_path) == dataclasses.replace(GOOD, beats_random=True)
    assert [path.name for path in tmp_path.iterdir()] == [standing.STANDING]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 7}, "says version: 7; it must be of the kind str"),
        ({"labels": 1.5}, "says labels: 1.5; it must be of the kind int"),
        ({"labels": True}, "says labels: True"),
        ({"beats_random": 1}, "says beats_random: 1; it must be of the kind bool"),
        ({"advantage": None}, "says advantage: None"),
        ({"low": float("nan")}, "says low: nan"),
        ({"large_share": 1.2}, "says large_share: 1.2; it must be between 0 and 1"),
    ],
)
def test_a_standing_that_is_none(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / standing.STANDING).write_text(json.dumps(dataclasses.asdict(GOOD) | changes))
    with pytest.raises(ValueError) as caught:
        standing.read_standing(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is not JSON"), ('{"version": ', "is not JSON"), ("[]", "holds no mapping"), ("{}", "lacks 'version'")],
)
def test_a_file_of_something_else(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / standing.STANDING).write_text(text)
    with pytest.raises(ValueError, match=words):
        standing.read_standing(tmp_path)


def test_it_lies_where_the_checkpoints_do(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (one / "manifest.json").write_text("{}")
    (tmp_path / "current").write_text("one\n")
    assert standing.checkpoints_directory(str(tmp_path)) == tmp_path
    assert standing.checkpoints_directory(str(tmp_path / "current")) == tmp_path
    assert standing.checkpoints_directory(str(one)) == tmp_path
    assert standing.checkpoints_directory("builtin") is None


def test_a_directory_in_its_place_is_no_standing(tmp_path: Path) -> None:
    (tmp_path / standing.STANDING).mkdir()
    with pytest.raises(ValueError, match="can't read"):
        standing.read_standing(tmp_path)
