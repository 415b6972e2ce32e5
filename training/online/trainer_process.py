"""The daemon's side of the process that trains (trainer_main.py): starts it and requests refreshes."""

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

LONGEST_TRAINING_SECONDS = 6 * 3600.0  # after which a refresh counts as hung
RESULT_BYTES = 1 << 24  # of one result line, at most
EXIT_SECONDS = 10.0  # for a process that has closed its output to exit
_PROGRAM = (
    "import sys; sys.path[:] = {path!r};"
    " from depo_gateway.training.online.trainer_main import serve_refreshes; serve_refreshes({parent})"
)


class TrainingError(Exception):
    """A refresh without a verdict: the process died or hung, or database or disk failed. The message is one line."""


@dataclass(frozen=True, slots=True)
class TrainerResult:
    """The result of one refresh, as the training process reports it."""

    seq: int  # the highest label that it read
    published: str | None  # the new version; None: refused or held back
    reasons: tuple[str, ...]
    figures: Mapping[str, Any]
    labels: int  # records that it learned from
    notes: tuple[str, ...]  # what was not used
    change: str | None  # what the publish changes for live traffic; None: unknown, or there is no candidate
    held: str | None  # why the checkpoint is held back; None: it is not
    standing: Mapping[str, Any] | None


class TrainerProcess:
    """A process that runs all refreshes, started by the first and started again after it died.

    The caller must hold the lock on `out`: half-written files of an earlier process there are removed.
    """

    def __init__(self, settings: LearnerSettings, base: Path, out: Path, cold: bool) -> None:
        request = {"settings": tree.plain(settings), "base": str(base), "out": str(out), "cold": cold}
        self._request, self._out = json.dumps(request).encode() + b"\n", out
        self._process: asyncio.subprocess.Process | None = None

    async def refresh(self) -> TrainerResult:
        """Runs one refresh.

        Raises:
            TrainingError: it failed, and may succeed later.
            ValueError: a mistake of the user, with which it would fail again.
        """
        try:
            async with asyncio.timeout(LONGEST_TRAINING_SECONDS):
                try:
                    process = await self._start()
                except OSError as error:  # the disk is full or read-only, or the limit of processes is reached
                    raise TrainingError(f"the training process could not be started: {error}") from None
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(b"refresh\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            await self.end()
            raise TrainingError(
                f"training took over {LONGEST_TRAINING_SECONDS / 3600:g} hours and was killed"
            ) from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            status = await self._exit_status()
            raise TrainingError(f"the training process exited with status {status}; see its output above")
        result = json.loads(line)
        if "failed" in result:
            raise (ValueError if result["failed"] == "mistake" else TrainingError)(result["message"])
        lists = {name: tuple(result[name]) for name in ("reasons", "notes")}
        return TrainerResult(**result | lists)

    async def end(self) -> int | None:
        """Kills the process, if there is one, and waits for it. Half-written files have temporary names."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            process.kill()
        return await process.wait()

    async def _exit_status(self) -> int | None:
        """Exit status of a process that closed its output. Killing it before it exits would lose that."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await self._process.wait()
        return await self.end()

    async def _start(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            checkpoint_retention.remove_leftovers(self._out)
            temporary = (
                self._out / checkpoint_retention.TEMPORARY
            )  # for libraries: the root file system may be read-only
            temporary.mkdir(parents=True)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _PROGRAM.format(path=sys.path, parent=os.getpid()),
                stdin=asyncio.subprocess.PIPE,  # the database's password goes in there, not onto the command line
                stdout=asyncio.subprocess.PIPE,
                limit=RESULT_BYTES,
                env={**os.environ, "TMPDIR": str(temporary)},
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._request)
        return self._process
