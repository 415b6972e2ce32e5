"""The end of the process: running requests finish, late ones get an error, and the exit code says which."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import StartGateway, running, settings
from tests.gateway.wire import chat, connect, request


@dataclass
class Started:
    """`python -m gateway serve` as a process of its own."""

    process: asyncio.subprocess.Process
    url: str

    async def exit(self, seconds: float = 15.0) -> tuple[int, str]:
        """Exit status and what it said on stderr since it was ready."""
        assert self.process.stderr is not None
        async with asyncio.timeout(seconds):
            said = (await self.process.stderr.read()).decode()
            return await self.process.wait(), said


async def command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "depo_gateway.gateway",
        *arguments,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, raw: dict[str, Any]) -> AsyncIterator[Started]:
    place = tmp_path / "gateway.yaml"
    place.write_text(yaml.safe_dump(raw, sort_keys=False))
    process = await command("serve", "--config", str(place))
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while "serving http" not in (line := (await process.stderr.readline()).decode()):
                assert line, "it ended at once"
        yield Started(process, line.split()[1].removesuffix(",").removesuffix("/v1"))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_50_open_streams_finish(tmp_path: Path, tiny_checkpoint: Path) -> None:
    script = Script(events=30, between_s=0.1)
    async with FakeVllm(script=script) as small, FakeVllm(script=script) as large:
        raw = settings([small], [large], tiny_checkpoint)
        async with serving(tmp_path, raw) as started, aiohttp.ClientSession() as session:

            async def stream(number: int) -> tuple[int, bytes]:
                body = chat("easy", ("auto", "small", "large")[number % 3], stream=True)
                async with session.post(f"{started.url}/v1/chat/completions", json=body) as answer:
                    return answer.status, await answer.read()

            streams = [asyncio.create_task(stream(number)) for number in range(50)]
            assert await small.wait_for(lambda: len(small.seen) + len(large.seen) == 50, 30)
            async with session.get(f"{started.url}/readyz") as answer:
                assert answer.status == 200
            started.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            async with session.get(f"{started.url}/readyz") as answer:  # still answered, and now with a no
                assert (answer.status, (await answer.json())["reasons"][0][:8]) == (503, "draining")
            async with session.get(f"{started.url}/livez") as answer:
                assert answer.status == 200
            late = await session.post(f"{started.url}/v1/chat/completions", json=chat())
            assert (late.status, late.headers["connection"]) == (200, "close")
            results = await asyncio.gather(*streams)
            assert {status for status, _ in results} == {200}
            assert all(body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body for _, body in results)
            code, said = await started.exit()
            assert code == 0, said
            assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_gateway_ends_at_once(tmp_path: Path, tiny_checkpoint: Path, number: signal.Signals) -> None:
    async with FakeVllm() as one, serving(tmp_path, settings([one], [one], tiny_checkpoint)) as started:
        async with connect(started.url) as wire:  # an idle kept connection does not hold it up
            await wire.send(request())
            assert (await wire.answer()).status == 200
            asked = time.monotonic()
            started.process.send_signal(number)
            code, said = await started.exit()
            assert (code, "Traceback" in said) == (0, False)
            assert time.monotonic() - asked < 5


async def test_a_second_signal_does_not_wait(tmp_path: Path, tiny_checkpoint: Path) -> None:
    async with FakeVllm(script=Script(before_head_s=30)) as one:
        async with serving(tmp_path, settings([one], [one], tiny_checkpoint)) as started:
            async with connect(started.url) as wire:
                await wire.send(request())
                assert await one.wait_for(lambda: bool(one.seen))
                started.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                assert started.process.returncode is None
                started.process.send_signal(signal.SIGTERM)
                assert (await started.exit(5))[0] != 0


async def test_a_port_in_use_is_the_users_mistake(tmp_path: Path, tiny_checkpoint: Path) -> None:
    async with FakeVllm() as one:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            for section in ("listen", "admin"):
                raw = {**settings([one], [one], tiny_checkpoint), section: {"port": port}}
                (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
                process = await command("serve", "--config", str(tmp_path / "gateway.yaml"))
                _, said = await process.communicate()
                assert process.returncode == 2
                assert said.decode().splitlines() == [
                    f"depo-gateway: can't listen on 127.0.0.1:{port}: Address already in use; "
                    f"choose another address for {section} or free this one"
                ]


async def test_streams_that_outlast_drain_s_get_an_error(start: StartGateway) -> None:
    script = Script(events=1000, between_s=0.1)
    async with FakeVllm(script=script) as one, start([one], [one], timeouts={"drain_s": 0.5}) as gateway:
        streams = [asyncio.create_task(gateway.chat(stream=True)) for _ in range(5)]
        assert await one.wait_for(lambda: len(one.seen) == 5)
        answers = await asyncio.gather(*streams)
        one.script = Script(before_head_s=30)
        silent = asyncio.create_task(gateway.chat())
        assert await one.wait_for(lambda: len(one.seen) == 6)
        asked = time.monotonic()
        gateway.stop.set()
        for answer in answers:
            body = await answer.read()
            *_, last = [event for event in body.split(b"\n\n") if event]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
            assert b"[DONE]" not in body
        told = await silent
        assert (told.status, (await told.json())["error"]["code"]) == (503, "shutting_down")
        assert 0.4 < time.monotonic() - asked < 6
        assert await one.wait_for(lambda: all(item.closed or item.finished for item in one.seen), 1.0)


async def test_no_worker_outlives_the_gateway(slow_checkpoint: Path) -> None:
    """An interpreter that ends with a thread inside ONNX Runtime aborts, with exit status 134."""
    async with FakeVllm() as one:
        raw = settings([one], [one], slow_checkpoint, estimator={"path": str(slow_checkpoint), "deadline_ms": 50})
        async with running(raw) as gateway:
            asked = (gateway.chat(f"{number} " + "easy question " * 2000) for number in range(30))
            assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
            workers = [thread for thread in threading.enumerate() if thread.name.startswith("scorer-")]
            assert workers  # at prompts that nobody waits for any more
    assert not any(worker.is_alive() for worker in workers)
