"""The life of a request through a real gateway in front of scripted backends."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import Running, StartGateway


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


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    ("model", "pool", "reason"),
    [
        ("small", "small", "pinned"),
        ("large", "large", "pinned"),
        ("org/small-1b", "small", "pinned"),
        ("org/large-9b", "large", "pinned"),
        ("auto-0", "small", "confident"),
        ("auto-1.0", "large", "unsure"),
    ],
)
async def test_a_model_name_pins_a_pool_or_sets_the_threshold(
    start: StartGateway, endpoint: str, model: str, pool: str, reason: str
) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        if endpoint == "chat":
            answer = await gateway.chat("hard " * 9, model=model)
        else:
            body = {"model": model, "prompt": "hard " * 9}
            answer = await gateway.session.post(f"{gateway.url}/v1/completions", json=body)
        assert (answer.status, answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) == (200, pool, reason)
        backend, name = (small, "org/small-1b") if pool == "small" else (large, "org/large-9b")
        assert backend.seen[0].json["model"] == name
        if reason != "pinned":
            assert float(answer.headers["x-depo-threshold"]) == float(model.removeprefix("auto-"))


@pytest.mark.parametrize("model", ["gpt-7", "Small", "auto-", "auto-1.5", "auto-x", "AUTO", "org", " small"])
async def test_an_unknown_model_is_404(start: StartGateway, model: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        answer = await gateway.chat("easy", model=model)
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "x-request-id" in answer.headers
        assert not small.seen
        assert not large.seen


async def test_a_pinned_pool_that_is_down_is_503_and_no_other_answers(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        await large.kill()
        for _ in range(2):
            answer = await gateway.chat("easy", model="org/large-9b")
            assert answer.status == 503
            assert "pool large" in (await answer.json())["error"]["message"]
        assert not small.seen


async def test_system_and_tool_text_does_not_change_the_score(start: StartGateway) -> None:
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"sticky": False}) as gateway,
    ):

        async def confidence(messages: list[dict[str, Any]], **fields: Any) -> str:
            body = {"model": "auto", "messages": messages, **fields}
            answer = await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body)
            assert answer.status == 200
            return answer.headers["x-depo-confidence"]

        user = {"role": "user", "content": "what is the sum of two"}
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"q": "hard theorem"}'}}
        huge = "prove the hard theorem " * 20_000
        plain = await confidence([user])
        assert await confidence([{"role": "system", "content": huge}, user]) == plain
        assert await confidence([{"role": "developer", "content": huge}, user]) == plain
        loop = [
            user,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": huge},
        ]
        assert await confidence(loop) == plain
        tools = [{"type": "function", "function": {"name": "f", "description": huge}}]
        assert await confidence([user], tools=tools) == plain
        parts = [{"type": "text", "text": user["content"]}]
        assert await confidence([{"role": "user", "content": parts}]) == plain
        assert await confidence([{"role": "user", "content": "hard " + user["content"]}]) != plain
        earlier = [{"role": "user", "content": "hard hard"}, {"role": "assistant", "content": "hard"}]
        assert await confidence([*earlier, user]) != plain


async def test_completions_are_scored_by_their_prompt(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        async def complete(prompt: Any, model: str = "auto") -> tuple[int, str | None, Any]:
            body = {"model": model, "prompt": prompt}
            answer = await gateway.session.post(f"{gateway.url}/v1/completions", json=body)
            return answer.status, answer.headers.get("x-depo-pool"), await answer.json()

        assert (await complete("what is the easy sum"))[:2] == (200, "small")
        assert (await complete("hard " * 9))[:2] == (200, "large")
        assert (await complete(["hard " * 9, "hard " * 9]))[:2] == (200, "large")
        assert (await complete(""))[0] == 200
        assert (await complete([""]))[0] == 200
        for ids in ([1, 2, 3], [[1, 2], [3]], None, {}):
            status, _, body = await complete(ids)
            assert (status, body["error"]["code"], body["error"]["param"]) == (400, "prompt_not_routable", "prompt")
            assert "name a pool" in body["error"]["message"]
        assert (await complete([1, 2, 3], "small"))[:2] == (200, "small")


async def test_what_the_small_pool_can_not_take_goes_up(start: StartGateway) -> None:
    small_pool = {"context_tokens": 1000, "accepts": ["text", "tools"]}
    large_pool = {"accepts": ["text", "image"]}
    picture = [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "easy"}]
    sound = [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], small=small_pool, large=large_pool) as gateway,
    ):

        async def sent(content: Any, **fields: Any) -> tuple[int, str | None, str | None]:
            answer = await gateway.chat(content, **fields)
            return answer.status, answer.headers.get("x-depo-pool"), answer.headers.get("x-depo-reason")

        assert await sent("easy sum") == (200, "small", "confident")
        assert await sent("easy " * 2000) == (200, "large", "context")
        assert await sent("easy sum", max_tokens=2000) == (200, "large", "context")
        assert await sent(picture) == (200, "large", "accepts")
        assert await sent("hard " * 9, tools=tools) == (200, "small", "confident")  # the large one takes no tools
        refused = await gateway.chat(sound)  # type: ignore[arg-type]
        error = (await refused.json())["error"]
        assert (refused.status, error["code"]) == (400, "modality_not_accepted")
        assert "audio" in error["message"]
        assert (await gateway.chat(picture, model="small")).status == 200  # type: ignore[arg-type]  # pinned


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"auto","messages":[{"role":"user","content":NaN}]}'])
async def test_a_bad_body_is_400_and_reaches_no_backend(start: StartGateway, body: bytes) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        for path in ("chat/completions", "completions", "embeddings"):
            answer = await gateway.session.post(f"{gateway.url}/v1/{path}", data=body)
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_json")
        assert not small.seen
        assert not large.seen


async def test_request_ids_are_passed_along_and_made_up(start: StartGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        async def id_for(given: str) -> str:
            headers = {"x-request-id": given, "traceparent": "00-ab-cd-01", "cookie": "secret"}
            answer = await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers)
            assert small.seen[-1].headers["x-request-id"] == answer.headers["x-request-id"]
            return answer.headers["x-request-id"]

        assert await id_for("mine-1.2:3") == "mine-1.2:3"
        for odd in ("", "a b", "x" * 129, "é"):
            assert (await id_for(odd)).startswith("req-")
        assert small.seen[-1].headers["traceparent"] == "00-ab-cd-01"
        assert "cookie" not in small.seen[-1].headers


async def test_random_routing_by_share_follows_the_traffic(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        async def shares() -> dict[str, float]:
            answer = await gateway.session.get(f"{gateway.admin}/admin/status")
            return (await answer.json())["shares"]  # type: ignore[no-any-return]

        for index in range(10):
            await gateway.chat(f"easy {index}")
        before = await shares()
        assert before["small"] > 0.52
        assert sum(before.values()) == pytest.approx(1.0, abs=1e-3)
        for model in ("large", "small"):
            await gateway.chat("easy", model=model)
        body = {"model": "auto", "prompt": "easy"}
        await gateway.session.post(f"{gateway.url}/v1/route", json=body)
        assert await shares() == before  # neither pinned requests nor questions count


# A policy's checkpoint, as depo-train rl leaves it: it scores one pool, by the policy's chat template, in one stage.


def policy(checkpoint: Path, deadline_ms: float = 5000, **routing: Any) -> dict[str, Any]:
    return {
        "estimator": {"path": str(checkpoint), "deadline_ms": deadline_ms},
        "routing": {"rule": "difficulty", "threshold": 0.5, **routing},
    }


async def both_ways(gateway: Running, endpoint: str = "chat/completions", **fields: Any) -> tuple[str, str, str]:
    """Pool, reason and confidence of a request, which /v1/route gave as well."""
    body = {"model": "auto", **fields}
    decided = await gateway.session.post(f"{gateway.url}/v1/route", json=body)
    answer = await gateway.session.post(f"{gateway.url}/v1/{endpoint}", json=body)
    assert (decided.status, answer.status) == (200, 200)
    names = [f"x-depo-{name}" for name in ("pool", "reason", "confidence")]
    of_route, of_answer = (tuple(item.headers.get(name, "") for name in names) for item in (decided, answer))
    assert of_route == of_answer
    return of_answer  # type: ignore[return-value]


async def test_a_policys_checkpoint_reads_the_system_message(
    start: StartGateway, tiny_policy_checkpoint: Path, tiny_checkpoint: Path
) -> None:
    user = {"role": "user", "content": "what is the sum"}
    chats = {word: [{"role": "system", "content": f"be {word}"}, user] for word in ("easy", "hard")}
    chats["parts"] = [{"role": "system", "content": [{"type": "text", "text": "be hard"}]}, user]
    for checkpoint, differ in ((tiny_policy_checkpoint, True), (tiny_checkpoint, False)):
        sections = policy(checkpoint, sticky=False)
        async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
            seen = {name: await both_ways(gateway, messages=messages) for name, messages in chats.items()}
            assert (seen["easy"] != seen["hard"]) is differ
            assert seen["parts"] == seen["hard"]
            if differ:
                assert [seen["easy"][:2], seen["hard"][:2]] == [("small", "confident"), ("large", "unsure")]
                written = "<s>system be hard</s>user what is the sum</s>assistant "
                assert await both_ways(gateway, "completions", prompt=written) == seen["hard"]
                tool = {"role": "tool", "tool_call_id": "c", "content": "5"}  # which this policy's template refuses
                assert (await both_ways(gateway, messages=[*chats["hard"], tool]))[0] == "large"
            answer = await gateway.chat("hard", model="small")
            assert answer.headers["x-depo-reason"] == "pinned"
            outcomes = {
                name: await gateway.metric("gateway_estimator_outcomes_total", outcome=name)
                for name in ("full", "cached", "error")
            }
            assert outcomes == (
                {"full": 3, "cached": 7, "error": 0} if differ else {"full": 1, "cached": 5, "error": 0}
            )


@pytest.mark.parametrize(("threshold", "pool"), [(0.0, "small"), (1.0, "large")])
async def test_a_policys_checkpoint_out_of_time_is_overload(
    start: StartGateway, tiny_policy_checkpoint: Path, threshold: float, pool: str
) -> None:
    """There is no cheap stage, so a coin decides at the share that the policy is not sure of."""
    sections = policy(tiny_policy_checkpoint, deadline_ms=0, threshold=threshold, on_overload="share")
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        seen = {await both_ways(gateway, messages=[{"role": "user", "content": f"easy {i}"}]) for i in range(6)}
        assert seen == {(pool, "overload", "")}
        assert await gateway.metric("gateway_estimator_outcomes_total", outcome="deadline") == 12
        assert await gateway.metric("gateway_estimator_duration_seconds_count", stage="cheap") == 0


async def test_a_policys_checkpoint_under_gain_stops_the_start(
    start: StartGateway, tiny_policy_checkpoint: Path
) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        with pytest.raises(ValueError, match=r"scores one pool \(policy\) and can't route by gain"):
            async with start([small], [large], **policy(tiny_policy_checkpoint, rule="gain")):
                pass
