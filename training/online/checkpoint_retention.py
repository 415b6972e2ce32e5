"""Retention of the learner's checkpoints: deletes old ones and leftovers of a kill; locks the directory."""

import fcntl
import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from depo_gateway.estimator.checkpoint import MANIFEST
from depo_gateway.estimator.held_publish import HELD
from depo_gateway.training.online.spend_ledger import SPEND_FILE

OWN_PREFIX = "refresh-"  # of the learner's own checkpoints; others are never touched
TEMPORARY = ".learner.tmp"
LOCK = ".learner.lock"
log = logging.getLogger(__name__)


def remove_leftovers(out: Path) -> None:
    """Removes what a killed learner left: checkpoints half-written or half-deleted, files not yet renamed."""
    patterns = (f".{OWN_PREFIX}*", ".current.*", ".standing*", f".{HELD}*", f".{SPEND_FILE}*")
    for place in [*(place for pattern in patterns for place in out.glob(pattern)), out / TEMPORARY]:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def prune(out: Path, keep: int, protected: Collection[Path] = ()) -> list[str]:
    """Deletes all but the newest `keep` of the learner's checkpoints, and returns the names of those deleted.

    The one that `current` names is never deleted. A checkpoint is renamed before it is deleted, so that no part of it
    is ever taken for a whole one.
    """
    try:
        current = (out / "current").read_text(encoding="utf-8").strip()
    except OSError:
        return []  # without knowing which one is served, none can be deleted
    checkpoints = sorted(
        path for path in out.glob(f"{OWN_PREFIX}*") if (path / MANIFEST).is_file()
    )  # names begin with the time
    safe = {path.resolve() for path in protected}
    deleted = []
    for path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if path.name != current and path.resolve() not in safe:
            aside = out / f".{path.name}.old"
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            deleted.append(path.name)
    if deleted:
        log.info("deleted old checkpoints: %s", ", ".join(deleted))
    return deleted


@contextmanager
def directory_lock(out: Path) -> Iterator[None]:
    """Locks the directory, created if absent, for this process until the block ends or the process dies.

    Raises:
        ValueError: another learner works in it, or it is a file.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file; give a directory")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another learner works in {out}: it has locked {out / LOCK}; give this one another --out"
            ) from None
        yield
