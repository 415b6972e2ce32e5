"""The gateway in front of the two vLLM servers, and the same request sent to both."""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.gateway.conftest import Running
from tests.vllm.servers import VllmServer

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def settings(servers: Mapping[str, VllmServer], checkpoint: Path, **sections: Any) -> dict[str, Any]:
    """The plain values of a gateway.yaml; `sections` adds whole sections, `small` and `large` pool keys."""
    pools = {
        name: {"model": server.model, "cost": cost, "backends": [{"url": server.url}], **sections.pop(name, {})}
        for (name, server), cost in zip(servers.items(), (1, 5), strict=True)
    }
    return {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": pools,
        "routing": {"expose_scores": True},
        "estimator": {"path": str(checkpoint), "deadline_ms": 2000},
        **sections,
    }


class Both:
    """Asks the gateway, then the server that it chose; with one request id, from which vLLM makes the answer's."""

    def __init__(self, gateway: Running, servers: Mapping[str, VllmServer]) -> None:
        self._gateway, self._servers = gateway, servers

    async def ask(self, endpoint: str, model: str, fields: Mapping[str, Any]) -> tuple["Answer", "Answer"]:
        """The gateway's answer and vLLM's own."""
        name = {"x-request-id": secrets.token_hex(8)}
        session = self._gateway.session
        async with session.post(
            self._gateway.url + PATHS[endpoint], json={"model": model, **fields}, headers=name
        ) as routed:
            ours = Answer(routed, await routed.read())
        server = self._servers[ours.headers["x-depo-pool"]]
        asked = {"model": server.model, **fields}
        if fields.get("stream") and "stream_options" not in fields:
            asked["stream_options"] = {"include_usage": True}
        async with session.post(server.url + PATHS[endpoint], json=asked, headers=name) as direct:
            return ours, Answer(direct, await direct.read())


class Answer:
    """A whole answer; `body` without the time, the one thing in which two answers to one request must differ."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers = response.status, response.headers
        self.body = re.sub(rb'"created":\d+', b'"created":0', body)

    @property
    def events(self) -> list[bytes]:
        """A stream's events, each with the empty line that ends it."""
        return re.findall(rb".*?\n\n", self.body, re.DOTALL)

    def without_usage_event(self) -> bytes:
        return b"".join(event for event in self.events if b'"choices":[]' not in event)
