"""depo-gateway seed: the first checkpoint of a directory, however often and however rudely it is run."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.gateway import __main__, scoring
from depo_gateway.gateway.seed import seed

POOLS = ("qwen-1-5b", "qwen-7b")
COMMAND = [sys.executable, "-m", "depo_gateway.gateway", "seed"]
TURN = {"role": "user", "content": "Prove that there are infinitely many primes of the form 4k + 3."}


def scores(runtime: Runtime) -> tuple[float, ...]:
    return runtime.score([runtime.prepare(TURN["content"])])[0].quality


def loaded(directory: Path) -> Runtime:
    """As a gateway whose pools are POOLS loads it."""
    runtime, columns = scoring.load_runtime(str(directory), POOLS, "gain")
    assert columns == {POOLS[0]: 0, POOLS[1]: 1}
    return runtime


def test_a_gateway_serves_from_a_seeded_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "volume" / "checkpoints"
    assert __main__.main(["seed", str(place), "--pools", *POOLS]) == 0
    runtime = loaded(place)
    assert capsys.readouterr().out == (
        f"{place}/builtin: the shipped estimator as checkpoint {runtime.version}; {place}/current names it\n"
    )
    shipped = Runtime.load(checkpoint.BUILTIN)
    assert scores(runtime) == scores(shipped)
    assert runtime.manifest.parent == shipped.version
    assert runtime.calibration.curves == shipped.calibration.curves
    assert sorted(item.name for item in place.iterdir()) == ["builtin", "current"]
    assert {oct(item.stat().st_mode & 0o777) for item in (place / "builtin").iterdir()} == {"0o644"}


def test_what_is_served_already_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed(tmp_path, POOLS)
    (tmp_path / "builtin").rename(tmp_path / "refresh-1")
    (tmp_path / "current").write_text("refresh-1\n")
    before = (tmp_path / "current").stat()
    for pools in (POOLS, ("a", "b"), ("a", "b", "c")):  # these pools may not even be the checkpoint's
        assert __main__.main(["seed", str(tmp_path), "--pools", *pools]) == 0
        assert "is there already and names 'refresh-1'; nothing was written" in capsys.readouterr().out
    assert (tmp_path / "current").stat() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["current", "refresh-1"]


def test_a_current_that_is_a_symlink_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed(tmp_path, POOLS)
    (tmp_path / "builtin").rename(tmp_path / "mine")
    (tmp_path / "current").unlink()
    for name in ("mine", "gone"):  # which gateways serve from, and refuse
        (tmp_path / "current").symlink_to(name)
        assert __main__.main(["seed", str(tmp_path), "--pools", *POOLS]) == 0
        assert f"names '{tmp_path.resolve() / name}'; nothing was written" in capsys.readouterr().out
        (tmp_path / "current").unlink()
    assert [item.name for item in tmp_path.iterdir()] == ["mine"]


def test_one_that_was_killed_is_taken_up_again(tmp_path: Path) -> None:
    """By SIGKILL at whatever moment: nothing half-written bears a checkpoint's name, and the next run ends the work."""
    unfinished = 0
    for number in itertools.count():
        place = tmp_path / str(number)
        process = subprocess.Popen([*COMMAND, str(place), "--pools", *POOLS], stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(place.glob(".builtin.*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not (place / "current").exists()
        if (place / "builtin").exists():
            checkpoint.load_checkpoint(place / "builtin")
        seed(place, POOLS)
        loaded(place)
        if unfinished and number >= 2:
            break
        assert number < 20, "it was always quicker than its killer"


def test_one_that_was_killed_before_its_last_step(tmp_path: Path) -> None:
    seed(tmp_path, POOLS)
    (tmp_path / "current").unlink()
    written = (tmp_path / "builtin" / "manifest.json").stat()
    seed(tmp_path, POOLS)
    assert (tmp_path / "builtin" / "manifest.json").stat() == written
    loaded(tmp_path)


def test_what_killed_ones_left_is_cleared_away(tmp_path: Path) -> None:
    for name, age in ((".builtin.old", 7200), (".builtin.at-work", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    seed(tmp_path, POOLS)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".builtin.at-work", "builtin", "current"]


def test_several_replicas_at_once(tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path), "--pools", *POOLS]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    ends = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in ends] == [0] * 4, ends
    loaded(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["builtin", "current"]


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        (("a", "b", "c"), "the shipped estimator scores 2 pools, --pools names 3; fit one"),
        (("a", "a"), "--pools names a pool twice: a a"),
        (("other", "pools"), "scores the pools qwen-1-5b, qwen-7b, --pools names other, pools"),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pools: tuple[str, ...], words: str
) -> None:
    seed(tmp_path, POOLS)
    (tmp_path / "current").unlink()
    assert __main__.main(["seed", str(tmp_path), "--pools", *pools]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "current").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "{0} is itself a checkpoint: move its files into a directory of their own there, and write that"),
        ("mine", "{0} holds the checkpoint mine and no `current`: write the name of the one to serve into {0}/current"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_of_the_users_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, words: str, killed: bool
) -> None:
    volume = tmp_path / "volume"
    shutil.copytree(checkpoint.BUILTIN, volume / place)
    if killed:  # one of an older version had begun to pass over it
        shutil.copytree(checkpoint.BUILTIN, volume / "builtin")
    before = sorted(tmp_path.rglob("*"))
    assert __main__.main(["seed", str(volume), "--pools", *POOLS]) == 2
    error = capsys.readouterr().err
    assert words.format(volume) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    if place:  # the remedy
        (volume / "current").write_text(f"{place}\n")
        assert __main__.main(["seed", str(volume), "--pools", *POOLS]) == 0


def test_what_is_no_checkpoint_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "refusals.jsonl").touch()
    shutil.copytree(checkpoint.BUILTIN, tmp_path / ".refresh-1")  # half-deleted
    seed(tmp_path, POOLS)
    loaded(tmp_path)


def test_a_damaged_checkpoint_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed(tmp_path, POOLS)
    (tmp_path / "current").unlink()
    with open(tmp_path / "builtin" / "model.onnx", "r+b") as file:
        file.truncate(1000)
    assert __main__.main(["seed", str(tmp_path), "--pools", *POOLS]) == 2
    assert "model.onnx does not match the manifest's sha256" in capsys.readouterr().err
    assert not (tmp_path / "current").exists()
