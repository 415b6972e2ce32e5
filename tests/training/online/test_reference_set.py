"""The reference set: a table of models becomes labels of pools."""

import json
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.reference_set import reference_rows


def settings(table: Path | None, **pools: str) -> learner_settings.LearnerSettings:
    raw: dict[str, Any] = {"records": {"url": "sqlite:////x.db"}}
    raw["pools"] = {name: {"model": model, "backends": [{"url": "http://a"}]} for name, model in pools.items()}
    return learner_settings.parse_settings(raw | ({} if table is None else {"reference": str(table)}))


def test_models_are_taken_for_their_pools(tmp_path: Path, tiny_checkpoint: Path) -> None:
    table = tmp_path / "ours.jsonl"
    rows = [
        {"question": "one", "correct": {"org/big": 1, "org/tiny": 0, "other": 1}, "token_confidence": {"org/big": 0.5}},
        {"question": "two", "correct": {"large": 0.5, "org/big": 1}},
        {"question": "three", "correct": {"other": 1}},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = reference_rows(settings(table, small="org/tiny", large="org/big"), tiny_checkpoint, tmp_path)
    assert [(row.question, row.correct, row.token_confidence) for row in found] == [
        ("one", {"large": 1.0, "small": 0.0}, {"large": 0.5}),
        ("two", {"large": 0.75}, {}),
    ]
    table.write_text(json.dumps(rows[2]))
    with pytest.raises(ValueError, match=r"ours.jsonl names none of the models small, large, huge, m"):
        reference_rows(settings(table, huge="m"), tiny_checkpoint, tmp_path)
    assert reference_rows(settings(None), tiny_checkpoint, tmp_path) == []
