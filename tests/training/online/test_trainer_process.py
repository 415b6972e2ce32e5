"""The process that trains: on a real database and real checkpoints."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.trainer_process import TrainerProcess, TrainingError
from tests.training.fake_vllm import record
from tests.training.online.traffic import LEARN, fill


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/records.db")
    made.create()
    yield made
    made.close()


async def test_a_process_that_dies_is_an_error_and_the_next_one_works(
    tmp_path: Path, store: Store, tiny_checkpoint: Path
) -> None:
    fill(store, 120, 1)
    out = tmp_path / "out"
    raw = {"records": {"url": f"sqlite:///{tmp_path}/records.db"}, "refresh": {"learn": LEARN}}
    process = TrainerProcess(learner_settings.parse_settings(raw), tiny_checkpoint, out, False)
    try:
        training = asyncio.create_task(process.refresh())
        while process._process is None:  # noqa: ASYNC110  an attribute of the code under test
            await asyncio.sleep(0.01)
        first = process._process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(TrainingError, match="the training process exited with status -9; see its output above"):
            await training
        trained = await process.refresh()
        assert trained.published == checkpoint.load_manifest(checkpoint.resolve(out)).version
        assert trained.seq == store.count_labels()[1]
        assert process._process is not None
        second = process._process.pid
        again = await process.refresh()
        assert process._process.pid == second  # torch and the embeddings are not loaded again
        assert again.labels == trained.labels
    finally:
        await process.end()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def test_a_process_that_can_not_start_is_an_error_worth_another_try(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("where nothing can be written")
    settings = learner_settings.parse_settings({"records": {"url": f"sqlite:///{tmp_path}/records.db"}})
    with pytest.raises(TrainingError, match="the training process could not be started"):
        await TrainerProcess(settings, tmp_path, out, False).refresh()


async def test_what_would_fail_again_is_a_mistake_of_the_users(
    tmp_path: Path, store: Store, tiny_checkpoint: Path
) -> None:
    store.append([record(1, time.time(), pools=("small", "huge"))])
    (one,) = store.unshadowed(1)
    store.add_labels([Label(one.seq, "huge", "exact", 1.0)])
    settings = learner_settings.parse_settings({"records": {"url": f"sqlite:///{tmp_path}/records.db"}})
    process = TrainerProcess(settings, tiny_checkpoint, tmp_path / "out", False)
    try:
        with pytest.raises(ValueError, match="the records name the pool 'huge'"):
            await process.refresh()
    finally:
        await process.end()
