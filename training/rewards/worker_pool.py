"""Verifiers in worker processes: a batch graded in parallel, each completion within a hard deadline.

A symbolic comparison can run for hours inside one C call, where no exception, signal handler or thread of its own
process reaches it; so the parent kills the worker and starts another. A worker is a fresh interpreter (not a fork:
torch and CUDA live in the parent; not multiprocessing's spawn: that would import the user's training script again) and
imports the verifier's module, which for the built-in ones has no torch. Any thread may grade, several at once.
"""

import ctypes
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from depo_gateway.training.rewards.import_path import import_callable, one_line

START_SECONDS = 120.0  # to import the verifier's module, on a slow disk at that
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MOST_WORKERS = 16


class RewardError(ValueError):
    """A reward function of the user's did not give rewards; the message is one line for the user."""

    index = 0  # of the completion in its batch, where one did it


class Worker:
    """One worker process and the line to it. Used by one thread at a time; `kill` may come from any."""

    def __init__(self, path: str) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from depo_gateway.training.rewards.worker_pool import work; "
            f"work({theirs.fileno()}, {os.getpid()}, {path!r})"
        )
        # Its own process group: Ctrl-C is the parent's to answer, and kill takes along what a verifier started.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints is no result of this program's
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, completion: str, reference: str) -> None:
        self._connection.send_bytes(json.dumps([completion, reference]).encode())

    def answer(self, deadline_s: float) -> Sequence[Any]:
        """What the worker says next. TimeoutError after the deadline; EOFError or OSError where it died."""
        if not self._connection.poll(deadline_s):
            raise TimeoutError
        said: Sequence[Any] = json.loads(self._connection.recv_bytes())
        return said

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has gone
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self._process.wait()
        self._connection.close()


class Workers:
    """Grades completions by the verifier at an import path, in at most `size` processes that start when needed.

    Args:
        path: `module:function` or `file.py:function`, a function (completion, reference) -> reward. None: no reward.
        deadline_s: seconds for one completion.
        size: processes; by default this rank's share of the CPUs, at most 16.
        strict: what the function raises, or returns that is no number, is a RewardError. Otherwise it is a failure.
    """

    def __init__(self, path: str, deadline_s: float = 5.0, size: int | None = None, strict: bool = True) -> None:
        self._path, self._deadline_s, self._strict = path, deadline_s, strict
        size = size or default_size()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._counts = dict.fromkeys(("graded", "timeouts", "failures"), 0)
        self._live: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # last in, first out: warm ones first
        for _ in range(size):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="verify")
        self._finalizer = weakref.finalize(self, _end_all, self._live, self._owner)

    def submit(self, completion: str, reference: str) -> Future[float | None]:
        """The reward to come; None where there is none: past the deadline, the worker died, the function gave None.

        The future raises RewardError where the function raised (if `strict`) or a worker cannot import it.
        """
        if os.getpid() != self._owner:
            raise RuntimeError("verifier workers belong to the process that made them, not to a fork of it")
        return self._threads.submit(self._grade, completion, reference)

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[float | None]:
        """The rewards of (completion, reference) pairs, in their order. As `submit`."""
        futures = [self.submit(completion, reference) for completion, reference in pairs]
        index = 0
        try:
            for index, future in enumerate(futures):  # noqa: B007  for the error
                future.result()
        except RewardError as error:
            error.index = index
            raise
        finally:
            for future in futures:  # after an error or Ctrl-C: what has not begun never does
                future.cancel()
        return [future.result() for future in futures]

    def counts(self) -> dict[str, int]:
        """Completions since the last call: graded, timeouts, failures (no reward for another reason)."""
        with self._lock:
            counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts

    def close(self) -> None:
        """Ends all workers; what is being graded gets no reward."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        self._finalizer()

    def _grade(self, completion: str, reference: str) -> float | None:
        worker = self._idle.get()  # there are as many as threads: never waits
        try:
            if worker is not None and not worker.runs:  # died while idle, which is not this completion's doing
                self._end(worker)
                worker = None
            if worker is None:
                worker = self._start()
            worker.ask(completion, reference)
            kind, *said = worker.answer(self._deadline_s)
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            if worker is not None:
                self._end(worker)
                worker = None
            self._count("timeouts" if isinstance(error, TimeoutError) else "failures")
            return None
        finally:
            self._idle.put(worker)
        if kind == "raised" and self._strict:
            words, trace = said
            raise RewardError(words) from RuntimeError(f"in the worker:\n{trace}")
        reward: float | None = said[0] if kind == "reward" else None
        self._count("failures" if reward is None else "graded")
        return reward

    def _start(self) -> Worker:
        with self._lock:
            if self._closed:
                raise EOFError
            try:
                worker = Worker(self._path)
            except OSError as error:  # no more processes, memory or file descriptors
                raise RewardError(f"does not start in a worker: {error}") from error
            self._live.add(worker)
        try:
            kind, *said = worker.answer(START_SECONDS)
        except (EOFError, OSError):
            kind, *said = "broken", "its process ended or hung while it imported that"
        if kind != "ready":
            self._end(worker)
            if self._closed:
                raise EOFError
            raise RewardError(f"does not start in a worker: {said[0]}")
        return worker

    def _end(self, worker: Worker) -> None:
        with self._lock:
            self._live.discard(worker)
        worker.end()

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def default_size() -> int:
    """This rank's share of the CPUs it may use, 1 to 16."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's: processes on this machine
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


def as_reward(value: object) -> float | None:
    """A reward function's value as a finite float; None for None and NaN. RewardError for anything else."""
    if value is None:
        return None
    try:
        reward = math.inf if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        reward = math.inf
    if math.isinf(reward):
        raise RewardError(f"returned {repr(value)[:60]}, not a finite number or None")
    return None if math.isnan(reward) else reward


def work(descriptor: int, parent: int, path: str) -> None:
    """A worker's whole life: it says ready, then answers each [completion, reference] until the line closes."""
    end_with(parent)
    connection = Connection(descriptor)

    def say(*message: object) -> None:
        connection.send_bytes(json.dumps(message).encode())

    try:
        function = import_callable(path)
    except ValueError as error:
        say("broken", str(error))
        return
    say("ready")
    with suppress(EOFError, ConnectionError):
        while True:
            completion, reference = json.loads(connection.recv_bytes())
            answer: tuple[object, ...]
            try:
                answer = ("reward", as_reward(function(completion, reference)))
            except RewardError as error:
                answer = ("raised", str(error), "")
            except Exception as error:  # noqa: BLE001  boundary: the parent tells the user
                answer = ("raised", f"raised {one_line(error)}", traceback.format_exc(limit=-20)[-4000:])
            say(*answer)


def end_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends, however hard it computes; as does the kernel
    that runs out of memory, before the parent: that one trains.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _end_all(workers: set[Worker], owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner has the objects, not the processes
        for worker in workers:
            worker.end()
        workers.clear()
