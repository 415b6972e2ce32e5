"""The data set of `depo-train rl`, by name or file, as rows with `prompt` and `answer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_rows(name: str, config: str | None, split: str) -> Dataset:
    """A data set of the hub, or a local file or directory. Raises ValueError, which names it, if reading fails."""
    place = Path(name)
    if place.suffix in FILES and not place.exists():
        raise ValueError(f"dataset {name} does not exist")
    try:
        if place.is_file():
            if place.suffix not in FILES:
                raise ValueError(f"dataset {name} is not a {', '.join(FILES)} file")
            rows = datasets.load_dataset(FILES[place.suffix], data_files=str(place), split="train")
        elif (place / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"dataset {name} cannot be read: {reason}") from None
    if not isinstance(rows, Dataset):
        raise ValueError(f"dataset {name} has several splits; set dataset_split to one of them")
    return rows


def prepare_rows(
    rows: Dataset, prompt_column: str, answer_column: str, system_prompt: str | None, chat: bool
) -> Dataset:
    """Rows with `prompt` (text or, with `chat`, messages) and `answer` (None where there is none) beside the others.

    Columns may be nested: reward_model.ground_truth. A system prompt requires `chat`. Raises ValueError for a column
    that does not exist, or is nested and in no row. Only the column `answer` may be missing: not every reward needs it.
    """
    if system_prompt and not chat:
        raise ValueError("system_prompt is set, but the model's tokenizer has no chat template")
    for column in (prompt_column, answer_column):
        if column.split(".")[0] not in rows.column_names:
            if column == "answer":
                continue
            raise ValueError(f"the dataset has no column {column!r}, only {', '.join(rows.column_names)}")
        if "." in column and not any(_at(row, column) is not None for row in rows.select_columns(column.split(".")[0])):
            raise ValueError(f"no row of the dataset has a value in the column {column!r}")
    graded = answer_column.split(".")[0] in rows.column_names

    def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = _at(row, prompt_column)
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str | list):
            raise ValueError(f"the column {prompt_column!r} holds {type(prompt).__name__}, not text or messages")
        if isinstance(prompt, list) and not chat:
            raise ValueError(f"the column {prompt_column!r} holds messages, but the tokenizer has no chat template")
        if system_prompt:
            prompt = [{"role": "system", "content": system_prompt}, *prompt]
        return {"prompt": prompt}

    # removed first: a column cannot change its type under its own name
    own = [name for name in ("prompt", "answer") if name in rows.column_names]
    prompts = rows.map(row_of, remove_columns=own, desc="Prompts")
    if not graded:
        return prompts
    found = (_at(row, answer_column) for row in rows.select_columns(answer_column.split(".")[0]))
    answers = [None if answer is None else str(answer) for answer in found]
    text = datasets.Features({"answer": datasets.Value("string")})  # even if the first rows, or all, have no answer
    return datasets.concatenate_datasets([prompts, Dataset.from_dict({"answer": answers}, features=text)], axis=1)


def _at(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
