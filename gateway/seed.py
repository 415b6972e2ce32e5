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

from estimator import calibration, checkpoint

NAME = "builtin"
LEFT_SECONDS = 3600.0  # what has been half-written for so long is nobody's any more


def seed(directory: Path, pools: tuple[str, ...]) -> str:
    """What was done, in a line.

    Raises:
        ValueError: the pools don't fit the shipped estimator, or what lies there is no checkpoint of these pools.
    """
    pointer, place = directory / "current", directory / NAME
    if os.path.lexists(pointer):
        return _told(pointer)
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
    manifest, _ = checkpoint.load(place)  # it may be older than this run
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


def _clear(directory: Path) -> None:
    """Removes what killed runs left: one that is killed again and again would fill the disk."""
    for left in directory.glob(f".{NAME}.*"):
        with contextlib.suppress(OSError):  # another replica ended just now
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left)


def _write(place: Path, pools: tuple[str, ...]) -> None:
    shipped, files = checkpoint.load(checkpoint.BUILTIN)
    renamed = replace(calibration.loads(files[checkpoint.CALIBRATION]), pools=pools)
    files[checkpoint.CALIBRATION] = calibration.dumps(renamed)
    try:
        checkpoint.write(place, files, shipped.base, pools, shipped.text, shipped.metrics, shipped.version)
    except (OSError, ValueError):  # the place is taken: another replica was quicker
        if not (place / checkpoint.MANIFEST).exists():
            raise
