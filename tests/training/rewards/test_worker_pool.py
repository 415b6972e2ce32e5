"""Workers with real processes: verifiers that hang, die, compute without end, start others; parents that are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from depo_gateway.training.rewards.verdicts import FAILURE, GRADED, TIMEOUT, RewardVerdict
from depo_gateway.training.rewards.worker_pool import RewardError, Workers, as_reward, default_size

ROOT = Path(__file__).parents[3]
VERIFIERS = r"""
import ctypes, os, pathlib, subprocess, signal, sys, time

def play(completion, reference):
    what, _, rest = completion.partition(" ")
    if what == "sleep": time.sleep(float(rest))
    if what == "compute": 7 ** 10 ** 8  # one instruction: no signal handler or thread runs meanwhile
    if what == "leave": os._exit(3)
    if what == "exit": sys.exit(3)
    if what == "killed": os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does that runs out of memory
    if what == "segfault": ctypes.string_at(0)
    if what == "raise": raise ValueError("no\nsuch")
    if what == "allocate": bytearray(1 << 60)
    if what == "none": return None
    if what == "nan": return float("nan")
    if what == "text": return "1.0"
    if what == "pid": return os.getpid()
    if what == "torch": return "torch" in sys.modules
    if what == "child":
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path(rest).write_text(str(child.pid))
        child.wait()
    return float(reference)
"""
SOON = 30.0  # seconds: far above what anything here needs


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "played.py"
    file.write_text(VERIFIERS)
    return f"{file}:play"


@pytest.fixture
def workers(path: str) -> Iterator[Workers]:
    with closing(Workers(path, deadline_s=1.0, size=2)) as made:
        yield made


def rewards(verdicts: list[RewardVerdict]) -> list[float | None]:
    return [verdict.reward for verdict in verdicts]


def outcomes(verdicts: list[RewardVerdict]) -> list[str]:
    return [verdict.outcome for verdict in verdicts]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: list[int]) -> bool:
    until = time.monotonic() + SOON
    while any(runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(runs(pid) for pid in pids)


def pids_of(workers: Workers) -> list[int]:
    return [worker._process.pid for worker in workers._live]


def test_a_batch_keeps_its_order_over_several_workers(workers: Workers) -> None:
    pairs = [(f"sleep {0.02 * (i % 7 == 0)}", str(i)) for i in range(200)]
    assert workers.grade(pairs) == [RewardVerdict(float(i), GRADED) for i in range(200)]
    assert len(pids_of(workers)) == 2
    assert workers.grade([]) == []


@pytest.mark.parametrize("forever", ["sleep 600", "compute"])
def test_a_completion_past_its_deadline_is_a_timeout_and_the_others_continue(workers: Workers, forever: str) -> None:
    before = rewards(workers.grade([("pid", "")] * 4))
    begun = time.monotonic()
    batch = [("", "1"), (forever, "1"), ("", "2"), (forever, "1"), (forever, "1"), ("", "3")]
    found = workers.grade(batch)
    assert rewards(found) == [1, None, 2, None, None, 3]
    assert outcomes(found) == [GRADED, TIMEOUT, GRADED, TIMEOUT, TIMEOUT, GRADED]
    assert time.monotonic() - begun < SOON
    assert all_end([int(pid) for pid in before if pid])
    assert rewards(workers.grade([("", "4")] * 3)) == [4] * 3


@pytest.mark.parametrize("end", ["leave", "exit", "killed", "segfault"])
def test_a_worker_that_dies_is_a_failure_and_the_others_continue(workers: Workers, end: str) -> None:
    found = workers.grade([("", "1"), (end, "1"), (end, "1"), ("", "2")])
    assert rewards(found) == [1, None, None, 2]
    assert outcomes(found) == [GRADED, FAILURE, FAILURE, GRADED]


def test_a_worker_that_died_between_batches_costs_no_completion(workers: Workers) -> None:
    workers.grade([("", "1")] * 4)
    for pid in pids_of(workers):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + SOON
    while any(worker.runs for worker in workers._live) and time.monotonic() < until:
        time.sleep(0.01)
    assert rewards(workers.grade([("", "1")] * 4)) == [1] * 4


def test_none_and_nan_are_no_reward(workers: Workers) -> None:
    found = workers.grade([("none", ""), ("nan", ""), ("", "0")])
    assert rewards(found) == [None, None, 0]
    assert outcomes(found) == [FAILURE, FAILURE, GRADED]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("raise", "^raised ValueError: no such$"),
        ("allocate", "^raised MemoryError:$"),
        ("text", "^returned '1.0', not a finite number or None$"),
    ],
)
def test_an_exception_of_the_function_is_an_error_if_strict(path: str, bad: str, words: str) -> None:
    with closing(Workers(path, size=1)) as strict:
        with pytest.raises(RewardError, match=words) as caught:
            strict.grade([("", "1"), ("", "1"), (bad, "1"), ("", "1")])
        assert caught.value.index == 2
        assert bad == "text" or "in play" in str(caught.value.__cause__)
        assert rewards(strict.grade([("", "1")])) == [1]
    with closing(Workers(path, size=1, strict=False)) as lenient:
        assert lenient.grade([(bad, "1"), ("", "1")]) == [RewardVerdict(None, FAILURE), RewardVerdict(1.0, GRADED)]


def test_a_worker_that_cannot_import_the_function_is_an_error(tmp_path: Path) -> None:
    with closing(Workers(f"{tmp_path}/none.py:play", size=1)) as missing:
        with pytest.raises(RewardError, match=r"cannot start in a worker: cannot import .*none\.py"):
            missing.grade([("", "")] * 3)
    (tmp_path / "dies.py").write_text("import os; os._exit(1)")
    with closing(Workers(f"{tmp_path}/dies.py:play", size=2)) as dying:
        with pytest.raises(RewardError, match="cannot start in a worker: its process ended or hung"):
            dying.grade([("", "")] * 3)


def test_a_process_that_cannot_be_started_is_an_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with closing(Workers(path, size=2)) as without:
        with pytest.raises(RewardError, match=r"cannot start in a worker: \[Errno 2\] No such file"):
            without.grade([("", "")] * 3)


def test_any_thread_may_grade_and_several_at_once(workers: Workers) -> None:
    results: dict[int, list[float | None]] = {}

    def grade(number: int) -> None:
        results[number] = rewards(workers.grade([("sleep 0.01", str(number))] * 10))

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert results == {number: [number] * 10 for number in range(4)}


def test_close_ends_what_is_being_graded(path: str) -> None:
    workers = Workers(path, deadline_s=600, size=2)
    futures = [workers.submit("sleep 600", "1") for _ in range(5)]
    until = time.monotonic() + SOON
    while len(pids_of(workers)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    pids = pids_of(workers)
    workers.close()
    assert all_end(pids)
    assert all(future.cancelled() or future.result().outcome == FAILURE for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        workers.submit("", "1")


def test_an_object_that_is_dropped_leaves_nothing(path: str) -> None:
    workers = Workers(path, size=2)
    workers.grade([("", "1")] * 4)
    pids = pids_of(workers)
    del workers
    assert all_end(pids)


def test_what_a_verifier_starts_ends_with_it(workers: Workers, tmp_path: Path) -> None:
    assert outcomes(workers.grade([(f"child {tmp_path / 'pid'}", "1")])) == [TIMEOUT]
    assert all_end([int((tmp_path / "pid").read_text())])


def test_a_fork_does_not_use_or_end_its_parents_workers(workers: Workers) -> None:
    workers.grade([("", "1")] * 4)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            workers.submit("", "1")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        workers._finalizer()
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert b"not to a fork of it" in os.read(reader, 1000)
    os.close(reader)
    assert all(runs(pid) for pid in pids_of(workers))
    assert rewards(workers.grade([("", "1")] * 4)) == [1] * 4


def parent(path: str, then: str) -> subprocess.Popen[str]:
    """A script as users write them, without a __main__ guard, that prints its workers' pids and does `then`."""
    script = f"""
from depo_gateway.training.rewards.worker_pool import Workers
workers = Workers({path!r}, deadline_s=600, size=2)
workers.grade([("", "1")] * 20)
print(*[worker._process.pid for worker in workers._live], flush=True)
{then}
"""
    file = Path(path.rpartition(":")[0]).with_name("script.py")
    file.write_text(script)
    return subprocess.Popen(
        [sys.executable, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("busy", ["sleep 600", "compute"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_idle_or_busy(path: str, end: signal.Signals, busy: str) -> None:
    with parent(
        path, f"workers.submit({busy!r}, '1'); print('now', flush=True); import time; time.sleep(600)"
    ) as running:
        assert running.stdout is not None
        pids = [int(pid) for pid in running.stdout.readline().split()]
        assert running.stdout.readline() == "now\n"
        assert 1 <= len(pids) <= 2
        running.send_signal(end)
        if end is signal.SIGINT:  # Python waits for its threads; a second Ctrl-C is as impatient users do
            time.sleep(0.5)
            running.kill()
        running.communicate(timeout=SOON)
    assert all_end(pids)


def test_ctrl_c_while_grading_ends_the_batch(path: str) -> None:
    program = """
workers._deadline_s = 2.0
try:
    print('now', flush=True)
    workers.grade([('sleep 600', '1')] * 500)
except KeyboardInterrupt:
    print('interrupted', flush=True)
"""
    with parent(path, program) as running:
        assert running.stdout is not None
        pids = [int(pid) for pid in running.stdout.readline().split()]
        running.stdout.readline()
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        try:
            out, err = running.communicate(timeout=SOON)  # not 500 / 2 workers * 2 s
        finally:
            running.kill()
    assert (out, err, running.returncode) == ("interrupted\n", "", 0)
    assert all_end(pids)


def test_a_program_that_just_ends_leaves_no_worker_and_no_output(path: str) -> None:
    with parent(path, "") as running:
        out, err = running.communicate(timeout=SOON)
    assert (err, running.returncode, out.count("\n")) == ("", 0, 1)  # once: the script is not run again in workers
    assert all_end([int(pid) for pid in out.split()])


def test_a_worker_is_light_and_the_first_to_go_when_memory_runs_out(workers: Workers) -> None:
    assert rewards(workers.grade([("torch", "")])) == [0]
    (pid,) = pids_of(workers)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def test_ranks_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_size() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_size() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_size() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    assert default_size() == 16


def test_rewards_are_finite_numbers_or_none() -> None:
    import numpy as np
    import torch

    assert [as_reward(value) for value in (1, True, 0.5, np.float32(0.5), torch.tensor(0.5))] == [1, 1, 0.5, 0.5, 0.5]
    assert [as_reward(value) for value in (None, float("nan"), np.float64("nan"))] == [None] * 3
    for value in ("1", b"1", [1.0], float("inf"), torch.ones(2), object(), 10**400):
        with pytest.raises(RewardError, match="not a finite number or None"):
            as_reward(value)
