"""A scripted vLLM on loopback: a real HTTP server that answers, stalls, fails or hangs up as a test's Script says.

It speaks raw HTTP/1.1 so that it can break it, and notes what it received and when a client closed its connection.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools


@dataclass
class Seen:
    """One request as the backend saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrived: float = field(default_factory=time.monotonic)
    closed: float | None = None  # when its connection ended before the answer was complete
    finished: float | None = None  # when the answer was complete

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Script:
    """How requests are answered; a test changes it at any time."""

    status: int = 200
    body: bytes | None = None  # instead of the usual answer
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "Hello from here."
    before_head_s: float = 0.0
    before_first_s: float = 0.0  # between the head and the first event
    between_s: float = 0.0  # between events
    events: int = 5
    raw_events: tuple[bytes, ...] | None = None  # instead of the usual ones
    reset_before_head: bool = False
    reset_after_events: int | None = None
    stop_after_events: int | None = None  # a clean end of the body without [DONE]
    finish_reason: str | None = None  # of a stream's last piece
    healthy: bool = True
    health_s: float = 0.0  # before a health check is answered
    repeat: int | None = None  # after so many model requests the script becomes `then`
    then: "Script | None" = None


class FakeVllm:
    """`async with FakeVllm() as backend`: listens on a free port until the end of the block."""

    def __init__(self, model: str = "fake-model", script: Script | None = None) -> None:
        self.model = model
        self.script = script or Script()
        self.seen: list[Seen] = []  # model requests only
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "FakeVllm":
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """As `kill -9` would: open connections reset, new ones are refused."""
        self._server.close()
        for writer in list(self.open):
            _reset(writer)
        await asyncio.sleep(0)

    async def wait_for(self, condition: Callable[[], bool], seconds: float = 5.0) -> bool:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:  # noqa: ASYNC110  any fact of a test's
            await asyncio.sleep(0.01)
        return condition()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            while (request := await _read_request(reader)) is not None:
                if request.path in ("/health", "/v1/models"):
                    await self._probe(request, writer)
                    continue
                self.seen.append(request)
                watch = asyncio.create_task(reader.read(1))
                answer = asyncio.create_task(self._answer(request, writer))
                await asyncio.wait((watch, answer), return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() or isinstance(answer.exception(), ConnectionError):
                    request.closed = time.monotonic()
                    answer.cancel()
                    return
                answer.result()
                request.finished = time.monotonic()
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            self.open.discard(writer)
            writer.close()

    async def _probe(self, request: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.script.health_s)
        body = b"" if request.path == "/health" else json.dumps({"data": [{"id": self.model}]}).encode()
        writer.write(_head(200 if self.script.healthy else 503, {"content-length": str(len(body))}) + body)
        await writer.drain()

    async def _answer(self, request: Seen, writer: asyncio.StreamWriter) -> None:
        script = self.script
        if script.repeat is not None:
            script.repeat -= 1
            if script.repeat <= 0 and script.then is not None:
                self.script = script.then
        await asyncio.sleep(script.before_head_s)
        if script.reset_before_head:
            _reset(writer)
            return
        asked = request.json
        if script.status != 200 or not asked.get("stream"):
            body = script.body if script.body is not None else self._whole(request.path, script)
            sized = {"content-type": "application/json", "content-length": str(len(body)), **script.headers}
            writer.write(_head(script.status, sized) + body)
            await writer.drain()
            return
        streamed = {
            "content-type": "text/event-stream; charset=utf-8",
            "transfer-encoding": "chunked",
            **script.headers,
        }
        writer.write(_head(200, streamed))
        await writer.drain()
        await asyncio.sleep(script.before_first_s)
        for index, event in enumerate(self.events(request, script)):
            if script.reset_after_events == index:
                _reset(writer)
                return
            if script.stop_after_events == index:
                break
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(script.between_s)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def events(self, request: Seen, script: Script) -> list[bytes]:
        """The server-sent events of a stream, as vLLM words them."""
        if script.raw_events is not None:
            return list(script.raw_events)
        asked = request.json
        chat = request.path == "/v1/chat/completions"
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        made = []
        for index in range(script.events):
            part = {"delta": {"content": f"{script.text} {index}"}} if chat else {"text": f"{script.text} {index}"}
            choices = [{"index": 0, **part, "logprobs": None, "finish_reason": None}]
            if index == script.events - 1:
                choices[0]["finish_reason"] = script.finish_reason
            made.append({"id": "c-1", "object": "chunk", "model": self.model, "choices": choices})
        if usage:
            made.append({"id": "c-1", "object": "chunk", "model": self.model, "choices": [], "usage": USAGE})
        return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in made] + [b"data: [DONE]\n\n"]

    def _whole(self, path: str, script: Script) -> bytes:
        if path == "/v1/chat/completions":
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": script.text}}
        else:
            choice = {"text": script.text}
        choices = [{"index": 0, **choice, "finish_reason": "stop"}]
        answer = {"id": "c-1", "object": "x", "created": 1, "model": self.model, "choices": choices, "usage": USAGE}
        return json.dumps(answer, indent=1).encode()  # indented: a gateway that parses and dumps again is found out


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class _Parser:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.path, self.body, self.done = "", b"", False

    def on_url(self, url: bytes) -> None:
        self.path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.done = True


async def _read_request(reader: asyncio.StreamReader) -> Seen | None:
    parsed = _Parser()
    parser = httptools.HttpRequestParser(parsed)
    while not parsed.done:
        data = await reader.read(65_536)
        if not data:
            return None
        parser.feed_data(data)
    return Seen(parser.get_method().decode(), parsed.path, parsed.headers, parsed.body)


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    made = writer.get_extra_info("socket")
    if made is not None and not writer.transport.is_closing():
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # close sends RST
    writer.transport.abort()
