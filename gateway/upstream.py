"""An HTTP/1.1 client for backends, with pooled connections, on asyncio.Protocol and httptools.

It does what a gateway needs and no more, which makes it several times faster than a general client
(benchmarks/overhead.py). It limits the time for connecting; the caller, who knows the phase, sets all other timeouts.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

# No request starts on a connection older than this. vLLM's uvicorn closes a connection after 5 idle seconds; closing it
# first avoids writing to a connection that is closing. A Kubernetes Service balances only new connections: a server
# that was removed from it would still receive requests on connections that are never idle, and a vLLM that drains
# answers them with 500.
CONNECTION_SECONDS = 4.0
HEAD_BYTES = 256 * 1024
HIGH_WATER = 1 << 20  # bytes of an answer that wait for the client before reading from the backend pauses
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server", b"x-request-id")
)  # fmt: skip


class UpstreamError(Exception):
    """The exchange failed. `outcome` is `refused` (nothing was sent), `timeout` (while connecting) or `reset`."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Reply:
    """A backend's answer. `Upstream.send` returns it with its head; `chunk` gives the body, byte for byte."""

    __slots__ = ("_buffered", "_connection", "_done", "_error", "_parts", "_waiter", "headers", "status")

    def __init__(self, connection: "_Connection") -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._connection: _Connection | None = connection
        self._parts: deque[bytes] = deque()
        self._buffered = 0
        self._done = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def chunk(self) -> bytes:
        """The next bytes of the body, b"" at its end.

        Raises:
            UpstreamError: the connection broke before the end.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._done:
                return b""
            await self._wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read(self) -> bytes:
        """The rest of the body. Raises UpstreamError as `chunk` does."""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Closes the connection unless the whole answer has come, so that the backend stops its work."""
        if self._connection is not None:
            self._connection.abort()

    async def head(self) -> None:
        while not self.status and self._error is None:
            await self._wait()
        if self._error is not None and not self.status:
            raise self._error

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def feed(self, data: bytes) -> bool:
        """Takes a piece of the body; returns True when the buffer is full for now."""
        self._parts.append(data)
        self._buffered += len(data)
        return self._buffered > HIGH_WATER

    def finish(self, error: UpstreamError | None = None) -> None:
        self._done, self._error, self._connection = error is None, error, None
        self.wake()


@dataclass(slots=True, eq=False)
class _Origin:
    """Scheme, host and port, and the idle connections to it, the one used last at the end."""

    host: str
    port: int
    tls: bool
    name: bytes  # the Host header
    idle: "list[_Connection]" = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One connection; at most one exchange at a time."""

    __slots__ = ("_expiry", "_head_bytes", "_headers", "_loop", "_nominated", "_origin", "_parser", "_paused",
                 "_reusable_until", "_sized", "_transport", "answered", "reply")  # fmt: skip

    def __init__(self, origin: _Origin) -> None:
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._reusable_until = self._loop.time() + CONNECTION_SECONDS
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._nominated: tuple[bytes, ...] = ()  # hop-by-hop headers as this answer names them
        self._head_bytes = 0
        self._sized = False  # a length or chunks mark the body's end, not the connection's end
        self._paused = False
        self._expiry: asyncio.TimerHandle | None = None
        self.reply: Reply | None = None
        self.answered = False  # the first byte of this exchange's answer has come

    def start(self, data: bytes) -> Reply:
        """Sends a whole request. `Reply.head` waits for the head of its answer."""
        assert self._transport is not None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self.answered = False
        self._parser = httptools.HttpResponseParser(self)
        self.reply = Reply(self)
        self._transport.write(data)
        return self.reply

    def usable(self) -> bool:
        """Whether another request may start on it. Checks the clock, because a busy loop runs the idle timer late."""
        if self._transport is None or self._transport.is_closing():
            return False
        return self._loop.time() < self._reusable_until

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        made = transport.get_extra_info("socket")
        if made is not None:
            # Without it Nagle's algorithm and delayed acknowledgements add 40 ms to a request sent in two writes.
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.reply is None or self._parser is None:  # no request is under way
            self.abort()
            return
        self.answered = True
        if not self.reply.status:
            self._head_bytes += len(data)
        reply = self.reply
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("the answer is not valid HTTP")
            return
        if self.reply is not None and not reply.status and self._head_bytes > HEAD_BYTES:
            self._fail("the answer's head is too large")
            return
        reply.wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._expiry is not None:
            self._expiry.cancel()
        if self in self._origin.idle:
            self._origin.idle.remove(self)
        reply, self.reply = self.reply, None
        if reply is None:
            return
        if reply.status and not self._sized and error is None:
            reply.finish()  # RFC 9112 6.3: a body without a length ends with its connection
        else:
            reply.finish(UpstreamError("reset", "the connection broke"))

    # httptools

    def on_message_begin(self) -> None:
        if self.reply is None:  # bytes after a complete answer would be taken for the next request's answer
            self.abort()
        self._headers, self._nominated, self._head_bytes, self._sized = [], (), 0, False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._sized = True
        elif name == b"connection":
            self._nominated = tuple(token.strip() for token in value.lower().split(b","))
        if name not in _HOP_BY_HOP and not name.startswith(b"x-depo-"):
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self.reply is not None and status >= 200:  # 1xx only announce the answer (RFC 9110 15.2)
            headers = [item for item in self._headers if item[0] not in self._nominated]  # RFC 9110 7.6.1
            self.reply.status, self.reply.headers = status, headers

    def on_body(self, body: bytes) -> None:
        if self.reply is not None and self.reply.feed(body) and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        reply, parser = self.reply, self._parser
        if reply is None or parser is None or not reply.status:
            return
        self.reply = None
        self.resume()
        if parser.should_keep_alive() and self.usable():
            self._origin.idle.append(self)
            self._expiry = self._loop.call_at(self._reusable_until, self.abort)
        else:
            self.abort()
        reply.finish()

    def _fail(self, message: str) -> None:
        reply, self.reply = self.reply, None
        self.abort()
        if reply is not None:
            reply.finish(UpstreamError("reset", message))


class Upstream:
    """The connections to all backends."""

    def __init__(self, connect_s: float) -> None:
        self._connect_s = connect_s
        self._targets: dict[str, tuple[_Origin, bytes]] = {}
        self._origins: dict[tuple[str, int, bool], _Origin] = {}
        self._tls: ssl.SSLContext | None = None

    def set_connect_seconds(self, seconds: float) -> None:
        self._connect_s = seconds

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Reply:
        """Sends one request and waits for the answer's head.

        The backend may have closed an idle connection while the request was written to it. If not a byte of an answer
        came, the request is sent once more on a new connection.

        Raises:
            UpstreamError: no answer came.
        """
        origin, path = self._targets.get(url) or self._target(url)
        data = _request(method, path, origin.name, headers, body)
        while origin.idle:
            connection = origin.idle.pop()
            if not connection.usable():
                connection.abort()
                continue
            try:
                return await self._exchange(connection, data)
            except UpstreamError:
                if connection.answered:
                    raise
                break
        return await self._exchange(await self._connect(origin), data)

    async def close(self) -> None:
        for origin in self._origins.values():
            for connection in list(origin.idle):
                connection.abort()
        await asyncio.sleep(0)  # lets the transports close

    async def _exchange(self, connection: _Connection, data: bytes) -> Reply:
        reply = connection.start(data)
        try:
            await reply.head()
        except asyncio.CancelledError:
            reply.close()
            raise
        return reply

    async def _connect(self, origin: _Origin) -> _Connection:
        loop = asyncio.get_running_loop()
        tls = self._tls_context() if origin.tls else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(origin), origin.host, origin.port, ssl=tls
                )
        except TimeoutError:
            raise UpstreamError("timeout", "connecting took too long") from None
        except ssl.SSLError as error:
            raise UpstreamError("refused", f"TLS failed: {error.reason or 'no common protocol'}") from None
        except OSError as error:
            raise UpstreamError("refused", f"connecting failed: {error.strerror or 'no such host'}") from None
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
        return self._tls

    def _target(self, url: str) -> tuple[_Origin, bytes]:
        parts = urlsplit(url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        key = (host, port, tls)
        if key not in self._origins:
            self._origins[key] = _Origin(host, port, tls, parts.netloc.rpartition("@")[2].encode())
        target = self._targets[url] = (self._origins[key], (parts.path or "/").encode())
        return target


def _request(method: str, path: bytes, host: bytes, headers: Mapping[str, str], body: bytes | None) -> bytes:
    lines = [b"%b %b HTTP/1.1\r\nhost: %b" % (method.encode(), path, host)]
    lines += [b"%b: %b" % (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    if body is not None:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")
