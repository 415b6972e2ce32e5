"""The seed command: writes the shipped estimator as the first checkpoint of a directory that a learner publishes into.

Gateways that watch the directory then have an estimator from the start, under the names of their own pools. Every step
is a rename, so the command may be killed at any point, run again, and run by several replicas at once.
"""

import contextlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from depo_gateway.estimator import calibration, checkpoint

NAME = "builtin"
ABANDONED_SECONDS = 3600.0  # half-written directories of this age belong to no running command


def seed(directory: Path, pools: tuple[str, ...]) -> str:
    """Seeds the directory unless it has a `current`; returns one line that says what was done.

    Raises:
        ValueError: the pools don't fit the shipped estimator, an existing checkpoint is of other pools, or there are
            other checkpoints and no `current` that names the one to serve.
    """
    pointer, place = directory / "current", directory / NAME
    if os.path.lexists(pointer):
        return _nothing_written(pointer)
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
    manifest, _ = checkpoint.load_checkpoint(place)  # another run may have written it
    if manifest.pools != pools:
        raise ValueError(
            f"{place} scores the pools {', '.join(manifest.pools)}, --pools names {', '.join(pools)}; "
            "nothing serves it, since there is no `current`: remove it"
        )
    if os.path.lexists(pointer):  # another process was faster, perhaps a learner with a better one
        return _nothing_written(pointer)
    checkpoint.publish(place)
    return f"{place}: the shipped estimator as checkpoint {manifest.version}; {pointer} names it"


def _nothing_written(pointer: Path) -> str:
    named = pointer.read_text().strip() if pointer.is_file() else str(pointer.resolve())  # a symlink is allowed too
    return f"{pointer} already exists and names {named!r}; nothing was written"


def _ensure_empty(directory: Path) -> None:
    """Raises ValueError if the shipped estimator would be served instead of the user's own checkpoint."""
    pointer = directory / "current"
    if _is_checkpoint(directory):
        raise ValueError(
            f"{directory} is itself a checkpoint: move its files into a subdirectory, "
            f"and write that directory's name into {pointer}"
        )
    names = sorted(item.name for item in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in names if name[0] != "." and name != NAME and _is_checkpoint(directory / name)]
    if others and not os.path.lexists(pointer):  # a learner publishes a moment after it has written
        raise ValueError(
            f"{directory} holds the checkpoint{'s' * (len(others) > 1)} {', '.join(others)} and no `current`: "
            f"write the name of the one to serve into {pointer}"
        )


def _is_checkpoint(place: Path) -> bool:
    return os.path.isfile(place / checkpoint.MANIFEST)  # False without permission: a volume's lost+found


def _clear(directory: Path) -> None:
    """Removes directories left by killed runs, which would fill the disk in a crash loop."""
    for abandoned in directory.glob(f".{NAME}.*"):
        with contextlib.suppress(OSError):  # another replica removed it
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(abandoned)


def _write(place: Path, pools: tuple[str, ...]) -> None:
    shipped, files = checkpoint.load_checkpoint(checkpoint.BUILTIN)
    renamed = replace(calibration.loads(files[checkpoint.CALIBRATION]), pools=pools)
    files[checkpoint.CALIBRATION] = calibration.dumps(renamed)
    try:
        checkpoint.write_checkpoint(
            place, files, shipped.base, pools, shipped.text, shipped.metrics, shipped.version, shipped.heads
        )
    except (OSError, ValueError):  # the place is taken: another replica was faster
        if not (place / checkpoint.MANIFEST).exists():
            raise
