"""The gateway in front of the two vLLM servers, with a recorder on the wire between them."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools

from tests.gateway.conftest import Running, running
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
        "timeouts": {"first_token_s": 300, "idle_s": 120},  # two models and all else share two cores
        **sections,
    }


@dataclass
class Message:
    """One HTTP message as it went over the wire."""

    status: int = 0
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def events(self) -> list[bytes]:
        """A stream's events, each with the empty line that ends it."""
        return re.findall(rb".*?\n\n", self.body, re.DOTALL)

    def as_a_client_sees_it(self) -> bytes:
        """The body without the usage event, which only the gateway asked for."""
        return b"".join(event for event in self.events if b'"choices":[]' not in event)

    def timeless(self) -> bytes:
        """The body without the time, the one thing in which two whole answers with one id must differ."""
        return re.sub(rb'"created":\d+', b'"created":0', self.body)


class Wire:
    """Between the gateway and one vLLM server: passes every byte on and keeps both sides of the last exchange."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self.request = self.answer = Message()
        self._connections: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "Wire":
        self._listening = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()
        if self._connections:  # the gateway has gone, they end by themselves
            await asyncio.wait(self._connections, timeout=10)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        there = asyncio.create_task(self._pass(reader, far_writer, httptools.HttpRequestParser))
        back = asyncio.create_task(self._pass(far_reader, writer, httptools.HttpResponseParser))
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        for task in (there, back):
            task.cancel()
        await asyncio.gather(there, back, return_exceptions=True)
        for end in (writer, far_writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()
        self._connections.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parser_kind: Any) -> None:
        noted = _Noted(self, parser_kind)
        while data := await reader.read(65_536):
            noted.feed(data)
            writer.write(data)
            await writer.drain()


class _Noted:
    """Parses one direction of a connection; a whole message that belongs to a model request becomes the wire's last."""

    def __init__(self, wire: Wire, parser_kind: Any) -> None:
        self._wire, self._parser, self._message = wire, parser_kind(self), Message()
        self.feed = self._parser.feed_data

    def on_message_begin(self) -> None:
        self._message = Message()

    def on_url(self, url: bytes) -> None:
        self._message.path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._message.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._message.body += body

    def on_message_complete(self) -> None:
        if isinstance(self._parser, httptools.HttpRequestParser):
            if self._message.path in PATHS.values():
                self._wire.request = self._message
        elif self._message.body:  # /health has none
            self._message.status = self._parser.get_status_code()
            self._wire.answer = self._message


@dataclass
class Observed:
    """One exchange: what the client got, and what went over the wire between gateway and vLLM."""

    ours: Message
    sent: Message
    answer: Message


@dataclass
class Front:
    """A gateway whose wires to both servers are watched."""

    gateway: Running
    servers: Mapping[str, VllmServer]
    wires: Mapping[str, Wire]

    async def ask(self, endpoint: str, model: str, fields: Mapping[str, Any]) -> Observed:
        url = self.gateway.url + PATHS[endpoint]
        ours = await _post(self.gateway, url, {"model": model, **fields})
        wire = self.wires[ours.headers["x-depo-pool"]]
        return Observed(ours, wire.request, wire.answer)

    async def ask_vllm(self, endpoint: str, observed: Observed, fields: Mapping[str, Any]) -> Message:
        """The same request to vLLM itself, under the same id, from which vLLM makes the answer's."""
        server = self.servers[observed.ours.headers["x-depo-pool"]]
        name = {"x-request-id": observed.sent.headers["x-request-id"]}
        return await _post(self.gateway, server.url + PATHS[endpoint], {"model": server.model, **fields}, name)


@contextlib.asynccontextmanager
async def watched(servers: Mapping[str, VllmServer], checkpoint: Path, **sections: Any) -> AsyncIterator[Front]:
    async with Wire(servers["small"]) as small, Wire(servers["large"]) as large:
        raw = settings(servers, checkpoint, **sections)
        wires = {"small": small, "large": large}
        for name, wire in wires.items():
            raw["pools"][name]["backends"] = [{"url": wire.url}]
        async with running(raw) as gateway:
            yield Front(gateway, servers, wires)


async def _post(
    gateway: Running, url: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Message:
    async with gateway.session.post(url, json=body, headers=headers) as answer:
        found = {name.lower(): value for name, value in answer.headers.items()}
        return Message(answer.status, headers=found, body=await answer.read())
