"""Runs verifiers in worker processes: a batch is graded in parallel, each completion within a hard deadline.

A symbolic comparison can run for hours inside one C call, which no exception, signal handler or thread of its own
process can interrupt; therefore the parent kills the worker and starts another. A worker is a new interpreter. It is
not a fork, because the parent has torch and CUDA, and not multiprocessing's spawn, which would import the user's
training script again. It imports only the verifier's module; the built-in ones need no torch. Several threads may grade
at the same time.
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
from depo_gateway.training.rewards.verdicts import FAILURE, GRADED, TIMEOUT, RewardVerdict

START_SECONDS = 120.0  # to import the verifier's module, even from a slow disk
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MOST_WORKERS = 16


class RewardError(ValueError):
    """The user's reward function failed or returned invalid rewards; the message is one line for the user."""

    index = 0  # of the completion that caused it, in its batch


class Worker:
    """One worker process and its connection. Used by one thread at a time; any thread may call `kill`."""

    def __init__(self, path: str) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from depo_gateway.training.rewards.worker_pool import run_worker; "
            f"run_worker({theirs.fileno()}, {os.getpid()}, {path!r})"
        )
        # Its own process group: Ctrl-C reaches only the parent, and kill includes what a verifier started.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a verifier's prints must not mix with this program's output
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, completion: str, reference: str) -> None:
        self._connection.send_bytes(json.dumps([completion, reference]).encode())

    def answer(self, deadline_s: float) -> Sequence[Any]:
        """The worker's next message. TimeoutError after the deadline; EOFError or OSError if it died."""
        if not self._connection.poll(deadline_s):
            raise TimeoutError
        message: Sequence[Any] = json.loads(self._connection.recv_bytes())
        return message

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self._process.wait()
        self._connection.close()


class Workers:
    """Grades completions by the verifier at an import path, in at most `size` processes, started when needed.

    Args:
        path: `module:function` or `file.py:function`, a function (completion, reference) that returns a reward,
            None (no reward) or a RewardVerdict.
        deadline_s: seconds per completion.
        size: processes; by default this rank's share of the CPUs, at most 16.
        strict: an exception or a return value that is no number is a RewardError; otherwise it counts as a failure.
    """

    def __init__(self, path: str, deadline_s: float = 5.0, size: int | None = None, strict: bool = True) -> None:
        self._path, self._deadline_s, self._strict = path, deadline_s, strict
        size = size or default_size()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._live: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # last in, first out: warm ones first
        for _ in range(size):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="verify")
        self._finalizer = weakref.finalize(self, _end_all, self._live, self._owner)

    def submit(self, completion: str, reference: str) -> Future[RewardVerdict]:
        """The future verdict: a failure if the worker died or the function returned None.

        The future raises RewardError if the function raised (with `strict`) or a worker cannot import it.
        """
        if os.getpid() != self._owner:
            raise RuntimeError("verifier workers belong to the process that created them, not to a fork of it")
        return self._threads.submit(self._grade, completion, reference)

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[RewardVerdict]:
        """The verdicts on (completion, reference) pairs, in their order; errors as for `submit`."""
        futures = [self.submit(completion, reference) for completion, reference in pairs]
        index = 0
        try:
            for index, future in enumerate(futures):  # noqa: B007  for the error
                future.result()
        except RewardError as error:
            error.index = index
            raise
        finally:
            for future in futures:  # after an error or Ctrl-C: drop what has not begun
                future.cancel()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends all workers; completions being graded get no reward."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        self._finalizer()

    def _grade(self, completion: str, reference: str) -> RewardVerdict:
        worker = self._idle.get()  # never blocks: there are as many as threads
        try:
            if worker is not None and not worker.runs:  # it died while idle, not because of this completion
                self._end(worker)
                worker = None
            if worker is None:
                worker = self._start()
            worker.ask(completion, reference)
            kind, *content = worker.answer(self._deadline_s)
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            if worker is not None:
                self._end(worker)
                worker = None
            return RewardVerdict(None, TIMEOUT if isinstance(error, TimeoutError) else FAILURE)
        finally:
            self._idle.put(worker)
        if kind == "raised" and self._strict:
            message, trace = content
            raise RewardError(message) from RuntimeError(f"in the worker:\n{trace}")
        return RewardVerdict(*content) if kind == "verdict" else RewardVerdict(None, FAILURE)

    def _start(self) -> Worker:
        with self._lock:
            if self._closed:
                raise EOFError
            try:
                worker = Worker(self._path)
            except OSError as error:  # out of processes, memory or file descriptors
                raise RewardError(f"cannot start in a worker: {error}") from error
            self._live.add(worker)
        try:
            kind, *content = worker.answer(START_SECONDS)
        except (EOFError, OSError):
            kind, *content = "broken", "its process ended or hung during the import"
        if kind != "ready":
            self._end(worker)
            if self._closed:
                raise EOFError
            raise RewardError(f"cannot start in a worker: {content[0]}")
        return worker

    def _end(self, worker: Worker) -> None:
        with self._lock:
            self._live.discard(worker)
        worker.end()


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


def _as_verdict(value: object) -> RewardVerdict:
    if isinstance(value, RewardVerdict):
        return value
    reward = as_reward(value)
    return RewardVerdict(reward, FAILURE if reward is None else GRADED)


def run_worker(descriptor: int, parent: int, path: str) -> None:
    """The main function of a worker: sends "ready", then answers each [completion, reference] until disconnected."""
    exit_with_parent(parent)
    connection = Connection(descriptor)

    def send(*message: object) -> None:
        connection.send_bytes(json.dumps(message).encode())

    try:
        function = import_callable(path)
    except ValueError as error:
        send("broken", str(error))
        return
    send("ready")
    with suppress(EOFError, ConnectionError):
        while True:
            completion, reference = json.loads(connection.recv_bytes())
            answer: tuple[object, ...]
            try:
                verdict = _as_verdict(function(completion, reference))
                answer = ("verdict", verdict.reward, verdict.outcome)
            except RewardError as error:
                answer = ("raised", str(error), "")
            except Exception as error:  # noqa: BLE001  boundary: the parent tells the user
                answer = ("raised", f"raised {one_line(error)}", traceback.format_exc(limit=-20)[-4000:])
            send(*answer)


def exit_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the thread that started it ends, even inside a C call, and makes it the
    first candidate when memory runs out, because the parent is the trainer.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


def _end_all(workers: set[Worker], owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner has the objects but not the processes
        for worker in workers:
            worker.end()
        workers.clear()
