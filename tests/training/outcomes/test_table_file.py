"""What collect goes on with, and what it leaves as it is."""

import json
from pathlib import Path

import pytest

from depo_gateway.training.outcomes import table_file

SETTINGS = {"k": 8, "temperature": 1.0, "verifier": "number", "max_tokens": 512, "models": ["a", "b"]}
ROW = {"question": "1+1=", "correct": {"a": 0.5, "b": 1}}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def opened(path: Path, settings: dict[str, object] = SETTINGS) -> list[str]:
    with table_file.outcome_file(path, settings) as (_, rows):
        return [row["question"] for row in rows.values()]


@pytest.mark.parametrize(
    "content",
    [
        '{"some": "JSON"}',  # a file of one line and no newline
        json.dumps(ROW),
        "a note\nof two lines\nand a third without an end",
        '{"question": "1+1=", "answer": "2"}\n{"question": "1+2=", "answer": "3"}',  # prompts
        lines(ROW) + '{"question": "x", "correct": {"a": "yes"}}\n{"tor',
        lines(ROW) + '{"question": "x", "correct": {}}\n',
        lines(ROW) + "[" * 100_000 + "\n",
        lines(ROW) + "9" * 5_000 + "\n",
        "\n\n",
        "caf\u00e9\n",
    ],
)
def test_a_file_that_is_no_outcome_table_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=str(path)):
        opened(path)
    assert path.read_text(encoding="latin-1") == content
    assert [place.name for place in tmp_path.iterdir()] == ["file"]


def test_a_torn_line_is_cut_off_and_a_whole_one_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    second = lines({**ROW, "question": "2+2="})
    path.write_text(lines(ROW) + second[:-5])
    assert opened(path) == ["1+1="]
    assert path.read_text() == lines(ROW)
    path.write_text(lines(ROW) + second[:-1])
    assert opened(path) == ["1+1=", "2+2="]
    assert path.read_text() == lines(ROW) + second


def test_settings_stand_beside_the_table(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    beside = tmp_path / "out.jsonl.settings.json"
    assert opened(path) == []
    assert json.loads(beside.read_text()) == SETTINGS
    assert opened(path, {**SETTINGS, "k": 2}) == []  # nothing is collected yet
    path.write_text(lines(ROW))
    message = r"was collected with k 2, not 8 and from a, b, not from a, c: give --out another file"
    with pytest.raises(ValueError, match=message):
        opened(path, {**SETTINGS, "models": ["a", "c"]})
    assert opened(path, {**SETTINGS, "k": 2}) == ["1+1="]
    beside.write_text('{"theme": "dark"}')
    with pytest.raises(ValueError, match=r"settings\.json is not the settings of a table"):
        opened(path)
    assert beside.read_text() == '{"theme": "dark"}'


def test_a_table_without_settings_is_gone_on_with_if_its_models_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(lines(ROW))
    for models in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=f"was collected from a, b, not from {', '.join(models)}:"):
            opened(path, {**SETTINGS, "models": models})
    assert path.read_text() == lines(ROW)
    assert opened(path) == ["1+1="]
    assert table_file.settings_path(path).exists()


def test_two_collects_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    twice = pytest.raises(ValueError, match="another collect is writing")
    with table_file.outcome_file(path, SETTINGS), twice:
        opened(path)


def test_a_lone_surrogate_is_written_as_json_spells_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with table_file.outcome_file(path, SETTINGS) as (file, _):
        file.write(json.dumps({**ROW, "question": "\ud800 \u00e9"}, ensure_ascii=False) + "\n")
    assert opened(path) == ["\ud800 \u00e9"]
