"""The learner's side of the process that trains (refresh_worker.py): start it, ask it, outlive it."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depo_gateway.estimator.configuration import yaml_tree as tree
from depo_gateway.training.online import checkpoint_retention
from depo_gateway.training.online.settings import LearnerSettings

LONGEST_SECONDS = 6 * 3600.0  # of one training; then it hangs
LINE_BYTES = 1 << 24  # of one result
END_SECONDS = 10.0  # for a process that has closed its output to be gone, and its exit status known
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from depo_gateway.training.online.trainer_main import work; work({parent})"
)


class TrainingFailed(Exception):
    """No verdict: the process died or hung, or the database or the disk failed it. The message is one line."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One refresh's end."""

    seq: int  # the highest label that it could read
    published: str | None  # the new version
    reasons: tuple[str, ...]
    figures: Mapping[str, Any]
    labels: int  # records that it learned from
    notes: tuple[str, ...]  # what was not believed
    standing: Mapping[str, Any] | None


class RefreshProcess:
    """One process for all refreshes, started when first asked; after its death, or a kill, another.

    Whoever has one holds `out` alone: what an earlier process left half-written there is removed.
    """

    def __init__(self, settings: LearnerSettings, base: Path, out: Path, cold: bool) -> None:
        wish = {"settings": tree.plain(settings), "base": str(base), "out": str(out), "cold": cold}
        self._wish, self._out = json.dumps(wish).encode() + b"\n", out
        self._process: asyncio.subprocess.Process | None = None

    async def refresh(self) -> Trained:
        """Trains once.

        Raises:
            TrainingFailed: see there; worth another try later.
            ValueError: a mistake of the user's that another try would repeat.
        """
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                try:
                    process = await self._started()
                except OSError as error:  # the disk is full or read-only, or there are no processes to be had
                    raise TrainingFailed(f"no training process starts: {error}") from None
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(b"refresh\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            await self.end()
            raise TrainingFailed(f"training took over {LONGEST_SECONDS / 3600:g} hours and was ended") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            code = await self._ended()
            raise TrainingFailed(f"the training process ended with {code}; its words stand above")
        said = json.loads(line)
        if "failed" in said:
            raise (ValueError if said["failed"] == "mistake" else TrainingFailed)(said["words"])
        lists = {name: tuple(said[name]) for name in ("reasons", "notes")}
        return Trained(**said | lists)

    async def end(self) -> int | None:
        """Kills the process, if there is one, and waits for it. What it leaves half-written has no name."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            process.kill()
        return await process.wait()

    async def _ended(self) -> int | None:
        """How a process that says nothing more ended; asyncio loses that of one which is killed as it dies."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await self._process.wait()
        return await self.end()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            checkpoint_retention.clear(self._out)
            temporary = (
                self._out / checkpoint_retention.TEMPORARY
            )  # what libraries put aside goes there: the root may be read-only
            temporary.mkdir(parents=True)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _PROGRAM.format(path=sys.path, parent=os.getpid()),
                stdin=asyncio.subprocess.PIPE,  # the database's password goes in there, not onto the command line
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                env={**os.environ, "TMPDIR": str(temporary)},
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._wish)
        return self._process
