"""One exchange with one backend, over real sockets; the peer's bytes are written by hand."""

import asyncio
import contextlib
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from depo_gateway.gateway import upstream as upstream_module
from depo_gateway.gateway.upstream import Upstream, UpstreamError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def peer(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    serving = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


@contextlib.asynccontextmanager
async def upstream(connect_s: float = 2.0) -> AsyncIterator[Upstream]:
    made = Upstream(connect_s)
    try:
        yield made
    finally:
        await made.close()


def answering(*pieces: bytes, pause_s: float = 0.02, requests: int = 1) -> Serve:
    """Answers each request with the pieces, a moment apart, and hangs up after so many requests."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(requests):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)

    return serve


async def test_what_goes_over_the_wire() -> None:
    seen = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(7)
        writer.write(OK)
        await writer.drain()

    async with peer(serve) as url, upstream() as client:
        sent = {"content-type": "application/json", "authorization": "Bearer key"}
        reply = await client.send("POST", url + "/v1/chat/completions", sent, b'{"a":1}')
        assert (reply.status, await reply.read()) == (200, b"ok")
        head, body = seen.split(b"\r\n\r\n")
        line, *headers = head.decode().split("\r\n")
        assert line == "POST /v1/chat/completions HTTP/1.1"
        named = {name.lower(): value for name, value in (header.split(": ") for header in headers)}
        assert named.pop("host") == url.removeprefix("http://")
        assert named == {
            **sent,
            "content-length": "7",
        }  # and nothing that nobody asked for: no user-agent, no encodings
        assert body == b'{"a":1}'


async def test_bodies_however_they_are_framed() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    framings = {
        "chunked": (head + b"transfer-encoding: chunked\r\n\r\n5\r\nda", b"ta:\r\n3;x=y\r\n 12\r\n0\r\n\r\n"),
        "trailers": (head + b"transfer-encoding: chunked\r\n\r\n8\r\ndata: 12\r\n0\r\nx-sum: 1\r\n", b"\r\n"),
        "length": (head + b"content-length: 8\r\n\r\n", b"data: 12"),
        "until close": (head + b"connection: close\r\n\r\ndata", b": 12"),
        "1.0": (b"HTTP/1.0 200 OK\r\n\r\ndata", b": 12"),
        "after 1xx": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", head + b"content-length: 8\r\n\r\ndata: 12"),
        "torn head": (head[:20], head[20:] + b"content-length: 8\r\n\r\ndata: 12"),
    }
    async with upstream() as client:
        for name, pieces in framings.items():
            async with peer(answering(*pieces)) as url:
                reply = await client.send("POST", url + "/", {}, b"{}")
                assert (reply.status, await reply.read()) == (200, b"data: 12"), name
                assert await reply.chunk() == b""


async def test_trailers_are_no_headers() -> None:
    head = b"HTTP/1.1 200 OK\r\na: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    async with peer(answering(head + b"2\r\nok\r\n0\r\nb: 2\r\n\r\n")) as url, upstream() as client:
        reply = await client.send("POST", url + "/", {}, b"{}")
        assert (await reply.read(), reply.headers) == (b"ok", [(b"a", b"1")])


async def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next() -> None:
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    for extra in (forged, forged[:20]):
        async with peer(answering(OK + extra, requests=9)) as url, upstream() as client:
            for _ in range(3):
                assert await (await client.send("POST", url + "/", {}, b"{}")).read() == b"ok"


async def test_a_body_cut_short_is_a_reset() -> None:
    for head in (
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n",
    ):
        async with peer(answering(head + b"half")) as url, upstream() as client:
            reply = await client.send("POST", url + "/", {}, b"{}")
            with pytest.raises(UpstreamError) as failure:
                await reply.read()
            assert failure.value.outcome == "reset"


async def test_no_http_is_a_reset() -> None:
    for answer in (b"SSH-2.0-OpenSSH_9\r\n\r\n", b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000):
        async with peer(answering(answer)) as url, upstream() as client:
            with pytest.raises(UpstreamError) as failure:
                async with asyncio.timeout(5):
                    await client.send("POST", url + "/", {}, b"{}")
            assert failure.value.outcome == "reset"


async def test_nobody_listens() -> None:
    async with peer(answering(OK)) as url:
        pass
    async with upstream() as client:
        for place in (url, "http://nowhere.invalid:80"):
            with pytest.raises(UpstreamError) as failure:
                await client.send("POST", place + "/", {}, b"{}")
            assert failure.value.outcome == "refused"


async def test_which_headers_come_back() -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Custom: Kept As Is\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
        b"connection: keep-alive, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\ndate: now\r\nserver: uvicorn\r\n"
        b"content-encoding: gzip\r\nx-depo-pool: forged\r\nx-request-id: theirs\r\n\r\nok"
    )
    async with peer(answering(head)) as url, upstream() as client:
        reply = await client.send("POST", url + "/", {}, b"{}")
        assert reply.headers == [
            (b"x-custom", b"Kept As Is"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
            (b"content-encoding", b"gzip"),
        ]
        assert await reply.read() == b"ok"  # not unpacked: the bytes are the client's


async def test_connections_are_reused_and_let_go() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK)

    async with peer(serve) as url, upstream() as client:
        for _ in range(5):
            assert await (await client.send("POST", url + "/", {}, b"")).read() == b"ok"
        assert connections == 1
        reply = await client.send("POST", url + "/", {}, b"")
        reply.close()
        await (await client.send("POST", url + "/", {}, b"")).read()
        assert connections <= 2


async def test_a_connection_that_is_never_idle_is_let_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service that has taken a server out sends new connections elsewhere, and only those."""
    monkeypatch.setattr(upstream_module, "CONNECTION_SECONDS", 0.3)
    requests: list[int] = []  # of each connection

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = len(requests)
        requests.append(0)
        while await reader.readuntil(b"\r\n\r\n"):
            requests[mine] += 1
            await asyncio.sleep(0.01)
            writer.write(OK)

    async with peer(serve) as url, upstream() as client:
        until = asyncio.get_running_loop().time() + 1.0
        while asyncio.get_running_loop().time() < until:
            assert await (await client.send("POST", url + "/", {}, b"")).read() == b"ok"
        assert 3 <= len(requests) <= 5
        assert requests[0] > 3


async def test_a_busy_loop_starts_nothing_on_an_old_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request is there before the loop has come to ending what was idle for too long."""
    monkeypatch.setattr(upstream_module, "CONNECTION_SECONDS", 0.2)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK)

    async with peer(serve) as url, upstream() as client:
        await (await client.send("POST", url + "/", {}, b"")).read()
        time.sleep(0.3)  # noqa: ASYNC251  the loop stands still
        assert await (await client.send("POST", url + "/", {}, b"")).read() == b"ok"
        assert connections == 2


async def test_a_kept_connection_that_breaks_is_replaced() -> None:
    """The backend answers one request a connection, says nothing of it, and hangs up on the next one."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        await reader.read(1)  # the next request begins: hang up on it, bytes unread

    async with peer(serve) as url, upstream() as client:
        for _ in range(5):
            assert await (await client.send("POST", url + "/", {}, b"{}")).read() == b"ok"
        assert connections == 5


async def test_closing_a_reply_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await writer.drain()
        await reader.read()
        gone.set()

    async with peer(serve) as url, upstream() as client:
        reply = await client.send("POST", url + "/", {}, b"")
        assert await reply.chunk() == b"a"
        reply.close()
        async with asyncio.timeout(1):
            await gone.wait()


async def test_what_nobody_reads_is_not_buffered_without_end() -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"a" * 100_000)
            await writer.drain()
            sent += 100_000

    async with peer(serve) as url, upstream() as client:
        reply = await client.send("POST", url + "/", {}, b"")
        await asyncio.sleep(0.5)
        assert sent < 50_000_000  # sockets buffer some
        size = 0
        while part := await reply.chunk():
            size += len(part)
        assert size == 100_000_000


async def test_a_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * 40_000  # 10 MB
    got = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        got = await reader.readexactly(len(body))
        writer.write(OK)
        await writer.drain()

    async with peer(serve) as url, upstream() as client:
        assert (await client.send("POST", url + "/", {}, body)).status == 200
        assert got == body


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and its self-signed certificate for 127.0.0.1."""
    place = tmp_path_factory.mktemp("tls") / "both.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    try:
        subprocess.run([*command, "-keyout", place, "-out", place.with_suffix(".crt")], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    place.write_text(place.read_text() + place.with_suffix(".crt").read_text())
    return place


async def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with peer(answering(OK, requests=5), tls) as url, upstream() as client:
        with pytest.raises(UpstreamError) as failure:  # a certificate that nobody vouches for
            await client.send("POST", url + "/", {}, b"{}")
        assert failure.value.outcome == "refused"
        assert "CERTIFICATE" in str(failure.value)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # as a deployment adds its own authority
    async with peer(answering(OK, requests=5), tls) as url, upstream() as client:
        for _ in range(3):
            assert await (await client.send("POST", url + "/", {}, b"{}")).read() == b"ok"
        with pytest.raises(UpstreamError) as failure:
            await client.send("POST", url.replace("127.0.0.1", "localhost") + "/", {}, b"{}")
        assert failure.value.outcome == "refused"
