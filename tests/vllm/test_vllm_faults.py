"""Clients that hang up, connections that idle, servers that are killed: seen from vLLM's side and from the client's."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.gateway.conftest import Running, running
from tests.vllm.conftest import PYTHON
from tests.vllm.front import PATHS, settings
from tests.vllm.servers import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no Python that has vLLM"),
]
Servers = dict[str, VllmServer]
ASK: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "3+4="}]},
    "completions": {"prompt": "3+4="},
}
LONG = {"max_tokens": 2000, "ignore_eos": True, "n": 16, "temperature": 1}  # 8 at a time: 20 s and more if not stopped

TOKENS = 480  # of each answer that a killed server owed


@pytest.mark.parametrize("endpoint", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_vllm_stops_within_a_second_of_the_client_hanging_up(
    endpoint: str, stream: bool, servers: Servers, checkpoint: Path
) -> None:
    large = servers["large"]
    before = await _seen(large)
    async with running(settings(servers, checkpoint)) as gateway:
        body = {"model": "large", **ASK[endpoint], **LONG, "stream": stream}
        asking = asyncio.create_task(_start(gateway, endpoint, body))
        await _until(large, "running", lambda running: running > 0)
        assert stream or not asking.done()
        if stream:
            await asyncio.wait_for(asking, 10)
            (await asking).close()
        else:
            asking.cancel()
        hung_up = time.monotonic()
        stopped = await _until(large, "running", lambda running: running == 0) - hung_up
        assert stopped < 1.0
        made = (await _seen(large))["generated"]
        await asyncio.sleep(1.0)
        assert (await _seen(large))["generated"] == made  # it makes no more tokens for nobody
        assert made - before["generated"] < 0.5 * 16 * 2000
        assert await gateway.settles("gateway_in_flight_requests", 0, pool="large")
        phase = "streaming" if stream else "waiting"
        assert await gateway.metric("gateway_client_disconnects_total", phase=phase) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_in_vllms_queue_leaves_it_when_its_client_hangs_up(
    stream: bool, servers: Servers, checkpoint: Path
) -> None:
    large = servers["large"]
    full = {"model": "large", **ASK["chat"], **LONG, "n": 8, "stream": True}
    async with running(settings(servers, checkpoint)) as gateway:
        first = await asyncio.wait_for(_start(gateway, "chat", full), 20)
        waiting = asyncio.create_task(_start(gateway, "chat", {**full, "n": 2, "stream": stream}))
        await _until(large, "waiting", lambda waiting: waiting == 2)
        waiting.cancel()
        hung_up = time.monotonic()
        assert await _until(large, "waiting", lambda waiting: waiting == 0) - hung_up < 1.0
        assert (await _seen(large))["running"] == 8
        first.close()
        assert await _until(large, "running", lambda running: running == 0) - hung_up < 5.0
        assert await gateway.settles("gateway_in_flight_requests", 0, pool="large")


async def test_a_connection_that_idled_as_long_as_vllm_allows_still_serves(servers: Servers, checkpoint: Path) -> None:
    async with running(settings(servers, checkpoint)) as gateway:
        for pause in (0, 3.9, 4.1, 4.95, 5.0, 5.05, 6.5):
            await asyncio.sleep(pause)
            for model in servers:
                for stream in (False, True):
                    answer = await gateway.chat("3+4=", model=model, max_tokens=4, stream=stream)
                    assert answer.status == 200
                    await answer.read()
        assert await gateway.metric("gateway_upstream_attempts_total", outcome="ok") == 28


async def test_health_is_vllms(servers: Servers, checkpoint: Path) -> None:
    async with running(settings(servers, checkpoint)) as gateway:
        for server in servers.values():
            assert await gateway.metric("gateway_backend_up", backend=server.url) == 1
        async with gateway.session.get(f"{gateway.url}/readyz") as ready:
            assert ready.status == 200


async def test_sigterm_lets_streams_from_vllm_finish(servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(yaml.safe_dump(settings(servers, checkpoint), sort_keys=False))
    command = Path(sys.executable).parent / "depo-gateway"
    process = await asyncio.create_subprocess_exec(
        command, "serve", "--config", config, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        url = await asyncio.wait_for(_address(process), 60)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            body = {"model": "large", **ASK["chat"], "max_tokens": 500, "ignore_eos": True, "stream": True}
            answers = await asyncio.gather(*(session.post(url + PATHS["chat"], json=body) for _ in range(12)))
            process.send_signal(signal.SIGTERM)
            bodies = await asyncio.gather(*(answer.read() for answer in answers))
        assert all(body.endswith(b"data: [DONE]\n\n") and body.count(b"data:") > 400 for body in bodies)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_server_killed_under_load_costs_no_client_an_answer_that_had_not_begun(
    servers: Servers, checkpoint: Path
) -> None:
    small = servers["small"]
    async with running(settings(servers, checkpoint)) as gateway:
        begun = asyncio.Event()
        owed = {"model": "auto-0", "max_tokens": TOKENS, "ignore_eos": True}
        stream = asyncio.create_task(_outcome(gateway, {**owed, **ASK["chat"], "stream": True}, begun))
        await asyncio.wait_for(begun.wait(), 60)
        small.freeze()  # it can neither end the stream nor begin another answer, however slow this machine is
        others = [
            asyncio.create_task(_outcome(gateway, {**owed, **ASK[endpoint], "stream": index % 4 < 2}, begun))
            for index, endpoint in enumerate(list(ASK) * 24)
        ]
        assert await gateway.settles("gateway_in_flight_requests", 1 + len(others), pool="small")
        small.kill()
        assert await stream == "small confident, broke off"  # its first bytes were with the client
        assert Counter(await asyncio.gather(*others)) == {"large fallback": len(others)}
        assert await gateway.metric("gateway_backend_up", backend=small.url) == 0
        assert await gateway.metric("gateway_fallbacks_total", from_pool="small", to_pool="large") >= 30
        after = [await gateway.chat("3+4=", model="auto-0", max_tokens=4) for _ in range(5)]
        assert [(item.status, item.headers["x-depo-pool"]) for item in after] == [(200, "large")] * 5
        assert {item.headers["x-depo-reason"] for item in after} == {"fallback"}
        pinned = await gateway.chat("3+4=", model="small", max_tokens=4)
        assert pinned.status == 503
        for pool in servers:
            assert await gateway.settles("gateway_in_flight_requests", 0, pool=pool)


async def _start(gateway: Running, endpoint: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
    """Sends a request; the answer once its first bytes are here. Cancelling it hangs up."""
    answer = await gateway.session.post(gateway.url + PATHS[endpoint], json=body)
    await answer.content.readany()
    return answer


async def _outcome(gateway: Running, body: dict[str, Any], begun: asyncio.Event) -> str:
    """Who answered and why, and how it ended. `begun` is set when the first bytes of an answer are here."""
    endpoint = "chat" if "messages" in body else "completions"
    async with gateway.session.post(gateway.url + PATHS[endpoint], json=body) as answer:
        begun.set()
        text = await answer.text()
    if answer.status != 200:
        return f"{answer.status}: {text}"
    who = f"{answer.headers['x-depo-pool']} {answer.headers['x-depo-reason']}"
    if not body["stream"]:
        return who if json.loads(text)["usage"]["completion_tokens"] == TOKENS else f"{who}: {text}"
    if text.endswith("data: [DONE]\n\n"):
        return who
    last = text.rstrip().splitlines()[-1]
    return f"{who}, broke off" if last.startswith('data: {"error"') else f"{who}, ended without a word: {last}"


async def _seen(server: VllmServer) -> dict[str, float]:
    metrics = await asyncio.to_thread(server.metrics)
    names = {
        "running": "num_requests_running",
        "waiting": "num_requests_waiting",
        "generated": "generation_tokens_total",
    }
    return {name: metrics[f"vllm:{full}"] for name, full in names.items()}


async def _until(server: VllmServer, name: str, condition: Any, seconds: float = 20.0) -> float:
    """The latest time by the monotonic clock at which vLLM's own metric is known not to have met a condition yet.

    A server whose engine takes all cores answers late, and of a time that only it knows: after it was asked.
    """
    until = time.monotonic() + seconds
    not_yet = time.monotonic()
    while True:
        asked = time.monotonic()
        seen = (await _seen(server))[name]
        if condition(seen):
            return not_yet
        not_yet = asked
        assert time.monotonic() < until, f"{name} stays {seen}"
        await asyncio.sleep(0.02)


async def _address(process: asyncio.subprocess.Process) -> str:
    """The public address that `depo-gateway serve` prints when it is ready."""
    assert process.stdout is not None
    said = b""
    while line := await process.stdout.readline():
        said += line
        if found := re.search(rb"http://[\d.]+:\d+", line):
            return found[0].decode()
    raise AssertionError(said.decode())
