"""The HTTP/1.1 server side: uvicorn's protocol on httptools, and what it lacks.

That is: limits on a request's head, trailers and chunk extensions, a deadline for the head, OpenAI-shaped errors, a
close that lets the client read its answer first, detection of a client that hangs up behind pipelined requests, and no
chunks for HTTP/1.0. httptools itself refuses Content-Length with Transfer-Encoding (RFC 9112 6.3), which h11 accepts.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEADER_SECONDS = 20.0  # for a request's head; a peer that sends it more slowly is disconnected
LINGER_SECONDS = 2.0  # a closing connection is still read for so long, because closing it with unread bytes resets it
STALLED_SECONDS = 30.0  # a client that reads nothing of its answer for so long counts as gone
PIPELINED_BYTES = 65_536  # read ahead during an answer
NO_BODY = (204, 304)

Message = MutableMapping[str, Any]

log = logging.getLogger(__name__)


class Cycle:
    """One request and its answer; replaces uvicorn's RequestResponseCycle in `Protocol`."""

    def __init__(self, protocol: "Protocol", scope: Message, keep_alive: bool, expects_continue: bool) -> None:
        self.protocol = protocol
        self.scope = scope
        self.transport: asyncio.Transport = protocol.transport
        self.flow: FlowControl = protocol.flow
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.more_body = True  # the request's
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.message_event = asyncio.Event()
        self._expects_continue = expects_continue
        self._chunked = False
        self._head = b""  # of the answer, sent together with its first bytes, because every write is a system call
        self._left = 0  # of the answer's content-length
        self._bodiless = scope["method"] == "HEAD"

    async def run_asgi(self, application: Callable[..., Awaitable[None]]) -> None:
        try:
            await application(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            self.transport.close()
        except Exception:  # boundary: the last one before the client's socket
            log.exception("%s %s failed", self.scope["method"], self.scope["path"])
            self.transport.close()
        else:
            if not self.response_complete and not self.disconnected:  # an incomplete answer must not look complete
                self.transport.close()

    async def receive(self) -> Message:
        if self._expects_continue and not self.response_started and not self.transport.is_closing():
            self._expects_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        if self.flow.write_paused and not self.disconnected:
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    await self.flow.drain()
            except TimeoutError:
                self.transport.abort()  # and the application learns that its client is gone
                self.disconnected = True
                self.message_event.set()
        if self.disconnected:
            return
        if not self.response_started:
            self._start(message["status"], message["headers"])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self._write(body, more)
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.protocol.finish(self)
            self.protocol.on_response_complete()

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        if self.more_body:  # the rest of the request is not read
            self.keep_alive = False
        parts = [STATUS_LINE[status]]
        sized = False
        for name, value in (*self.protocol.server_state.default_headers, *headers):
            if name == b"content-length":
                self._left, sized = int(value), True
            elif name == b"connection":
                self.keep_alive = self.keep_alive and value != b"close"
                continue
            parts.append(b"%b: %b\r\n" % (name, value))
        self._bodiless = self._bodiless or status in NO_BODY
        if not sized and not self._bodiless:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # the end of the connection is the end of the body
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        head = b"".join(parts)
        assert head.count(b"\n") == len(parts), "a line break in a header"
        self._head = head + b"\r\n"

    def _write(self, body: bytes, more: bool) -> None:
        head, self._head = self._head, b""
        if self._bodiless:
            body = b""
        elif self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        elif self.scope["http_version"] == "1.1" or self._left:
            self._left -= len(body)
            assert self._left >= 0, "an answer longer than its content-length"
        if head or body:
            self.transport.write(head + body)


class Protocol(HttpToolsProtocol):
    """One client's connection."""

    header_bytes = 65_536
    cycle: Cycle  # type: ignore[assignment]
    _unproductive = 0  # bytes since the last byte of a body: a head, trailers, chunk extensions
    _begun = False  # the first byte of a head has come
    _in_head = True
    _replaying = False
    _closing = False  # an error or an answer ended the connection; further bytes are discarded
    _timer: asyncio.TimerHandle | None = None
    _running: Cycle | None = None
    _ahead = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise every first token waits 40 ms
        self._timer = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.pipeline.clear()
        self._ahead = b""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._ahead or self._answering():
            # Not parsed yet. The socket is still read, because a paused one would hide that the client hung up.
            self._ahead += data
            if len(self._ahead) > PIPELINED_BYTES:
                self.flow.pause_reading()
            return
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unproductive += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "The request is not valid HTTP/1.1.")
            return
        if self._unproductive > self.header_bytes and not self._closing:
            self._refuse_head()
        elif self._begun and self._in_head and self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _answering(self) -> bool:
        """Whether an answer is under way, and its request or the last one pipelined behind it is complete."""
        running = self._running
        return running is not None and not running.response_complete and not self.cycle.more_body

    def on_message_begin(self) -> None:
        if not self._replaying:
            self._begun = self._in_head = True
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer is no header: it must not authenticate or frame a request (RFC 9110 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if self._closing or self._replaying:
            return
        # The counter may include bytes of a body and misses a second head in one packet: measure the head itself.
        if self._unproductive > self.header_bytes or not self._unproductive:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.header_bytes:
                self._refuse_head()
                return
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope: Message = self.scope  # type: ignore[assignment]
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        keep_alive = version == "1.1" and self.parser.should_keep_alive()
        self.cycle = Cycle(self, scope, keep_alive, self.expect_100_continue)
        if self._running is None or self._running.response_complete:
            self._begin(self.cycle)
        else:
            self.pipeline.appendleft((self.cycle, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        self._unproductive = 0
        if not self._closing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._begun, self._unproductive = False, 0
        if not self._closing:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._closing or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._begin(self.pipeline.pop()[0])
        elif self._ahead:
            self.loop.call_soon(self._catch_up)
        else:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def finish(self, cycle: Cycle) -> None:
        """Ends the connection after an answer."""
        self._closing = True
        if cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    def _begin(self, cycle: Any) -> None:
        self._running = cycle
        self._start_asgi_task(cycle, self.app)

    def _catch_up(self) -> None:
        if self.parser is not None and not self._closing:
            data, self._ahead = self._ahead, b""
            self._feed(data)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Ignores an offered upgrade. Java's client offers h2c with every request; httptools then skips the body."""
        framing = [item for item in self.headers if item[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._replaying = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % item for item in framing) + b"\r\n")
        self._replaying = False
        if rest and not self._closing:
            self._feed(rest)

    def _refuse_head(self) -> None:
        self._refuse(431, f"The request's head is larger than limits.header_bytes ({self.header_bytes}).")

    def _refuse(self, status: int, message: str) -> None:
        self._closing = True
        self._stop_timer()
        running = self._running
        if running is not None and not running.response_complete:
            if running is not self.cycle or not running.more_body:  # a later request's error: this one is answered
                self.pipeline.clear()
                running.keep_alive = False
                return
            running.disconnected = True
            running.message_event.set()
            if running.response_started:
                self.transport.close()
                return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = orjson.dumps({"error": error})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._linger()

    def _linger(self) -> None:
        self.flow.resume_reading()
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def uvicorn_config(application: Callable[..., Awaitable[None]], header_bytes: int, keep_alive_s: int) -> uvicorn.Config:
    """The uvicorn configuration for both ports."""
    return uvicorn.Config(
        application,
        http=type("CappedProtocol", (Protocol,), {"header_bytes": header_bytes}),
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=1,
    )
