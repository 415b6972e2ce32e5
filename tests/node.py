"""Packages of npm that tests check with, as a folder's package-lock.json pins them.

Where Node.js or npm isn't installed the tests that need them are skipped; with DEPO_NEEDS_NODE=1, as in .ci/run, they
fail.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def furnish(place: Path, source: Path, files: Sequence[str]) -> None:
    """Copies `files` of `source` to `place` and puts its packages beside them, installed in `source` on first use."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        _absent("node and npm aren't installed")
    assert npm is not None
    installed = source / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (source / "package-lock.json").stat().st_mtime:
        done = subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=source, capture_output=True, text=True)
        if done.returncode:
            _absent(f"npm can't install what {source} pins: {done.stderr[-500:]}")
    for name in files:
        shutil.copy(source / name, place)
    (place / "node_modules").symlink_to(source / "node_modules")


def _absent(reason: str) -> None:
    pytest.fail(reason) if os.environ.get("DEPO_NEEDS_NODE") == "1" else pytest.skip(reason)
