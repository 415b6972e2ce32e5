"""The file that `depo-train collect` writes: an outcome table that can be continued, and its settings beside it.

Rows drawn in different ways must not be mixed, so FILE.settings.json says how the table's rows were drawn. A file that
is not such a table is never changed.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from depo_gateway.training.outcomes.completions import check_counts

Rows = dict[str, dict[str, Any]]
REQUIRED_SETTINGS = {"k", "temperature", "verifier", "max_tokens", "models"}
EXTRA_BODY = "extra_body"  # the setting that is there only if requests had further fields
COMPLETIONS = "completions"  # a row's field that counts each model's completions by outcome; version 0.1 wrote none


@contextmanager
def outcome_file(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[IO[str], Rows]]:
    """The table opened for appending, locked, and its rows by prompt. A line torn by a crash is cut off.

    Args:
        settings: how all rows were drawn, with `models` (sorted names). A table without a settings file gets these, if
            its models are the same.

    Raises:
        ValueError: the file is no outcome table, was collected with other settings, or is being written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate is written as \udXXX, which is how JSON spells it.
    with path.open("a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another collect is writing {path}") from None
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1  # end of the last whole line
        rows = _rows_of(content[:whole], path)
        if content and not rows:
            raise ValueError(f"{path} is not an outcome table: it has no complete row; give --out a new file")
        _check_settings(path, rows, settings)
        if whole < len(content):
            try:
                last = _rows_of(content[whole:], path)  # a whole row: only its newline is missing
            except ValueError:
                os.truncate(path, whole)
            else:
                file.write("\n")
                file.flush()
                rows |= last
        yield file, rows


def settings_path(table: Path) -> Path:
    return table.with_name(f"{table.name}.settings.json")


def prompt_key(row: Mapping[str, Any]) -> str:
    """Equal for two rows of the same prompt."""
    return json.dumps(row["question"] if "question" in row else row["messages"], sort_keys=True)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and objects; blank lines are skipped. ValueError names file and line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return _objects(content, path)


def _objects(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except RecursionError:
                raise ValueError(f"{path}, line {number}: nested too deeply") from None
            except ValueError as error:  # also an integer of more digits than Python reads
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: not JSON ({reason})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object")
            yield number, record


def _rows_of(content: bytes, path: Path) -> Rows:
    rows = {}
    for number, row in _objects(content, path):
        correct = row.get("correct")
        rates = list(correct.values()) if isinstance(correct, dict) else []
        graded = all(isinstance(rate, int | float) and 0 <= rate <= 1 for rate in rates)
        counted = COMPLETIONS in row and isinstance(correct, dict)
        if counted:
            try:
                check_counts(row[COMPLETIONS])
            except ValueError:
                counted = graded = False
        if not graded or not (rates or counted) or not ("question" in row or "messages" in row):
            raise ValueError(f"{path}, line {number}: not a row of an outcome table; give --out a new file")
        rows[prompt_key(row)] = row
    return rows


def _check_settings(path: Path, rows: Rows, settings: Mapping[str, Any]) -> None:
    """Refuses other settings than the table's; writes those of a new table."""
    place = settings_path(path)
    before: Mapping[str, Any] = {}
    if place.exists():
        try:
            before = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = {}
        known = isinstance(before, dict) and REQUIRED_SETTINGS <= set(before) <= REQUIRED_SETTINGS | {EXTRA_BODY}
        if not known or not isinstance(before["models"], list):
            raise ValueError(f"{place} is not the settings of a table; move it away, or give --out a new file")
    elif rows:
        before = {**settings, "models": sorted({name for row in rows.values() for name in row["correct"]})}
    if rows and before != settings:
        differences = [
            f"from {', '.join(map(str, before[name]))}, not from {', '.join(map(str, settings[name]))}"
            if name == "models"
            else f"with {name} {before.get(name, 'none')}, not {settings.get(name, 'none')}"
            for name in {**settings, **before}
            if before.get(name) != settings.get(name)
        ]
        raise ValueError(
            f"{path} was collected {' and '.join(differences)}: give --out another file, or use the settings of before"
        )
    if before != settings or not place.exists():
        _write_whole(place, json.dumps(settings) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Writes a temporary file, then renames it: a crash leaves the old file or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)
