"""HTTP/1.1 over raw sockets: what is refused and how, what is read, and how connections live and end."""

import asyncio
import gc
import json
import socket
import time

import pytest

from depo_gateway.gateway import http_protocol
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import StartGateway
from tests.gateway.wire import chat, connect, request


async def test_a_head_over_the_cap_gets_431_and_the_connection_ends(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one], limits={"header_bytes": 2048}) as gateway:
        async with connect(gateway.url) as wire:  # whole in one write
            await wire.send(request(x_long="a" * 4000))
            answer = await wire.answer()
            assert (answer.status, answer.error["code"]) == (431, "invalid_http")
            assert "header_bytes" in answer.error["message"]
            assert await wire.closed()
        async with connect(gateway.url) as wire:  # never ends
            await wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n")
            for index in range(30):
                await wire.send(b"x-%d: %b\r\n" % (index, b"a" * 100))
            assert (await wire.answer()).status == 431
        async with connect(gateway.url) as wire:
            await wire.send(b"GET /" + b"a" * 4000)
            assert (await wire.answer()).status == 431
        async with connect(gateway.url) as wire:
            await wire.send(request())
            assert (await wire.answer()).status == 200
    assert len(one.seen) == 1


async def test_431_reaches_a_client_that_is_still_sending(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one], limits={"header_bytes": 2048}) as gateway:
        for _ in range(5):  # closing with bytes unread resets the connection, and the answer is lost: a race
            async with connect(gateway.url) as wire:
                await wire.send(request(x_long="a" * 4_000_000))
                assert (await wire.answer()).status == 431


async def test_trailers_and_chunk_extensions_count_as_head(start: StartGateway) -> None:
    begun = request(b"", content_length="", transfer_encoding="chunked")
    body = json.dumps(chat()).encode()
    whole = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    async with FakeVllm() as one, start([one], [one], limits={"header_bytes": 2048}) as gateway:
        async with connect(gateway.url) as wire:
            await wire.send(begun + whole + b"x-checksum: 1\r\n\r\n")
            assert (await wire.answer()).status == 200
        for endless in (whole + b"x-trailer: ", b"5;"):
            async with connect(gateway.url) as wire:
                await wire.send(begun + endless)
                for _ in range(8):
                    await wire.send(b"a" * 1000)
                    await asyncio.sleep(0.01)
                assert (await wire.answer()).status == 431
    assert len(one.seen) == 1


async def test_a_trailer_does_not_become_a_header(start: StartGateway) -> None:
    digest = "0" * 64
    async with (
        FakeVllm() as one,
        start([one], [one], auth={"keys": [{"name": "a", "sha256": digest}]}) as gateway,
        connect(gateway.url) as wire,
    ):
        body = json.dumps(chat()).encode()
        await wire.send(
            request(b"", content_length="", transfer_encoding="chunked")
            + b"%x\r\n%b\r\n0\r\nauthorization: Bearer wrong\r\n\r\n" % (len(body), body)
        )
        assert (await wire.answer()).error["code"] == "missing_api_key"


async def test_a_slow_head_is_cut_off(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.5)
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        started = time.monotonic()
        await wire.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
        for _ in range(4):
            await asyncio.sleep(0.1)
            await wire.send(b"x")
        assert await wire.closed(3)
        assert time.monotonic() - started > 0.45
        async with connect(gateway.url) as idle:  # a connection on which nothing was ever sent
            assert await idle.closed(3)
        async with connect(gateway.url) as second:  # the deadline is for each head anew
            for _ in range(3):
                await second.send(request())
                assert (await second.answer()).status == 200
                await asyncio.sleep(0.3)


@pytest.mark.parametrize(
    "broken",
    [
        request(transfer_encoding="chunked"),  # request smuggling: two framings (RFC 9112 6.3)
        request().replace(b"\r\nhost", b"\r\ncontent-length: 3\r\nhost"),
        request().replace(b"\r\n", b"\n"),  # bare LF
        request().replace(b"host: gateway", b"host : gateway"),
        request(content_length="-1"),
        request(b"zz\r\n", content_length="", transfer_encoding="chunked"),
        request(b"", content_length="", transfer_encoding="gzip"),
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS on a plain port
        request(x_null="a\0b"),
    ],
    ids=["CL+TE", "two CL", "bare LF", "space", "negative", "bad chunk", "gzip", "TLS", "NUL"],
)
async def test_broken_http_gets_400_as_an_openai_error(start: StartGateway, broken: bytes) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        await wire.send(broken)
        answer = await wire.answer()
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert answer.headers["content-type"] == "application/json"
        assert await wire.closed()
        assert not one.seen


async def test_a_body_over_the_cap_gets_413_also_while_it_is_still_being_sent(start: StartGateway) -> None:
    large = json.dumps(chat("easy " * 600_000)).encode()  # 3 MB, more than socket buffers hold
    async with FakeVllm() as one, start([one], [one], limits={"body_bytes": 10_000}) as gateway:
        for _ in range(3):
            async with connect(gateway.url) as wire:
                await wire.send(request(large))
                answer = await wire.answer()
                assert (answer.status, answer.error["code"]) == (413, "body_too_large")
                assert await wire.closed()
            async with connect(gateway.url) as wire:
                await wire.send(request(b"", content_length="", transfer_encoding="chunked"))
                for _ in range(100):
                    await wire.send(b"3e8\r\n%b\r\n" % (b"x" * 1000))
                assert (await wire.answer()).status == 413
        async with connect(gateway.url) as wire:  # an honest client waits to be asked
            await wire.send(request(b"", content_length="20000", expect="100-continue"))
            assert (await wire.answer()).status == 413
            assert wire.informational == []
        async with connect(gateway.url) as wire:  # at the cap, to the byte
            body = json.dumps(chat()).encode()
            await wire.send(request(body + b" " * (10_000 - len(body))))
            assert (await wire.answer()).status == 200
    assert len(one.seen) == 1


async def test_bodies_arrive_however_they_are_sent(start: StartGateway) -> None:
    body = json.dumps(chat("easy " * 2000)).encode()
    async with FakeVllm() as one, start([one], [one]) as gateway:
        async with connect(gateway.url) as wire:
            await wire.send(request(b"", content_length="", transfer_encoding="chunked"))
            for at in range(0, len(body), 777):
                piece = body[at : at + 777]
                await wire.send(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
            await wire.send(b"0\r\n\r\n")
            assert (await wire.answer()).status == 200
            for byte in (whole := request(chat("slow"))):  # the same connection, a byte at a time
                await wire.send(bytes((byte,)))
                if byte == whole[-1]:
                    await asyncio.sleep(0)
            assert (await wire.answer()).status == 200
            await wire.send(request(b"", expect="100-continue", content_length=str(len(body))))
            async with asyncio.timeout(5):
                assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await wire.send(body)
            assert (await wire.answer()).status == 200
        sent = [json.loads(seen.body)["messages"] for seen in one.seen]
        assert sent == [chat("easy " * 2000)["messages"], chat("slow")["messages"], chat("easy " * 2000)["messages"]]
        assert "expect" not in one.seen[2].headers


async def test_pipelined_requests_are_answered_in_order(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        small.script = Script(before_head_s=0.2)
        async with connect(gateway.url) as wire:
            three = [request(chat(model=model, stream=stream)) for model, stream in
                     (("small", True), ("large", False), ("small", False))]  # fmt: skip
            await wire.send(three[0] + three[1])
            await wire.send(three[2])
            answers = [await wire.answer() for _ in three]
            assert [answer.headers["x-depo-pool"] for answer in answers] == ["small", "large", "small"]
            assert answers[0].body.endswith(b"data: [DONE]\n\n")
            await wire.send(request())
            assert (await wire.answer()).status == 200


async def test_a_pipelined_mistake_does_not_land_in_the_answer_before_it(start: StartGateway) -> None:
    script = Script(events=4, between_s=0.1)
    for broken in (b"GARBAGE\r\n\r\n", request(x_long="a" * 4000)):
        async with (
            FakeVllm(script=script) as one,
            start([one], [one], limits={"header_bytes": 2048}) as gateway,
            connect(gateway.url) as wire,
        ):
            await wire.send(request(chat(stream=True)) + broken)
            answer = await wire.answer()
            assert answer.status == 200
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert b"error" not in answer.body
            async with asyncio.timeout(5):
                rest = await wire.reader.read()
            assert rest == b"" or rest.startswith(b"HTTP/1.1 4")


async def test_hanging_up_behind_a_pipelined_request_is_noticed(start: StartGateway) -> None:
    for stream in (False, True):
        async with FakeVllm(script=Script(before_head_s=30)) as one, start([one], [one]) as gateway:
            async with connect(gateway.url) as wire:
                await wire.send(request(chat(stream=stream)) + request())
                assert await one.wait_for(lambda: bool(one.seen))
                await wire.send(request())
                await asyncio.sleep(0.05)
            assert await one.wait_for(lambda: one.seen[0].closed is not None, 1.0)
            assert await gateway.settles("gateway_in_flight_requests", 0)
            assert len(one.seen) == 1  # nobody is left to read the others' answers


async def test_http_1_0_gets_no_chunks_and_a_close(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway:
        for stream in (False, True):
            async with connect(gateway.url) as wire:
                await wire.send(request(chat(stream=stream), version="1.0"))
                answer = await wire.answer()
                assert answer.status == 200
                assert "transfer-encoding" not in answer.headers  # RFC 9112 6.1
                assert answer.headers["connection"] == "close"
                assert answer.body.endswith(b"data: [DONE]\n\n" if stream else b"}")
                assert await wire.closed()


async def test_a_connection_serves_request_after_request(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        for index in range(20):
            await wire.send(request(chat(stream=bool(index % 2))))
            answer = await wire.answer()
            assert answer.status == 200
            assert answer.whole
        await wire.send(request(connection="close"))
        assert (await wire.answer()).headers["connection"] == "close"
        assert await wire.closed()
        assert len(one.seen) == 21


async def test_an_error_leaves_the_connection_usable(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        for body, status in ((b"{", 400), (chat(model="nobody"), 404), (chat(), 200)):
            await wire.send(request(body))
            assert (await wire.answer()).status == status


async def test_other_methods_on_the_hot_paths_get_405(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            for method in ("GET", "PUT", "DELETE", "OPTIONS"):
                await wire.send(request(b"", path=path, method=method))
                answer = await wire.answer()
                assert (answer.status, answer.headers["allow"]) == (405, "POST"), (method, path)
                assert answer.error["type"] == "invalid_request_error"
            await wire.send(request(b"", path=path, method="HEAD"))
            assert (await wire.answer(body=False)).status == 405  # and no body: the next answer follows at once
        await wire.send(request())
        assert (await wire.answer()).status == 200


async def test_nagle_is_off_on_both_sides(start: StartGateway) -> None:
    """Looks at this process's own sockets: the gateway's are among them."""
    async with (
        FakeVllm(script=Script(before_head_s=0.3)) as one,
        start([one], [one]) as gateway,
        connect(gateway.url) as wire,
    ):
        await wire.send(request())
        assert await one.wait_for(lambda: bool(one.seen))
        ours = wire.writer.get_extra_info("sockname")
        listening = int(gateway.url.rsplit(":", 1)[1])
        sides = {}
        for item in gc.get_objects():
            if not issubclass(type(item), asyncio.Transport) or item.is_closing():
                continue
            made, here, there = (item.get_extra_info(name) for name in ("socket", "sockname", "peername"))
            if here and here[1] == listening and there == ours:
                sides["server"] = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if there and there[1] == one.port:
                sides["upstream"] = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert set(sides) == {"server", "upstream"}
        assert all(sides.values())
        assert (await wire.answer()).status == 200


async def test_an_offer_of_http_2_is_passed_over(start: StartGateway) -> None:
    """As Java's HttpClient makes it with every request, a body included."""
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        for _ in range(2):
            await wire.send(request(**offer))
            answer = await wire.answer()
            assert (answer.status, "upgrade" in answer.headers) == (200, False)
        assert one.seen[1].json["messages"] == chat()["messages"]
        assert not {"upgrade", "http2-settings"} & set(one.seen[0].headers)


async def test_more_pipelined_than_is_read_ahead(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        count = 600  # about 100 kB
        sending = asyncio.create_task(wire.send(request() * count))
        assert {(await wire.answer()).status for _ in range(count)} == {200}
        await sending
        assert len(one.seen) == count


async def test_a_client_that_stops_reading_is_given_up(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "STALLED_SECONDS", 0.5)
    script = Script(text="word " * 40_000, events=300)  # 60 MB, more than the sockets' buffers on the way hold
    async with FakeVllm(script=script) as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        await wire.send(request(chat(stream=True)))
        await wire.head()
        assert await one.wait_for(lambda: one.seen[0].closed is not None)
        assert one.seen[0].finished is None
        assert await gateway.settles("gateway_in_flight_requests", 0)
        assert await gateway.metric("gateway_client_disconnects_total", phase="streaming") == 1


async def test_a_slow_reader_gets_every_byte_and_slows_the_backend_down(start: StartGateway) -> None:
    script = Script(text="word " * 40_000, events=300)
    async with FakeVllm(script=script) as one, start([one], [one]) as gateway, connect(gateway.url) as wire:
        await wire.send(request(chat(stream=True)))
        head = await wire.head()
        await asyncio.sleep(0.3)
        assert one.seen[0].finished is None  # back-pressure: the backend could not get rid of 60 MB
        assert head.status == 200
        size = 0
        async for chunk in wire.chunks():
            size += len(chunk)
        events = [event for event in one.events(one.seen[0], script) if b'"usage"' not in event]
        assert size == sum(map(len, events))
