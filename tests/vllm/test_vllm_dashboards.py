"""The Backends board against real vLLM servers: every query has data, every metric named exists."""

import asyncio
import os
from pathlib import Path

import aiohttp
import pytest

from tests.gateway.conftest import running
from tests.monitoring import servers as monitoring
from tests.monitoring.panels import PANELS, metrics_in, shows
from tests.vllm.conftest import PYTHON
from tests.vllm.front import settings
from tests.vllm.servers import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no Python that has vLLM"),
]
BOARD = [panel for panel in PANELS if panel.board == "backends"]
ROUNDS, REQUESTS = 3, 8


async def test_every_panel_shows_something(servers: dict[str, VllmServer], checkpoint: Path, tmp_path: Path) -> None:
    async with running(settings(servers, checkpoint)) as gateway:
        both = [server.url for server in servers.values()]
        targets = {"gateway": [gateway.admin], "gateway-b": [gateway.admin], "vllm": both, "vllm-b": both}
        with monitoring.prometheus(tmp_path / "prometheus", targets) as prometheus:
            assert await asyncio.to_thread(prometheus.wait, "gateway_build_info and on () vllm:num_requests_running")
            for number in range(ROUNDS):
                asked = [ask(gateway.session, gateway.url, number, index) for index in range(REQUESTS)]
                assert set(await asyncio.gather(*asked)) == {200}
                await asyncio.sleep(2.5)  # two scrapes
            for panel in BOARD:
                await asyncio.to_thread(shows, prometheus, panel)


async def ask(session: aiohttp.ClientSession, url: str, number: int, index: int) -> int:
    """Every other streamed; a few ask one pool, so that both have work."""
    model = ("auto", "small", "large")[index % 3]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"3+4*9-{number}+{index}="}],
        "max_tokens": 24,
        "stream": index % 2 == 0,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


def test_every_metric_of_vllms_exists(servers: dict[str, VllmServer]) -> None:
    named = {name for panel in BOARD for query, _ in panel.queries for name in metrics_in(query)}
    there = set(servers["small"].metrics())
    wanted = {name for name in named if name.startswith("vllm:")}
    assert len(wanted) > 10
    assert wanted - there == set()
