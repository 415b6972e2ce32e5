"""Outcome tables: what a row may hold, and what a mistake in one is called."""

import json
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.training.outcomes.table import (
    examples_of,
    folds_of,
    parse_pools,
    read_table,
    read_tables,
)

GOOD = {"question": "What is 2 + 2?", "correct": {"a": 1, "b": 0.25}, "token_confidence": {"a": 0.9}, "group": "sums"}


def table(place: Path, *rows: object) -> Path:
    place.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return place


def test_a_row_of_either_form_is_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = {"messages": [*messages, {"role": "user", "content": "2 + 2?"}], "correct": {"a": 1}, "source": "chat"}
    first, second = read_table(table(tmp_path / "t.jsonl", GOOD, "", chat))
    assert (first.question, first.source, first.group) == ("What is 2 + 2?", "t", "sums")
    assert first.correct == {"a": 1.0, "b": 0.25}
    assert first.token_confidence == {"a": 0.9}
    assert (second.question, second.context, second.source) == ("2 + 2?", "Hi\nHello", "chat")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": ', "t.jsonl:2: not JSON"),
        ("[1]", "t.jsonl:2: a row is an object"),
        ({"correct": {"a": 1}}, "t.jsonl:2: a row needs question"),
        ({"question": " ", "correct": {"a": 1}}, "t.jsonl:2: the question is empty"),
        ({"question": "x"}, "t.jsonl:2: correct must be an object"),
        ({"question": "x", "correct": {}}, "t.jsonl:2: correct must name at least one model"),
        ({"question": "x", "correct": {"a": 1.5}}, "t.jsonl:2: correct of 'a' is 1.5"),
        ({"question": "x", "correct": {"a": "1"}}, "t.jsonl:2: correct of 'a' is '1'"),
        ('{"question": "x", "correct": {"a": NaN}}', "t.jsonl:2: correct of 'a' is nan"),
        ({"question": "x", "correct": {"a": 10**400}}, r"t.jsonl:2: correct of 'a' is 10{39}\.\.\., not a number"),
        ('{"question": "x", "correct": {"a": ' + "9" * 5_000 + "}}", "t.jsonl:2: not JSON: "),
        ('{"question": ' + "[" * 100_000, "t.jsonl:2: nested too deeply"),
        ({"question": "x", "correct": {"a": 1}, "group": ["g"]}, "t.jsonl:2: group must be a text or a number"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_table(table(tmp_path / "t.jsonl", GOOD, bad)))


def test_a_table_without_rows_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows in"):
        read_tables([table(tmp_path / "t.jsonl")])
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_tables([tmp_path / "latin.jsonl"])


def test_a_lone_surrogate_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    (row,) = read_table(table(tmp_path / "t.jsonl", '{"question": "a\\ud800b", "correct": {"a": 1}}'))
    assert row.question == "a?b"
    turns = [{"role": "user", "content": "\ud800"}, {"role": "user", "content": "\udfff!"}]
    (row,) = read_table(table(tmp_path / "t.jsonl", {"messages": turns, "correct": {"a": 1}, "group": "\ud800"}))
    assert (row.context, row.question, row.group) == ("?", "?!", "?")


def test_null_is_no_name(tmp_path: Path) -> None:
    numbered, unnamed = {**GOOD, "group": 3, "source": 7}, {**GOOD, "group": None, "source": None}
    rows = read_table(table(tmp_path / "t.jsonl", numbered, unnamed))
    assert [(row.group, row.source) for row in rows] == [("3", "7"), ("", "t")]


def test_rows_of_the_same_question_become_one_example(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {**GOOD, "question": "what is  2 + 2?", "correct": {"a": 0, "c": 1}},
        {"question": "else", "correct": {"c": 1}},
    ]
    read = read_tables([table(tmp_path / "t.jsonl", *rows)])
    examples = examples_of(read, parse_pools(["small=a", "large=b,c"]))
    assert len(examples) == 2
    assert examples[0].quality == {"small": 0.5, "large": 0.625}  # a: (1 + 0) / 2; large: b 0.25 and c 1
    assert examples[1].quality == {"small": None, "large": 1.0}
    assert [example.group for example in examples] == ["t/sums", ""]
    labels = labels_by_head(examples, ("small", "large"))
    assert np.isnan(labels["quality"]).tolist() == [[False, False], [True, False]]
    assert labels["token_confidence"][0, 0] == 0.9


def test_a_group_that_is_its_whole_source_is_none(tmp_path: Path) -> None:
    read = read_tables([table(tmp_path / "t.jsonl", GOOD, {**GOOD, "question": "else"})])
    assert [example.group for example in examples_of(read, parse_pools(["p=a"]))] == ["", ""]


def test_sources_can_be_kept_from_drowning_each_other(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "correct": {"a": 1}, "source": "big" if i else "lone"} for i in range(5)]
    read = read_tables([table(tmp_path / "t.jsonl", *rows)])
    weights = {
        balance: [e.weight for e in examples_of(read, parse_pools(["p=a"]), balance=balance)]
        for balance in (0.0, 0.5, 1.0)
    }
    assert weights[0.0] == [1.0] * 5
    assert weights[0.5][0] == pytest.approx(2 * weights[0.5][1])
    assert weights[1.0][0] == pytest.approx(sum(weights[1.0][1:]))
    assert sum(weights[0.5]) == pytest.approx(5)


def test_a_model_nobody_asked_is_a_mistake(tmp_path: Path) -> None:
    rows = read_tables([table(tmp_path / "t.jsonl", GOOD)])
    with pytest.raises(ValueError, match="no row has an outcome of 'z'; the table knows a, b"):
        examples_of(rows, parse_pools(["small=a", "large=z"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["small"], "not of the form"),
        (["small="], "not of the form"),
        (["small=a", "small=b"], "given twice"),
        (["auto=a"], "reserves that name"),
    ],
)
def test_pools_that_make_no_sense(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pools(given)


def test_pools_may_name_several_models() -> None:
    assert parse_pools(["small=a/b", "large=c, d"]).models == (("a/b",), ("c", "d"))


def test_a_group_is_never_split_and_folds_are_even() -> None:
    groups = [f"g{i % 37}" for i in range(400)]
    folds = folds_of(groups, 5, seed=3)
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert np.bincount(folds).min() >= 70
    assert (folds == folds_of(groups, 5, seed=3)).all()
    assert (folds != folds_of(groups, 5, seed=4)).any()
    with pytest.raises(ValueError, match="2 groups can't make 5 folds"):
        folds_of(["a", "b", "a"], 5, 0)
