"""The real openai client, unchanged: upstream receives its JSON but the model, it receives upstream's bytes."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateway.backend import USAGE, FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway

try:
    import httpx2 as httpx  # openai's since 3
except ImportError:
    import httpx  # type: ignore[no-redef]

MESSAGES: list[Any] = [{"role": "system", "content": "Be é."}, {"role": "user", "content": "the easy question"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"model": {"type": "string"}}}},
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}}
CHAT: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False},
    {"logprobs": True, "top_logprobs": 3},
    {"response_format": SCHEMA},
    {"max_completion_tokens": 77, "n": 2, "seed": 2**53, "temperature": 1e-5, "stop": ["\n\n", "é"]},
    {"reasoning_effort": "low", "metadata": {"model": "not this one"}, "logit_bias": {"50256": -100}},
    {"extra_body": {"guided_json": {"model": "x"}, "tomorrows_field": [1, {"a": None}], "top_k": 20}},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "once upon a time"},
    {"prompt": ["one", "two"], "n": 2, "echo": True, "logprobs": 5, "suffix": " end", "best_of": 3},
    {"prompt": "x", "extra_body": {"min_p": 0.05, "prompt_logprobs": 1}},
]


class Wire(httpx.AsyncBaseTransport):
    """httpx's own transport, which notes what the client sent and the bytes it got."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self.sent: list[bytes] = []
        self.got: list[list[bytes]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(await request.aread())
        self.got.append([])
        response = await self._inner.handle_async_request(request)
        stream, noted = response.stream, self.got[-1]
        assert isinstance(stream, httpx.AsyncByteStream)

        class Tee(httpx.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                async for chunk in stream:
                    noted.append(chunk)
                    yield chunk

            async def aclose(self) -> None:
                await stream.aclose()

        return httpx.Response(
            response.status_code, headers=response.headers, stream=Tee(), extensions=response.extensions
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


def client(gateway: Running, wire: Wire) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=gateway.url + "/v1",
        api_key="unused",
        max_retries=0,
        timeout=20,
        http_client=httpx.AsyncClient(transport=wire, timeout=20),
    )


def compare(wire: Wire, upstream: FakeVllm, usage_added: bool) -> None:
    sent, received = json.loads(wire.sent[-1]), json.loads(upstream.seen[-1].body)
    assert received.pop("model") == "org/small-1b"
    assert sent.pop("model") == "auto-0"
    if usage_added:
        assert received.pop("stream_options") == {"include_usage": True}
    assert received == sent
    if not usage_added:  # and not only the same JSON: the same bytes
        assert upstream.seen[-1].body == wire.sent[-1].replace(b'"model":"auto-0"', b'"model":"org/small-1b"', 1)


@pytest.mark.parametrize(("stream", "asked"), [(False, False), (True, False), (True, True)])
async def test_chat_and_completions_pass_unchanged(start: StartGateway, stream: bool, asked: bool) -> None:
    options: dict[str, Any] = {"stream": True} if stream else {}
    if asked:
        options["stream_options"] = {"include_usage": True}
    wire = Wire()
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large]) as gateway,
        client(gateway, wire) as ai,
    ):
        calls = [(ai.chat.completions.create, {"messages": MESSAGES, **fields}) for fields in CHAT]
        calls += [(ai.completions.create, fields) for fields in COMPLETIONS]  # type: ignore[list-item]
        for create, fields in calls:
            answer: Any = await create(model="auto-0", **fields, **options)  # type: ignore[call-overload]
            upstream = small
            if stream:
                chunks = [chunk async for chunk in answer]
                assert len(chunks) == small.script.events + asked
                events = upstream.events(upstream.seen[-1], upstream.script)
                expected = [event for event in events if asked or b'"usage": {' not in event]
                assert b"".join(wire.got[-1]) == b"".join(expected)
                if asked:
                    assert chunks[-1].usage.total_tokens == USAGE["total_tokens"]
            else:
                assert answer.usage.completion_tokens == USAGE["completion_tokens"]
                assert b"".join(wire.got[-1]) == upstream._whole(upstream.seen[-1].path, upstream.script)
            compare(wire, upstream, stream and not asked)
        assert (len(small.seen), len(large.seen)) == (len(calls), 0)


async def test_raw_bytes_and_headers_of_an_answer(start: StartGateway) -> None:
    odd = b'{"id":"x","object":"chat.completion","created":1,"choices":[],"usage":null,"big":1e400,"u":"\\u00e9"}\n'
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        small.script = Script(body=odd, headers={"x-vllm-extra": "kept", "server": "uvicorn"})
        raw = await ai.chat.completions.with_raw_response.create(model="auto", messages=MESSAGES)
        assert raw.http_response.content == odd
        assert raw.headers["x-vllm-extra"] == "kept"
        assert raw.headers["x-depo-pool"] == "small"
        assert raw.request_id == raw.headers["x-request-id"] != ""
        assert raw.headers.get_list("content-length") == [str(len(odd))]
        assert len(raw.headers.get_list("content-type")) == 1


@pytest.mark.parametrize("status", [400, 422, 500])
async def test_a_backends_own_error_comes_back_as_it_is(start: StartGateway, status: int) -> None:
    body = b'{"object":"error",  "message":"too hot","code":%d}' % status
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        small.script = Script(status=status, body=body)
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as caught:
                await ai.chat.completions.create(model="auto", messages=MESSAGES, stream=stream)  # type: ignore[call-overload]
            assert (caught.value.status_code, caught.value.response.content) == (status, body)


async def test_the_gateways_own_errors_are_the_clients_exceptions(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        with pytest.raises(openai.NotFoundError) as missing:
            await ai.chat.completions.create(model="gpt-7", messages=MESSAGES)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        assert "auto, small, large" in missing.value.message
        with pytest.raises(openai.BadRequestError) as bad:
            await ai.chat.completions.create(model="auto", messages=[])
        assert bad.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="token ids"):
            await ai.completions.create(model="auto", prompt=[1, 2, 3])
        assert (await ai.completions.create(model="org/large-9b", prompt=[1, 2, 3])).choices
        assert large.seen[-1].json["prompt"] == [1, 2, 3]


async def test_models_can_be_listed_and_retrieved(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        listed = [model.id async for model in ai.models.list()]
        assert listed == ["auto", "small", "large", "org/small-1b", "org/large-9b"]
        assert (await ai.models.retrieve("org/small-1b")).id == "org/small-1b"


async def test_a_stream_that_its_client_leaves_is_left_upstream(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        small.script = Script(between_s=0.05, events=1000)
        stream = await ai.chat.completions.create(model="auto", messages=MESSAGES, stream=True)
        async for _ in stream:
            break
        await stream.close()
        assert await small.wait_for(lambda: small.seen[0].closed is not None, 2.0)
        assert await gateway.settles("gateway_client_disconnects_total", 1, phase="streaming")
        assert await gateway.settles("gateway_in_flight_requests", 0)


async def test_a_cancelled_task_is_left_upstream(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway, client(
        gateway, Wire()
    ) as ai:  # fmt: skip
        small.script = Script(before_head_s=30)
        task = asyncio.create_task(ai.chat.completions.create(model="auto", messages=MESSAGES))
        assert await small.wait_for(lambda: bool(small.seen))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await small.wait_for(lambda: small.seen[0].closed is not None, 2.0)


async def test_the_synchronous_client_too(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        def talk() -> tuple[str | None, str]:
            with OpenAI(base_url=gateway.url + "/v1", api_key="unused", max_retries=0) as ai:
                whole = ai.chat.completions.create(model="auto", messages=MESSAGES)
                with ai.chat.completions.create(model="auto", messages=MESSAGES, stream=True) as stream:
                    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
                return whole.choices[0].message.content, "".join(parts)

        whole, streamed = await asyncio.to_thread(talk)
        assert whole == small.script.text
        assert streamed == "".join(f"{small.script.text} {index}" for index in range(5))
