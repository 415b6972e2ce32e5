"""held.json is whole or not there; a damaged one is one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator import held_publish
from depo_gateway.estimator.held_publish import HELD, HeldPublish
from depo_gateway.estimator.standing import Standing

STANDING = Standing("v2", 1.0, 100, 0.1, 0.05, 0.15, True, 0.3)
HELD_BACK = HeldPublish("refresh-2", "v2", "v1", 1.0, "refresh-2 is held back", 0.67, 0.536, STANDING)


@pytest.mark.parametrize("held", [HELD_BACK, replace(HELD_BACK, cost_change=None, standing=None)])
def test_what_is_written_is_read(tmp_path: Path, held: HeldPublish) -> None:
    assert held_publish.read_held(tmp_path) is None
    held_publish.write_held(tmp_path, held)
    assert held_publish.read_held(tmp_path) == held
    assert [path.name for path in tmp_path.iterdir()] == [HELD]
    held_publish.remove_held(tmp_path)
    held_publish.remove_held(tmp_path)
    assert held_publish.read_held(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "../elsewhere"}, "checkpoint is no name of a directory beside it"),
        ({"checkpoint": ".."}, "checkpoint is no name of a directory beside it"),
        ({"sentence": 5}, "sentence is no text"),
        ({"time": "soon"}, "does not name a held checkpoint"),
        ({"standing": {"version": "v"}}, "does not name a held checkpoint"),
    ],
)
def test_a_damaged_one_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    held_publish.write_held(tmp_path, HELD_BACK)
    place = tmp_path / HELD
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        held_publish.read_held(tmp_path)
    place.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        held_publish.read_held(tmp_path)
