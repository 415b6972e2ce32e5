"""Through the gateway as from vLLM itself: two real servers on the demo's checkpoints, their answers byte for byte."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from depo_gateway import estimator
from tests.gateway.conftest import running
from tests.vllm.conftest import DEMO_DATA, PYTHON
from tests.vllm.front import PATHS, Message, settings, watched
from tests.vllm.servers import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no Python that has vLLM"),
]
Servers = dict[str, VllmServer]
COMMANDS = Path(sys.executable).parent
BUILTIN = Path(estimator.__file__).parent / "builtin" / "manifest.json"

SCHEMA = {"type": "object", "properties": {"a": {"enum": [3, 4]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CHAT = {"messages": [{"role": "user", "content": "3+4*9-2="}], "temperature": 0, "max_tokens": 40}
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "3+4="}]},
    {"role": "assistant", "content": "3+4=7"},
    {"role": "user", "content": "7*5="},
]
TEXT = {"prompt": "3+4*9-2=", "temperature": 0, "max_tokens": 40}
SAME = {
    "chat": ("chat", CHAT),
    "turns": ("chat", {**CHAT, "messages": TURNS}),
    "logprobs": ("chat", {**CHAT, "logprobs": True, "top_logprobs": 3}),
    "sampled": ("chat", {**CHAT, "temperature": 1, "seed": 7, "n": 2, "top_p": 0.9}),
    "unknown fields": ("chat", {**CHAT, "tomorrow": {"deep": [1, None]}, "metadata": {"model": "mine"}}),
    "vLLM's own fields": ("chat", {**CHAT, "ignore_eos": True, "min_p": 0.1, "return_token_ids": True}),
    "tools that are not to be used": ("chat", {**CHAT, "tools": [TOOL], "tool_choice": "none"}),
    "json_schema": (
        "chat",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    ),
    "completion": ("completions", TEXT),
    "completion's logprobs": ("completions", {**TEXT, "logprobs": 3, "echo": True}),
    "prompts": ("completions", {**TEXT, "prompt": ["1+1=", "9*9*9="]}),
}
REFUSED = {
    "tools without a parser": ("chat", {**CHAT, "tools": [TOOL]}),
    "a named tool without a parser": (
        "chat",
        {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
    ),
    "no tokens": ("chat", {**CHAT, "max_tokens": 0}),
    "greedy twice": ("completions", {**TEXT, "n": 2}),
    "too many logprobs": ("completions", {**TEXT, "logprobs": 100}),
    "a strange role": ("chat", {**CHAT, "messages": [{"role": 5, "content": "1+1="}]}),
}


@pytest.mark.parametrize("name", SAME)
async def test_answers_are_vllms_own(name: str, servers: Servers, checkpoint: Path) -> None:
    endpoint, fields = SAME[name]
    async with watched(servers, checkpoint) as front:
        for model in ("auto", "small", "demo/large"):
            seen = await front.ask(endpoint, model, fields)
            assert seen.ours.status == 200
            assert seen.ours.body == seen.answer.body
            assert seen.ours.headers["content-type"] == seen.answer.headers["content-type"]
            pool = seen.ours.headers["x-depo-pool"]
            assert seen.sent.body == json.dumps({"model": f"demo/{pool}", **fields}).encode()
            direct = await front.ask_vllm(endpoint, seen, fields)
            assert seen.ours.timeless() == direct.timeless()


@pytest.mark.parametrize("name", SAME)
async def test_streams_are_vllms_own(name: str, servers: Servers, checkpoint: Path) -> None:
    endpoint, fields = SAME[name]
    fields = {key: value for key, value in fields.items() if key != "echo"} | {"stream": True}
    asking = {**fields, "stream_options": {"include_usage": True}}
    async with watched(servers, checkpoint) as front:
        for model in ("auto", "small", "large"):
            seen = await front.ask(endpoint, model, fields)
            assert seen.ours.status == 200
            assert seen.ours.body == seen.answer.as_a_client_sees_it()
            assert seen.ours.events[-1] == b"data: [DONE]\n\n"
            assert (b'"usage":{' in seen.answer.body, b'"usage":{' in seen.ours.body) == (True, False)
            assert seen.ours.headers["content-type"] == seen.answer.headers["content-type"]
            pool = seen.ours.headers["x-depo-pool"]
            assert json.loads(seen.sent.body) == {"model": f"demo/{pool}", **asking}
            # vLLM puts the tokens that wait for a slow reader into one event: two streams are alike in what they say.
            assert said(seen.ours) == said(await front.ask_vllm(endpoint, seen, fields))
            asked = await front.ask(endpoint, model, asking)
            assert asked.ours.body == asked.answer.body
            assert b'"usage":{' in asked.ours.body
            assert asked.sent.body == json.dumps({"model": f"demo/{pool}", **asking}).encode()


@pytest.mark.parametrize("name", REFUSED)
async def test_errors_are_vllms_own(name: str, servers: Servers, checkpoint: Path) -> None:
    endpoint, fields = REFUSED[name]
    async with watched(servers, checkpoint) as front:
        for model in ("auto", "large"):
            for stream in (False, True):
                seen = await front.ask(endpoint, model, {**fields, "stream": stream})
                direct = await front.ask_vllm(endpoint, seen, {**fields, "stream": stream})
                assert seen.ours.body == seen.answer.body == direct.body
                assert seen.ours.status == seen.answer.status == direct.status
                if not stream:  # some mistakes in a stream come as its first event, after a 200
                    assert direct.status == 400
                    assert set(json.loads(direct.body)["error"]) == {"message", "type", "param", "code"}


async def test_a_prompt_too_long_for_the_small_model_is_served_by_the_large_one(
    servers: Servers, checkpoint: Path
) -> None:
    long = {**CHAT, "messages": [{"role": "user", "content": "1+" * 300 + "1="}]}  # 602 tokens, estimated as 170
    contexts = {name: {"context_tokens": server.context} for name, server in servers.items()}
    async with watched(servers, checkpoint, **contexts) as front:
        for stream in (False, True):
            seen = await front.ask("chat", "auto-0", {**long, "stream": stream})
            assert (seen.ours.headers["x-depo-pool"], seen.ours.headers["x-depo-reason"]) == ("large", "context")
            assert seen.ours.status == 200
            assert seen.ours.body == (seen.answer.as_a_client_sees_it() if stream else seen.answer.body)
            assert front.wires["small"].answer.status == 400
        seen = await front.ask("chat", "small", long)
        assert (seen.ours.status, seen.ours.headers["x-depo-pool"]) == (400, "small")
        assert seen.ours.body == seen.answer.body
        assert b"maximum context length is 512 tokens" in seen.ours.body
        longer = {**CHAT, "messages": [{"role": "user", "content": "1+" * 1500 + "1="}]}
        seen = await front.ask("chat", "auto-0", longer)
        assert (seen.ours.status, seen.ours.headers["x-depo-pool"]) == (400, "large")
        assert seen.ours.body == seen.answer.body


async def test_tokens_are_counted_as_vllm_counts_them(servers: Servers, checkpoint: Path) -> None:
    kinds = {"prompt": "vllm:prompt_tokens_total", "completion": "vllm:generation_tokens_total"}
    before = {name: server.metrics() for name, server in servers.items()}
    sums: dict[tuple[str, str], int] = {}
    async with running(settings(servers, checkpoint)) as gateway:
        for index in range(12):
            endpoint, fields = ("chat", CHAT) if index % 2 else ("completions", TEXT)
            model, stream = ("small", "large")[index // 2 % 2], index % 3 == 0
            options = {"stream": True, "stream_options": {"include_usage": True}} if index % 6 == 0 else {}
            body = {"model": model, **fields, "stream": stream, **options, "max_tokens": 5 + index}
            async with gateway.session.post(gateway.url + PATHS[endpoint], json=body) as answer:
                text = await answer.text()
            if stream and not options:
                assert "usage" not in text
                continue
            last = [json.loads(line[6:]) for line in text.splitlines() if '"usage":{' in line][-1] if stream else None
            usage = (last or json.loads(text))["usage"]
            for kind in kinds:
                sums[model, kind] = sums.get((model, kind), 0) + usage[f"{kind}_tokens"]
        for name, server in servers.items():
            after = server.metrics()
            for kind, vllms in kinds.items():
                counted = await gateway.metric("gateway_tokens_total", pool=name, type=kind)
                assert counted == after[vllms] - before[name][vllms]
                assert counted > sums[name, kind] > 0  # those of streams that didn't ask for usage are in it too
        spent = await gateway.metric("gateway_cost_total", pool="large")
        large = await gateway.metric("gateway_tokens_total", pool="large")
        assert spent == pytest.approx(large / 1000 * 5)


async def test_auto_goes_where_the_estimator_says(servers: Servers, checkpoint: Path) -> None:
    rows = [json.loads(line) for line in (DEMO_DATA / "queries.jsonl").read_text().splitlines()[:40]]
    pools: list[str] = []
    async with running(settings(servers, checkpoint)) as gateway:

        async def ask(question: str) -> str:
            fields = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
            told = await gateway.session.post(f"{gateway.url}/v1/route", json={"model": "auto", **fields})
            answer = await gateway.chat(question, temperature=0, max_tokens=64)
            pool = answer.headers["x-depo-pool"]
            served = await answer.json()
            assert served["model"] == f"demo/{pool}"
            assert (await told.json())["pool"] == pool
            confidence, threshold = (float(answer.headers[f"x-depo-{name}"]) for name in ("confidence", "threshold"))
            assert answer.headers["x-depo-reason"] == ("confident" if pool == "small" else "unsure")
            assert (confidence >= threshold) == (pool == "small")
            return pool

        for start in range(0, len(rows), 8):
            pools += await asyncio.gather(*(ask(row["question"]) for row in rows[start : start + 8]))
        for pool in servers:
            assert await gateway.metric("gateway_decisions_total", pool=pool) == pools.count(pool)
            assert await gateway.settles("gateway_in_flight_requests", 0, pool=pool)
    if checkpoint.is_relative_to(DEMO_DATA):
        assert set(pools) == {"small", "large"}


async def test_the_openai_client_works_unchanged(servers: Servers, checkpoint: Path) -> None:
    async with (
        running(settings(servers, checkpoint)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        question: Any = [{"role": "user", "content": "3+4="}]
        whole = await client.chat.completions.create(
            model="auto", messages=question, temperature=0, logprobs=True, top_logprobs=2
        )
        parts = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model=f"demo/{whole.model.removeprefix('demo/')}", messages=question, temperature=0, stream=True
            )
        ]
        assert "".join(parts) == whole.choices[0].message.content
        assert whole.choices[0].logprobs is not None
        text = await client.completions.create(model="large", prompt="3+4=", temperature=0, max_tokens=8, logprobs=1)
        assert text.choices[0].text
        names = [model.id async for model in await client.models.list()]
        assert {"auto", "small", "large", "demo/small", "demo/large"} <= set(names)
        with pytest.raises(openai.BadRequestError, match="tool-call-parser"):
            await client.chat.completions.create(model="auto", messages=question, tools=[TOOL])  # type: ignore[list-item]


async def test_the_example_client_runs(servers: Servers, checkpoint: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "client.py"
    async with running(settings(servers, checkpoint)) as gateway:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            example,
            f"{gateway.url}/v1",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, told.decode()
    assert told.count(b"confident") + told.count(b"unsure") == 2


@pytest.mark.skipif(not BUILTIN.exists(), reason="no general estimator is shipped yet")
def test_the_demo_runs_on_servers_of_ones_own(servers: Servers) -> None:
    backends = [f"{name}={server.url}" for name, server in servers.items()]
    words = ["--once", "--queries", "20", "--port", "0", "--admin-port", "0", "--backends", *backends]
    done = subprocess.run(
        [COMMANDS / "depo-gateway", "demo", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo/" in done.stdout or "small" in done.stdout


def test_collect_writes_outcomes_of_both_servers(servers: Servers, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "outcomes.jsonl"
    lines = (DEMO_DATA / "queries.jsonl").read_text().splitlines()[:20]
    prompts.write_text("\n".join(lines) + "\n")
    backends = [f"{name}={server.url}" for name, server in servers.items()]
    words = ["--prompts", str(prompts), "--backends", *backends, "--out", str(out), "--k", "4", "--max-tokens", "64"]
    done = subprocess.run(
        [COMMANDS / "depo-train", "collect", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["question"] for row in rows} == {json.loads(line)["question"] for line in lines}
    for row in rows:
        assert set(row["correct"]) == set(row["token_confidence"]) == {"demo/small", "demo/large"}
        assert all(rate in (0, 0.25, 0.5, 0.75, 1) for rate in row["correct"].values())
        assert all(0 < sure <= 1 for sure in row["token_confidence"].values())


def said(stream: Message) -> dict[int, dict[str, Any]]:
    """By choice: the text, the tokens with their log-probabilities, and the end, whatever the events' cut."""
    choices: dict[int, dict[str, Any]] = {}
    for event in stream.events[:-1]:
        for choice in json.loads(event[6:])["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "tokens": [], "end": None})
            whole["text"] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            logprobs = choice["logprobs"] or {}
            whole["tokens"] += logprobs.get("content") or list(
                zip(logprobs.get("tokens", ()), logprobs.get("token_logprobs", ()), strict=True)
            )
            whole["end"] = choice["finish_reason"]
    return choices
