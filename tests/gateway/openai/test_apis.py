"""The table of endpoints: a new one is one `Api` and one line, and nothing else knows of it."""

import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from depo_gateway.estimator.records.store import Store
from depo_gateway.gateway import app, config
from depo_gateway.gateway.openai.api import AnswerPiece, Api, Fields, Messages
from depo_gateway.gateway.openai.apis import APIS, api_of_body, by_path
from depo_gateway.gateway.openai.chat import CHAT
from depo_gateway.gateway.openai.completions import COMPLETIONS
from depo_gateway.gateway.openai.errors import ApiError
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, running, settings

# A new endpoint: `question` in, `reply` out, its own usage, events, errors and header for the key; and answers have ids
# by which a later request continues them.


def question(fields: Fields) -> Messages:
    text = fields.get("question")
    if not isinstance(text, str):
        raise ApiError(400, "'question' must be text.", "invalid_question", "question")
    return [{"role": "user", "content": text}]


def reply(answer: Any, streamed: bool) -> AnswerPiece | None:
    if not isinstance(answer, dict):
        return None
    reason = "" if streamed and answer.get("type") != "end" else "stop"
    return AnswerPiece(answer.get("reply", ""), reason, answer_id=answer.get("id", ""))


def counts(answer: Any) -> dict[str, Any] | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    names = {"input": "prompt_tokens", "output": "completion_tokens"}
    return {names[name]: count for name, count in usage.items()} if isinstance(usage, dict) else None


def fault(error: ApiError) -> bytes:
    return orjson.dumps({"fault": {"because": error.message, "code": error.code}})


def own_key(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"x-toy-key", b"").decode()


TOY = Api(
    "toy",
    "/v1/toy",
    prompt=question,
    prompt_field="question",
    continued_answer=lambda fields: fields.get("continue", ""),
    text_fields=frozenset(("question",)),
    api_key=own_key,
    key_header="x-toy-key: KEY",
    forwarded_headers=(b"toy-version",),
    answer_piece=reply,
    usage=counts,
    error_body=fault,
    error_event=lambda error: b"event: fault\ndata: " + fault(error) + b"\n\n",
)

# The same with a prompt that is no conversation, so that a follow-up is recognised by the answer's id alone.
TEXT_TOY = replace(TOY, name="text-toy", path="/v1/text-toy", prompt=lambda fields: fields["question"])

WHOLE = b'{ "id":"toy-1", "reply":"four", "usage":{"input":7,"output":5} }'
EVENTS = (
    b'event: begin\ndata: {"type":"begin","id":"toy-2","usage":{"input":7}}\n\n',
    b'event: text\ndata: {"type":"text","reply":"fo"}\n\n',
    b'event: text\ndata: {"type":"text","reply":"ur"}\n\n',
    b'event: end\ndata: {"type":"end","usage":{"output":5}}\n\n',
)
BACKEND = Script(body=WHOLE, raw_events=EVENTS)
KEY = {"x-toy-key": "team-a-key"}


@pytest.fixture
async def gateway(tiny_checkpoint: Path, records_url: str) -> AsyncIterator[tuple[Running, FakeVllm, FakeVllm]]:
    """A gateway whose table has one line more."""
    sections = {
        "records": {"url": records_url, "prompts": "full"},
        "auth": {"keys": [{"name": "team-a", "sha256": config.key_digest("team-a-key")}]},
    }
    async with FakeVllm(script=BACKEND) as small, FakeVllm(script=BACKEND) as large:
        raw = settings([small], [large], tiny_checkpoint, **sections)
        async with running(raw, apis=by_path(*APIS.values(), TOY, TEXT_TOY)) as served:
            yield served, small, large


async def ask(
    gateway: Running, text: Any = "easy", headers: Mapping[str, str] = KEY, path: str = TOY.path, **fields: Any
) -> Any:
    body = {"question": text, "model": "auto", **fields}
    return await gateway.session.post(f"{gateway.url}{path}", json=body, headers=headers)


def decided(answer: aiohttp.ClientResponse) -> tuple[int, str, str]:
    return answer.status, answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]


async def test_a_new_endpoint_is_routed_counted_and_recorded(
    gateway: tuple[Running, FakeVllm, FakeVllm], records_url: str
) -> None:
    served, small, large = gateway
    easy = await ask(served, "what is the easy sum", {**KEY, "toy-version": "3", "accept": "toy/*"}, temperature=0.5)
    hard = await ask(served, "prove the hard theorem", stream=True)
    assert (decided(easy), decided(hard)) == ((200, "small", "confident"), (200, "large", "unsure"))
    assert await easy.read() == WHOLE
    assert await hard.read() == b"".join(EVENTS)
    seen = small.seen[0]
    assert seen.path == "/v1/toy"
    assert seen.json == {"question": "what is the easy sum", "model": "org/small-1b", "temperature": 0.5}
    assert (seen.headers["toy-version"], seen.headers.get("accept")) == ("3", None)
    assert large.seen[0].json == {"question": "prove the hard theorem", "model": "org/large-9b", "stream": True}
    assert await served.settles("gateway_records_total", 2, outcome="written")
    assert await served.metric("gateway_requests_total", endpoint="toy", code="200") == 2
    for pool in ("small", "large"):
        assert await served.metric("gateway_tokens_total", pool=pool, type="prompt") == 7
        assert await served.metric("gateway_tokens_total", pool=pool, type="completion") == 5
    store = Store(records_url)
    found = [item.record for item in store.logged(10)]
    store.close()
    assert [record.asked for record in found] == [
        [{"role": "user", "content": "what is the easy sum"}],
        [{"role": "user", "content": "prove the hard theorem"}],
    ]
    for record in found:
        assert (record.endpoint, record.key, record.answer, record.finish_reason) == ("toy", "team-a", "four", "stop")
        assert (record.prompt_tokens, record.completion_tokens) == (7, 5)
    assert found[0].parameters == {"temperature": 0.5}


async def test_its_errors_have_their_own_shape(gateway: tuple[Running, FakeVllm, FakeVllm]) -> None:
    served, small, _ = gateway

    async def refused(answer: Any, status: int) -> Any:
        body = await answer.json()
        assert (answer.status, list(body)) == (status, ["fault"])
        return body["fault"]["code"]

    assert await refused(await ask(served, 7), 400) == "invalid_question"
    assert await refused(await ask(served, model="nonsense"), 404) == "model_not_found"
    keyless = await ask(served, headers={"authorization": "Bearer team-a-key"})
    assert await refused(keyless, 401) == "missing_api_key"
    assert "'x-toy-key: KEY'" in await keyless.text()
    assert await refused(await served.session.get(f"{served.url}/v1/toy"), 405) == "method_not_allowed"
    small.script = Script(raw_events=EVENTS, reset_after_events=2)
    body = await (await ask(served, stream=True)).read()
    assert body.startswith(b"".join(EVENTS[:2]) + b'event: fault\ndata: {"fault":{"because":"The backend broke off')


@pytest.mark.parametrize("path", [TOY.path, TEXT_TOY.path])
async def test_its_conversations_keep_their_pool(gateway: tuple[Running, FakeVllm, FakeVllm], path: str) -> None:
    served = gateway[0]
    assert decided(await ask(served, "hard " * 9, path=path)) == (200, "large", "unsure")
    assert decided(await ask(served, "easy", path=path, **{"continue": "toy-1"})) == (200, "large", "sticky")
    await (await ask(served, "hard " * 9, path=path, stream=True)).read()
    assert decided(await ask(served, "easy", path=path, **{"continue": "toy-2"})) == (200, "large", "sticky")
    assert decided(await ask(served, "easy", path=path, **{"continue": "toy-3"})) == (200, "small", "confident")


@pytest.mark.parametrize("odd", ['{"reply":7,"usage":{"input":7}}', '{"reply":"four","usage":{"new":1}}'])
async def test_an_answer_that_its_readers_fail_on_is_sent_on(
    gateway: tuple[Running, FakeVllm, FakeVllm], caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    served, small, _ = gateway
    events = (f"data: {odd}\n\n".encode(),) * 2 + (EVENTS[-1],)
    small.script = Script(body=odd.encode(), raw_events=events)
    for stream, body in ((False, odd.encode()), (True, b"".join(events))):
        caplog.clear()
        answer = await ask(served, stream=stream)
        assert decided(answer) == (200, "small", "confident")
        assert await answer.read() == body
        (entry,) = [entry for entry in caplog.records if entry.levelno >= logging.ERROR and "answer" in entry.msg]
        assert entry.getMessage().endswith("the answer can't be read as toy's")
    await ask(served, "hard")
    text_is_odd = '"reply":7' in odd
    assert await served.settles("gateway_records_total", 1 if text_is_odd else 3, outcome="written")
    assert await served.metric("gateway_records_total", outcome="rejected") == 2 * text_is_odd
    if "new" in odd:
        assert await served.metric("gateway_tokens_total", pool="small", type="completion") == 5


async def test_route_recognises_its_bodies(gateway: tuple[Running, FakeVllm, FakeVllm]) -> None:
    served, small, large = gateway
    headers = {"authorization": "Bearer team-a-key"}
    for text, pool in (("what is the easy sum", "small"), ("prove the hard theorem", "large")):
        body = {"model": "auto", "question": text}
        answer = await served.session.post(f"{served.url}/v1/route", json=body, headers=headers)
        assert (answer.status, (await answer.json())["pool"]) == (200, pool)
    assert not small.seen
    assert not large.seen


@pytest.mark.parametrize(
    ("fields", "api"),
    [
        ({"messages": []}, CHAT),
        ({"prompt": ""}, COMPLETIONS),
        ({"prompt": "", "messages": []}, CHAT),
        ({}, COMPLETIONS),
        ({"other": "text"}, COMPLETIONS),
    ],
)
def test_a_body_without_a_path_is_recognised_by_its_prompt(fields: dict[str, Any], api: Api) -> None:
    assert api_of_body(APIS, fields) is api


def test_paths_and_names_are_unique() -> None:
    assert len({api.name for api in APIS.values()}) == len(APIS)
    assert all(path == api.path for path, api in APIS.items())


def test_nothing_but_the_table_knows_an_endpoint() -> None:
    endpoints = {api.name for api in APIS.values()}
    assert {"chat", "completions", "embeddings"} <= endpoints
    for path in sorted((Path(app.__file__).parent).rglob("*.py")):
        if path.name != "apis.py":
            named = re.findall(r"depo_gateway\.gateway\.openai\.(\w+) import", path.read_text())
            assert not endpoints & set(named), path
