"""A checkpoint is whole or not there; a damaged one is refused in one clear sentence."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.numpy

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.checkpoint import Base
from depo_gateway.estimator.text import TextConfig

FILES = {
    checkpoint.WEIGHTS: safetensors.numpy.save({}),
    checkpoint.TOKENIZER: b"tokenizer",
    checkpoint.ENCODER: b"",  # of protobuf, an empty message
    checkpoint.CALIBRATION: b"{}",
}


def write(place: Path) -> checkpoint.Manifest:
    return checkpoint.write_checkpoint(
        place, FILES, Base("some/encoder", 5), ("small", "large"), TextConfig(), {"apgr": 0.6}
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    manifest, files = checkpoint.load_checkpoint(tmp_path / "a")
    assert manifest == written
    assert files == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing half-written is left beside it


def test_a_manifest_from_before_there_was_a_trunk_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    place = tmp_path / "a" / checkpoint.MANIFEST
    raw = json.loads(place.read_text())
    for name in checkpoint.KIND:
        del raw["base"][name]
    place.write_text(json.dumps(raw))
    assert checkpoint.load_checkpoint(tmp_path / "a")[0] == written
    assert (written.base.wide, written.base.trunk, written.base.rounded) == (True, False, True)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ValueError, match="never overwritten"):
        write(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")  # an empty directory is a place like any other


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.write_checkpoint(tmp_path / "a", FILES, Base("e", 5), ("small",), TextConfig(), {"not": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_an_edited_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"edited")
    with pytest.raises(ValueError, match=f"{name} does not match the manifest's sha256"):
        checkpoint.load_checkpoint(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        checkpoint.load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99; this version reads schemas 1 and 2"),
        ({"files": {"model.onnx": "0"}}, "names no calibration\\.json"),
        *(
            ({"files": {**dict.fromkeys(FILES, "0"), name: "0"}}, "is not in the checkpoint")
            for name in ("../../etc/passwd", "..", ".", "", "/etc/passwd", "a\0b")
        ),
        *(
            ({"base": {"encoder": "e", "layers": layers, "trained": []}}, "it must be a whole number from 0 on")
            for layers in ("five", 5.5, -1, True, None)
        ),
        ({"text": {"template": "?", "pooling": "cls", "max_tokens": 128}}, "text template '\\?' is unknown"),
        *(
            ({"base": {"encoder": "e", "layers": 5, "trained": [], name: "no"}}, f"says {name}: 'no'; it must be true")
            for name in ("wide", "trunk", "rounded")
        ),
        *(
            ({"base": {"encoder": "e", "layers": 5, "trained": [], "centres": count}}, "says centres: .*whole number")
            for count in ("ten", -1, True, 1.5)
        ),
        *(
            ({"base": {"encoder": "e", "layers": 5, "trained": [], "groups": names}}, "no distinct texts")
            for names in (["law", "law"], [7])
        ),
        ({"base": {}}, "not a manifest of schema 1"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "a")
    place = tmp_path / "a" / checkpoint.MANIFEST
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.MANIFEST])
def test_a_symlink_may_not_lead_out_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    place = tmp_path / "a" / name
    (tmp_path / "a" / "data").mkdir()
    place.rename(tmp_path / "a" / "data" / name)
    place.symlink_to(Path("data") / name)
    checkpoint.load_checkpoint(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    checkpoint.load_checkpoint(tmp_path / "link")
    place.resolve().rename(tmp_path / name)
    place.unlink()
    place.symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} leads out of it"):
        checkpoint.load_checkpoint(tmp_path / "a")


def test_a_manifest_that_is_no_json_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no manifest\.json"):
        checkpoint.load_checkpoint(tmp_path)
    (tmp_path / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        checkpoint.load_checkpoint(tmp_path)


def test_current_names_the_one_to_serve(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
        checkpoint.publish(tmp_path / name)
        assert checkpoint.resolve(tmp_path) == tmp_path / name
        assert checkpoint.resolve(tmp_path / "current") == tmp_path / name
    assert checkpoint.resolve(tmp_path / "one") == tmp_path / "one"


def test_a_publication_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "one")
    (tmp_path / "current").mkdir()
    with pytest.raises(OSError, match="directory"):
        checkpoint.publish(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "one"]


def test_current_may_be_a_symlink(tmp_path: Path) -> None:
    write(tmp_path / "one")
    (tmp_path / "current").symlink_to("one")
    assert checkpoint.resolve(tmp_path) == tmp_path / "one"
    assert checkpoint.resolve(tmp_path / "current") == tmp_path / "one"


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is no checkpoint"):
            checkpoint.resolve(place)
    write(tmp_path / "one")
    checkpoint.publish(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.resolve(tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no directory that this user may write to"):
        checkpoint.ensure_free(tmp_path / "file" / "first")
    checkpoint.ensure_free(tmp_path / "new" / "deep" / "first")


@pytest.mark.parametrize("name", ["nope", ""])
def test_a_current_that_names_nothing_is_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "current").write_text(f"{name}\n")
    with pytest.raises(ValueError, match=f"current names '{name}', which is no checkpoint"):
        checkpoint.resolve(tmp_path)
