"""One HTTP exchange with one backend. Timeouts other than connecting are the caller's, who knows the phase."""

import asyncio
import io
import socket
from collections.abc import Sequence

import aiohttp

# vLLM's uvicorn closes a connection that idles for 5 s; letting go first avoids writing into one that is closing.
IDLE_SECONDS = 4.0
# Larger bodies are sent in pieces, so that one of them doesn't hold the event loop.
LARGE_BODY = 1 << 20

Headers = Sequence[tuple[bytes, bytes]]
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"date",
        b"server",
        b"x-request-id",
    )
)


class UpstreamError(Exception):
    """The exchange failed. `outcome` is `refused` (nothing was sent), `timeout` (while connecting) or `reset`."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Reply:
    """A backend's answer whose head has arrived; the body comes by `chunk`, untouched."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = [
            (lower, value)
            for name, value in response.raw_headers
            if (lower := name.lower()) not in _HOP_BY_HOP and not lower.startswith(b"x-depo-")
        ]

    async def chunk(self) -> bytes:
        """The next bytes of the body, b"" at its end.

        Raises:
            UpstreamError: the connection broke before the end.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("reset", f"the connection broke: {type(error).__name__}") from None

    async def read(self) -> bytes:
        """The whole rest of the body. Raises UpstreamError as `chunk` does."""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Closes the connection unless the whole answer has been read: the backend sees it and stops its work."""
        self._response.close()


class Upstream:
    """The connections to all backends."""

    def __init__(self, connect_s: float) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, socket_factory=_socket)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )
        self.set_connect_seconds(connect_s)

    def set_connect_seconds(self, seconds: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, connect=seconds)

    async def send(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> Reply:
        """Sends one request and waits for the answer's head.

        Raises:
            UpstreamError: no answer came.
        """
        data = io.BytesIO(body) if body is not None and len(body) > LARGE_BODY else body
        if data is not body:
            headers = {**headers, "content-length": str(len(body or b""))}
        try:
            response = await self._session.request(
                method, url, data=data, headers=headers, allow_redirects=False, timeout=self._timeout
            )
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamError("timeout", "connecting took too long") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or "no connection"
            raise UpstreamError("refused", f"connecting failed: {reason}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("reset", f"the connection broke: {type(error).__name__}") from None
        return Reply(response)

    async def close(self) -> None:
        await self._session.close()
        await asyncio.sleep(0)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    # Without it Nagle's algorithm and delayed acknowledgements add 40 ms to a request sent in two writes.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    return made
