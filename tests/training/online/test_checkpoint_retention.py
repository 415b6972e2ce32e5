"""Which checkpoints are deleted, and which leftovers."""

import shutil
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.training.online import checkpoint_retention


def put(out: Path, tiny_checkpoint: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(tiny_checkpoint, out / name)


def test_the_newest_checkpoints_are_retained_and_the_current_one_always(tmp_path: Path, tiny_checkpoint: Path) -> None:
    names = [f"refresh-2026010{day}-000000-aaaa" for day in range(1, 7)]
    put(tmp_path, tiny_checkpoint, *names, "fitted")
    assert checkpoint_retention.prune(tmp_path, 2) == []  # without a `current` it is unknown which one is served
    checkpoint.publish(tmp_path / names[0])
    assert checkpoint_retention.prune(tmp_path, 2, (tmp_path / names[1],)) == names[2:4]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[0], names[1], names[4], names[5], "fitted", "current"}
    assert checkpoint_retention.prune(tmp_path, 2, (tmp_path / names[1],)) == []


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path, tiny_checkpoint: Path) -> None:
    put(tmp_path, tiny_checkpoint, "refresh-1", ".refresh-2.half", ".refresh-3.old", ".other")
    checkpoint.publish(tmp_path / "refresh-1")
    for name in (".current.17", ".standing.json.17", ".refresh-abcd", "standing.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / checkpoint_retention.TEMPORARY / "deep").mkdir(parents=True)
    checkpoint_retention.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"refresh-1", ".other", "current", "standing.json"}


def test_a_directory_has_one_learner(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with checkpoint_retention.directory_lock(out):
        with pytest.raises(ValueError, match="another learner works in"), checkpoint_retention.directory_lock(out):
            pass
    with checkpoint_retention.directory_lock(out):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="is a file; give a directory"),
        checkpoint_retention.directory_lock(tmp_path / "file"),
    ):
        pass
