"""routing.group: where the name of a request's task is read, and that scores, candidate and record get it."""

import hashlib
import json
from typing import Any

import orjson
import pytest

from depo_gateway.gateway.config import key_digest, parse_config, resolved_yaml
from depo_gateway.gateway.openai.apis import APIS
from depo_gateway.gateway.openai.query import Query, query_of
from depo_gateway.gateway.task_groups import group_of
from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import StartGateway
from tests.gateway.knowing import PROOFS, knowing_checkpoints
from tests.gateway.test_records import bearer, keys, stored, written

__all__ = ["knowing_checkpoints"]  # a fixture
POOLS = {name: {"model": name, "backends": [{"url": f"http://{name}"}]} for name in ("small", "large")}
SYSTEM = {"role": "system", "content": "You prove theorems."}
USER = {"role": "user", "content": "easy"}


def query(path: str = "/v1/chat/completions", **fields: Any) -> Query:
    fields = {"model": "auto", "messages": [USER], **fields}
    return query_of(APIS[path], fields, orjson.dumps(fields))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("source", "fields", "name"),
    [
        (None, {"metadata": {"task": "sums"}}, ""),
        ("key", {}, "team-a"),
        ("header:X-Task", {}, "théorèmes"),
        ("header:x-task", {}, "théorèmes"),
        ("header:x-none", {}, ""),
        ("header:x-broken", {}, ""),
        ("metadata:task", {"metadata": {"task": "\t sums \n"}}, "sums"),
        ("metadata:a:b c", {"metadata": {"a:b c": "sums"}}, "sums"),
        ("metadata:task", {"metadata": {"task": " "}}, ""),
        ("metadata:task", {"metadata": {"task": "a\nb"}}, ""),
        ("metadata:task", {"metadata": {"task": "\ufffd"}}, ""),
        ("metadata:task", {"metadata": {"task": 7}}, ""),
        ("metadata:task", {"metadata": {"other": "sums"}}, ""),
        ("metadata:task", {"metadata": ["task"]}, ""),
        ("metadata:task", {"metadata": None}, ""),
        ("metadata:task", {}, ""),
        ("metadata:task", {"metadata": {"task": "x" * 128}}, "x" * 128),
        ("metadata:task", {"metadata": {"task": "x" * 129}}, "long-" + digest("x" * 129)),
        ("metadata:task", {"metadata": {"task": "x" * 130}}, "long-" + digest("x" * 130)),
        ("system", {}, ""),
        ("system", {"messages": [SYSTEM, USER]}, "system-" + digest("You prove theorems.")),
        ("system", {"messages": [{**SYSTEM, "content": ""}, USER]}, ""),
        ("system", {"messages": [{**SYSTEM, "content": 3}, USER]}, ""),
        (
            "system",
            {"messages": [SYSTEM, USER, {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]},
            "system-" + digest("You prove theorems.\nBe brief."),
        ),
    ],
)
def test_the_name_is_read_where_the_config_says(source: str | None, fields: dict[str, Any], name: str) -> None:
    headers = {b"x-task": "théorèmes".encode(), b"x-broken": b"\xff\xfe"}
    assert group_of(source, "team-a", headers, query(**fields)) == name


def test_a_prompt_that_is_no_conversation_has_no_system_text() -> None:
    assert group_of("system", "", {}, query("/v1/completions", prompt="easy")) == ""


@pytest.mark.parametrize("source", ["key", "system", "header:X-Task", "metadata:task"])
def test_a_source_is_taken_and_shown(source: str) -> None:
    config = parse_config({"version": 1, "pools": POOLS, "routing": {"group": {"from": source}}})
    assert f"group:\n    from: {source}\n" in resolved_yaml(config)
    assert parse_config({"version": 1, "pools": POOLS}).routing.group is None


@pytest.mark.parametrize(
    ("group", "words"),
    [
        *(
            ({"from": source}, f"routing.group.from is {source!r}; write key, header:NAME, metadata:NAME or system")
            for source in ("", "keys", "key:", "header", "header:", "header:a b", "metadata:", "metadata: x", "system:")
        ),
        ({"from": "header:Authorization"}, "'header:Authorization', a header that holds secrets"),
        ({"from": "header:x-api-key"}, "name another header, or write key"),
        ({"from": 7}, "routing.group.from is a whole number; write text"),
        ({}, "'routing.group.from' is missing"),
        ({"form": "key"}, "unknown key 'routing.group.form'; did you mean 'from'?"),
        ("key", "routing.group is the text 'key'; write a mapping"),
    ],
)
def test_another_source_is_refused_in_one_sentence(group: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"routing\.group") as raised:
        parse_config({"version": 1, "pools": POOLS, "routing": {"group": group}})
    assert words in str(raised.value)


async def test_a_tasks_name_decides_goes_on_the_record_and_not_to_the_backend(
    start: StartGateway, records_url: str, knowing_checkpoints: None
) -> None:
    sections = {"routing": {"group": {"from": "metadata:task"}}, "records": {"url": records_url}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        seen = []
        for task in ({}, {"metadata": {"task": PROOFS}}, {"metadata": {"task": "sums"}}):
            body = json.dumps({"model": "auto", "messages": [USER], **task}, indent=3).encode()
            async with gateway.session.post(f"{gateway.url}/v1/route", data=body) as answer:
                told = await answer.json()
            async with gateway.session.post(f"{gateway.url}/v1/chat/completions", data=body) as answer:
                assert answer.headers["x-depo-pool"] == told["pool"]
            seen.append(told["pool"])
            backend = small if told["pool"] == "small" else large
            assert backend.seen[-1].body == body.replace(b'"auto"', f'"{told["model"]}"'.encode())
        assert seen == ["small", "large", "small"]  # the same prompt, cached by its task
        assert await gateway.metric("gateway_estimator_outcomes_total", outcome="full") == 3
        pinned = await gateway.chat("easy", model="small", metadata={"task": "sums"})
        assert pinned.headers["x-depo-reason"] == "pinned"
        await written(gateway, 4)
        async with gateway.session.get(f"{gateway.admin}/metrics") as answer:
            assert PROOFS not in await answer.text()
    assert [record.group for record in stored(records_url)] == ["", PROOFS, "sums", "sums"]


async def test_a_key_names_the_task(start: StartGateway, records_url: str, knowing_checkpoints: None) -> None:
    sections = {"routing": {"group": {"from": "key"}}, "records": {"url": records_url}, "auth": keys(PROOFS, "sums")}
    assert key_digest(PROOFS + "-key") == sections["auth"]["keys"][0]["sha256"]
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        for name, pool in ((PROOFS, "large"), ("sums", "small")):
            gateway.session.headers.update(bearer(name))
            assert (await gateway.chat("easy")).headers["x-depo-pool"] == pool
        await written(gateway, 2)
    assert [record.group for record in stored(records_url)] == [PROOFS, "sums"]


async def test_a_request_header_names_the_task_and_does_not_go_on(
    start: StartGateway, knowing_checkpoints: None
) -> None:
    sections = {"routing": {"group": {"from": "header:X-Task"}}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        gateway.session.headers["X-TASK"] = PROOFS
        assert (await gateway.chat("easy")).headers["x-depo-pool"] == "large"
        assert "x-task" not in {name.lower() for name in large.seen[-1].headers}


async def test_the_candidate_scores_the_same_task(
    start: StartGateway, tiny_checkpoint: Any, knowing_checkpoints: None
) -> None:
    estimator = {"path": str(tiny_checkpoint), "deadline_ms": 5000, "candidate": str(tiny_checkpoint)}
    sections = {"routing": {"group": {"from": "metadata:task"}}, "estimator": estimator}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        await gateway.chat("easy", metadata={"task": PROOFS})
        assert await gateway.settles("gateway_candidate_decisions_total", 1, pool="large")
        assert await gateway.metric("gateway_candidate_agreement_total", agrees="yes") == 1
