"""One learner at a time in a directory of checkpoints."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
