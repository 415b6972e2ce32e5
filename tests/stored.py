"""Models that one test run builds and another reads: .ci/newest tests serving where there is no torch to build them.

DEPO_TEST_MODELS names the directory; without it each run builds its own.
"""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stored(build: Callable[..., Path]) -> Callable[..., Path]:
    """A fixture's function, called only where $DEPO_TEST_MODELS does not yet hold a model of its name."""

    @functools.wraps(build)
    def found_or_built(**fixtures: Any) -> Path:
        if "DEPO_TEST_MODELS" not in os.environ:
            return build(**fixtures)
        folder = Path(os.environ["DEPO_TEST_MODELS"]) / build.__name__
        if not folder.exists():
            built = build(**fixtures)
            shutil.copytree(built, folder / built.name)
        (place,) = folder.iterdir()
        return place

    return found_or_built
