"""A client that speaks raw HTTP/1.1, so that a test can say exactly what goes over the wire and when it stops."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """One response. `body` has no chunk framing left; `whole` is False where the connection ended before the answer."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    whole: bool = True

    @property
    def error(self) -> dict[str, Any]:
        made = json.loads(self.body)["error"]
        assert set(made) == {"message", "type", "param", "code"}
        assert isinstance(made, dict)
        return made


@dataclass
class Wire:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    informational: list[int] = field(default_factory=list)  # 1xx seen on the way

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Answer:
        while True:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            if status >= 200:
                break
            self.informational.append(status)
        pairs = [line.split(":", 1) for line in lines[1:] if line]
        return Answer(status, {name.lower(): value.strip() for name, value in pairs})

    async def answer(self, seconds: float = 10.0, body: bool = True) -> Answer:
        """The next response; `body` False for one to HEAD."""
        async with asyncio.timeout(seconds):
            answer = await self.head()
            if not body:
                return answer
            try:
                if answer.headers.get("transfer-encoding") == "chunked":
                    async for chunk in self.chunks():
                        answer.body += chunk
                elif "content-length" in answer.headers:
                    answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
                else:
                    answer.body = await self.reader.read()
            except asyncio.IncompleteReadError as error:
                answer.body, answer.whole = answer.body + error.partial, False
            return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            chunk = (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                return
            yield chunk

    async def closed(self, seconds: float = 5.0) -> bool:
        """Whether the other side closes in time, sending nothing more."""
        try:
            async with asyncio.timeout(seconds):
                return await self.reader.read(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    def reset(self) -> None:
        """Ends the connection as a crashed client would."""
        made: socket.socket = self.writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[Wire]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def request(
    body: Any = None, path: str = "/v1/chat/completions", method: str = "POST", version: str = "1.1", **headers: str
) -> bytes:
    """A request's bytes. `body`: bytes, or what becomes JSON; None for a short chat. `_` in header names: `-`."""
    if body is None:
        body = chat()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"host": "gateway", "content-length": str(len(data))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"{method} {path} HTTP/{version}\r\n{lines}\r\n".encode() + data


def chat(text: str = "easy", model: str = "small", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}
