"""The listening sockets, and what happens when reloads and swaps come together."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.gateway import checkpoint_watcher, config, scoring, server
from depo_gateway.gateway.records import Recorder
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, running, settings

ADMIN_KEY = "sk-depo-admin"


def test_what_the_listener_says_when_an_address_is_taken() -> None:
    with server.bind("127.0.0.1", 0, "listen") as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{port}: Address already in use"):
            server.bind("127.0.0.1", port, "admin")
    with pytest.raises(ValueError, match=r"can't listen on nowhere\.invalid:80"):
        server.bind("nowhere.invalid", 80, "listen")


class Gate:
    """Holds the first load after `close` until `open`."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load = load
        self._closed = False
        self.entered, self.opened = threading.Event(), threading.Event()

    def close(self) -> None:
        self._closed = True

    def load(self, *arguments: Any) -> Any:
        held, self._closed = self._closed, False
        if held:
            self.entered.set()
            assert self.opened.wait(20)
        return self._load(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate(scoring.load_runtime)
    monkeypatch.setattr(scoring, "load_runtime", made.load)
    return made


async def reload(gateway: Running) -> int:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=headers) as answer:
        return answer.status


async def test_of_two_reloads_the_later_file_stays(tiny_checkpoint: Path, tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "gateway.yaml"
    admin = {"port": 0, "key_sha256": config.key_digest(ADMIN_KEY)}
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_checkpoint, admin=admin)
        async with running(raw, path) as gateway:
            gate.close()
            path.write_text(yaml.safe_dump(raw | {"routing": {"threshold": 0.1}}, sort_keys=False))
            first = asyncio.create_task(reload(gateway))
            await asyncio.to_thread(gate.entered.wait, 20)
            path.write_text(yaml.safe_dump(raw | {"routing": {"threshold": 0.2}}, sort_keys=False))
            second = asyncio.create_task(reload(gateway))
            await asyncio.sleep(0.5)
            gate.opened.set()
            assert [await first, await second] == [200, 200]
            assert await gateway.metric("gateway_threshold") == 0.2


async def test_a_reload_that_no_file_can_be_read_for_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    admin = {"port": 0, "key_sha256": config.key_digest(ADMIN_KEY)}
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_checkpoint, admin=admin)
        async with running(raw, path) as gateway:
            path.write_text(yaml.safe_dump(raw | {"estimator": {"path": "x" * 300}}, sort_keys=False))
            assert await reload(gateway) == 422
            assert await gateway.metric("gateway_config_reloads_total", result="refused") == 1
            assert (await gateway.chat("easy")).status == 200


async def test_a_new_checkpoint_does_not_undo_a_reload(
    tiny_checkpoint: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.02)
    close = Recorder.close
    monkeypatch.setattr(Recorder, "close", lambda recorder, seconds=1.0: close(recorder, min(seconds, 1.0)))
    home, path, database = tmp_path / "checkpoints", tmp_path / "gateway.yaml", tmp_path / "records.db"
    version(tiny_checkpoint, home / "1", 9.0)
    checkpoint.publish(home / "1")
    admin = {"port": 0, "key_sha256": config.key_digest(ADMIN_KEY)}
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], home, admin=admin)
        async with running(raw | {"records": {"url": f"sqlite:///{database}"}}, path) as gateway:
            await gateway.chat("easy")
            assert await gateway.settles("gateway_records_total", 1, outcome="written")
            other = sqlite3.connect(database)
            other.execute("BEGIN IMMEDIATE")  # the old section's end takes its time
            await gateway.chat("easy two")
            gate.close()
            second = version(tiny_checkpoint, home / "2", -9.0)
            checkpoint.publish(home / "2")
            await asyncio.to_thread(gate.entered.wait, 20)
            path.write_text(yaml.safe_dump(raw | {"routing": {"threshold": 0.2}}, sort_keys=False))
            reloading = asyncio.create_task(reload(gateway))
            assert await gateway.settles("gateway_threshold", 0.2, 15)
            gate.opened.set()
            assert await reloading == 200
            other.close()
            assert await gateway.metric("gateway_threshold") == 0.2
            assert await gateway.metric("gateway_estimator_info", version=second) == 1
