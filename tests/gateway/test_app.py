"""The life of a request through a real gateway in front of scripted backends."""

import json

from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import StartGateway


async def test_an_easy_prompt_stays_small_and_a_hard_one_goes_large(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        easy = await gateway.chat("what is the easy sum")
        hard = await gateway.chat("prove the hard theorem")
        assert (easy.status, easy.headers["x-depo-pool"], easy.headers["x-depo-reason"]) == (200, "small", "confident")
        assert (hard.status, hard.headers["x-depo-pool"], hard.headers["x-depo-reason"]) == (200, "large", "unsure")
        assert float(easy.headers["x-depo-confidence"]) > 0.85 > float(hard.headers["x-depo-confidence"])
        assert (len(small.seen), len(large.seen)) == (1, 1)
        assert large.seen[0].json["model"] == "org/large-9b"


async def test_a_stream_comes_back_byte_for_byte_without_the_usage_we_asked_for(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        answer = await gateway.chat("easy", stream=True)
        body = await answer.read()
        sent = small.seen[0].json
        assert sent["stream_options"] == {"include_usage": True}
        events = [event for event in small.events(small.seen[0], small.script) if b'"usage"' not in event]
        assert body == b"".join(events)
        assert await gateway.settles("gateway_tokens_total", 5, pool="small", type="completion")
        assert json.loads(body.split(b"\n\n")[0][6:])["choices"][0]["delta"]
