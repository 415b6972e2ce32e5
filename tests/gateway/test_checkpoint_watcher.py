"""What is looked for beside the requests."""

import asyncio
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator import checkpoint, held_publish
from depo_gateway.estimator.held_publish import HeldPublish
from depo_gateway.gateway import checkpoint_watcher, scoring
from tests.estimator.poisoned import KINDS, poisoned
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, StartGateway


async def test_what_was_refused_is_loaded_again_only_when_it_changes(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.02)
    load, loads = scoring.load_runtime, list[str]()

    def counted(path: str, *arguments: Any) -> Any:
        loads.append(path)
        return load(path, *arguments)

    monkeypatch.setattr(scoring, "load_runtime", counted)
    home = tmp_path / "checkpoints"
    version(tiny_checkpoint, home / "1", 9.0)
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        second = version(tiny_checkpoint, tmp_path / "2", -9.0)
        shutil.copytree(tmp_path / "2", home / "2")
        whole = (home / "2" / checkpoint.WEIGHTS).read_bytes()
        (home / "2" / checkpoint.WEIGHTS).write_bytes(b"damaged")
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_estimator_loads_total", 1, 15, result="refused")
        await asyncio.sleep(0.4)
        assert len(loads) == 2
        (home / "2" / checkpoint.WEIGHTS).write_bytes(whole)  # mended: the same manifest
        assert await gateway.settles("gateway_estimator_info", 1, 15, version=second)


@pytest.mark.parametrize("kind", ["weights NaN", "encoder infinite", "slope", "curve"])
async def test_one_with_nan_or_infinite_numbers_is_refused_and_the_old_one_stays(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.02)
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 0.0)
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        poisoned(home / "1", home / "2", *KINDS[kind][:2])
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_estimator_loads_total", 1, 15, result="refused")
        assert await gateway.metric("gateway_estimator_info", version=first) == 1
        answer = await gateway.chat("prove the hard theorem")
        assert answer.headers["x-depo-pool"] == "large"


async def status(gateway: Running) -> dict[str, Any]:
    async with gateway.session.get(f"{gateway.admin}/admin/status") as answer:
        found: dict[str, Any] = (await answer.json())["publish"]
    return found


async def test_what_a_publish_changed_and_one_that_is_held_are_shown(
    start: StartGateway,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.02)
    home = tmp_path / "checkpoints"
    version(tiny_checkpoint, home / "1", 0.0)
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        assert await status(gateway) == {"share_change": None, "cost_change": None, "held": None}
        assert math.isnan(await gateway.metric("gateway_publish_share_change"))
        change = {"publish_change": {"share_change": 0.0123, "cost_change": -0.02}}
        second = version(tiny_checkpoint, home / "2", 1.0, metrics=change)
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_estimator_info", 1, 15, version=second)
        assert await status(gateway) == {"share_change": 0.0123, "cost_change": -0.02, "held": None}
        assert await gateway.metric("gateway_publish_share_change") == 0.0123
        assert await gateway.metric("gateway_publish_cost_change") == -0.02
        held_publish.write_held(home, HeldPublish("3", "v3", second, 1.0, "3 is held back: it costs more", 0.5, None))
        with caplog.at_level("WARNING"):
            for _ in range(200):
                if (await status(gateway))["held"] is not None:
                    break
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
        assert (await status(gateway))["held"] == "3 is held back: it costs more"
        assert [entry.getMessage() for entry in caplog.records].count("3 is held back: it costs more") == 1
        held_publish.remove_held(home)
        for _ in range(200):
            if (await status(gateway))["held"] is None:
                break
            await asyncio.sleep(0.02)
        assert (await status(gateway))["held"] is None
