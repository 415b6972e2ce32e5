"""What a learner keeps of its checkpoints, and what it clears away after a kill."""

import fcntl
import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from depo_gateway.estimator.checkpoint import MANIFEST

MADE = "refresh-"  # the learner's own checkpoints begin so, and nobody else's are touched
TEMPORARY = ".learner.tmp"
log = logging.getLogger(__name__)


def clear(out: Path) -> None:
    """Removes what a killed learner left: checkpoints half-written or half-deleted, pointers not yet renamed."""
    for place in [*out.glob(f".{MADE}*"), *out.glob(".current.*"), *out.glob(".standing*"), out / TEMPORARY]:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def prune(out: Path, keep: int, protected: Collection[Path] = ()) -> list[str]:
    """Deletes all but the newest `keep` of the learner's checkpoints; their names. Never the one that `current` names.

    One is renamed before it is deleted, so that a half of it is never taken for a checkpoint.
    """
    try:
        current = (out / "current").read_text(encoding="utf-8").strip()
    except OSError:
        return []  # who can't tell which one is served deletes none
    made = sorted(path for path in out.glob(f"{MADE}*") if (path / MANIFEST).is_file())  # names begin with the time
    safe = {path.resolve() for path in protected}
    gone = []
    for path in made[: max(0, len(made) - keep)]:
        if path.name != current and path.resolve() not in safe:
            aside = out / f".{path.name}.old"
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            gone.append(path.name)
    if gone:
        log.info("deleted old checkpoints: %s", ", ".join(gone))
    return gone


LOCK = ".learner.lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The directory, made if absent, is this process's alone until the block ends; a kill ends it too.

    Raises:
        ValueError: another learner works there, or it is a file.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file; give a directory")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another learner works in {out}: it holds {out / LOCK}; give this one another --out"
            ) from None
        yield
