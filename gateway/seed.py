"""The seed command: the shipped estimator as the first checkpoint of a directory that a learner will publish into.

Gateways that watch the directory have something to serve from the first minute on, under the names of their own pools.
Every step is a rename, so it may be killed at any point, run again, and run by several replicas at once.
"""

import contextlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from depo_gateway.estimator import calibration, checkpoint

NAME = "builtin"
LEFT_SECONDS = 3600.0  # what has been half-written for so long is nobody's any more


def seed(directory: Path, pools: tuple[str, ...]) -> str:
    """What was done, in a line.

    Raises:
        ValueError: the pools don't fit the shipped estimator, what lies there is no checkpoint of these pools, or there
            are checkpoints of the user's and no `current` that says which one to serve.
    """
    pointer, place = directory / "current", directory / NAME
    if os.path.lexists(pointer):
        return _told(pointer)
    _ensure_empty(directory)
    shipped = checkpoint.load_manifest(checkpoint.BUILTIN)
    if len(pools) != len(shipped.pools):
        raise ValueError(
            f"the shipped estimator scores {len(shipped.pools)} pools, --pools names {len(pools)}; "
            "fit one for these pools with depo-train fit --pools"
        )
    if len(set(pools)) != len(pools):
        raise ValueError(f"--pools names a pool twice: {' '.join(pools)}")
    if not (place / checkpoint.MANIFEST).exists():
        _clear(directory)
        _write(place, pools)
    manifest, _ = checkpoint.load_checkpoint(place)  # it may be older than this run
    if manifest.pools != pools:
        raise ValueError(
            f"{place} scores the pools {', '.join(manifest.pools)}, --pools names {', '.join(pools)}; "
            "nothing serves it, since there is no `current`: remove it"
        )
    if os.path.lexists(pointer):  # another was quicker, perhaps a learner with a better one
        return _told(pointer)
    checkpoint.publish(place)
    return f"{place}: the shipped estimator as checkpoint {manifest.version}; {pointer} names it"


def _told(pointer: Path) -> str:
    named = pointer.read_text().strip() if pointer.is_file() else str(pointer.resolve())  # a symlink does as well
    return f"{pointer} is there already and names {named!r}; nothing was written"


def _ensure_empty(directory: Path) -> None:
    """ValueError where the shipped estimator would be served in the place of a checkpoint that somebody put there."""
    pointer = directory / "current"
    if _is_checkpoint(directory):
        raise ValueError(
            f"{directory} is itself a checkpoint: move its files into a directory of their own there, "
            f"and write that directory's name into {pointer}"
        )
    names = sorted(item.name for item in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in names if name[0] != "." and name != NAME and _is_checkpoint(directory / name)]
    if others and not os.path.lexists(pointer):  # a learner publishes what it has written a moment later
        raise ValueError(
            f"{directory} holds the checkpoint{'s' * (len(others) > 1)} {', '.join(others)} and no `current`: "
            f"write the name of the one to serve into {pointer}"
        )


def _is_checkpoint(place: Path) -> bool:
    return os.path.isfile(place / checkpoint.MANIFEST)  # False where it may not look: a volume's lost+found


def _clear(directory: Path) -> None:
    """Removes what killed runs left: one that is killed again and again would fill the disk."""
    for left in directory.glob(f".{NAME}.*"):
        with contextlib.suppress(OSError):  # another replica ended just now
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left)


def _write(place: Path, pools: tuple[str, ...]) -> None:
    shipped, files = checkpoint.load_checkpoint(checkpoint.BUILTIN)
    renamed = replace(calibration.loads(files[checkpoint.CALIBRATION]), pools=pools)
    files[checkpoint.CALIBRATION] = calibration.dumps(renamed)
    try:
        checkpoint.write_checkpoint(place, files, shipped.base, pools, shipped.text, shipped.metrics, shipped.version)
    except (OSError, ValueError):  # the place is taken: another replica was quicker
        if not (place / checkpoint.MANIFEST).exists():
            raise
