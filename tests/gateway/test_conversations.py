"""Recognising a conversation by its key, its turns and the assistant's own answers."""

import json
from typing import Any

import pytest

from depo_gateway.gateway.conversations import AnswerHead, Conversations, in_tool_loop
from depo_gateway.gateway.openai.choices import first_choice
from depo_gateway.gateway.openai.server_sent_events import json_of
from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import Running, StartGateway

Message = dict[str, Any]


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None, *call_ids: str) -> Message:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in call_ids]
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def tool(call_id: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": "result"}


def answered(message: Message) -> AnswerHead:
    head = AnswerHead(first_choice)
    head.whole({"choices": [{"index": 0, "message": message}]})
    return head


def remembering(turns: list[Message], pool: str, into: Conversations | None = None, key: str = "k") -> Conversations:
    """Conversations in which the last of `turns` was the answer to those before it."""
    into = into if into is not None else Conversations()
    into.remember(key, turns[:-1], answered(turns[-1]), pool, now=0.0)
    return into


FIRST = [user("hello"), assistant("hi there")]


def test_a_follow_up_is_recognised_and_a_new_chat_is_not() -> None:
    known = remembering(FIRST, "large")
    assert known.find("k", [*FIRST, user("and now?")], now=1.0) == "large"
    assert known.find("k", [user("hello")], now=1.0) is None
    assert known.find("k", [user("hello"), user("and now?")], now=1.0) is None
    assert known.find("k", [user("other"), FIRST[1], user("and now?")], now=1.0) is None


def test_an_answer_that_nobody_gave_is_not_recognised() -> None:
    """A few-shot prompt may begin with a question that was asked here too."""
    known = remembering(FIRST, "large")
    shots = [user("hello"), assistant("HELLO"), user("thanks"), assistant("THANKS"), user("please")]
    assert known.find("k", shots, now=1.0) is None
    known = remembering([*shots, assistant("PLEASE")], "large", known)
    assert known.find("k", [*shots[:-1], user("another")], now=1.0) is None


def test_the_longest_known_beginning_counts() -> None:
    known = remembering(FIRST, "small")
    longer = [*FIRST, user("prove it"), assistant("so be it")]
    remembering(longer, "large", known)
    assert known.find("k", [*longer, user("thanks")], now=1.0) == "large"
    assert known.find("k", [*FIRST, user("something else")], now=1.0) == "small"  # a fork before the move
    unknown_tail = [*longer, user("x"), assistant("written by someone else"), user("y")]
    assert known.find("k", unknown_tail, now=1.0) == "large"


def test_two_keys_and_two_answers_are_two_conversations() -> None:
    known = remembering(FIRST, "small", key="a")
    remembering(FIRST, "large", known, key="b")
    remembering([user("hello"), assistant("good day")], "large", known, key="a")
    assert known.find("a", [*FIRST, user("x")], now=1.0) == "small"
    assert known.find("b", [*FIRST, user("x")], now=1.0) == "large"
    assert known.find("a", [user("hello"), assistant("good day"), user("x")], now=1.0) == "large"
    assert known.find("c", [*FIRST, user("x")], now=1.0) is None


def test_what_clients_change_in_an_answer_does_not_matter() -> None:
    known = remembering(
        [{"role": "system", "content": "it is 10:00"}, user("hello"), assistant(" hi\n there ")], "large"
    )
    sent_back = [
        {"role": "system", "content": "it is 10:01"},
        user("hello"),
        {"role": "assistant", "content": [{"type": "text", "text": "hi there"}], "refusal": None, "audio": None},
        user("and now?"),
    ]
    assert known.find("k", sent_back, now=1.0) == "large"


def test_a_tool_loop_is_recognised_by_the_calls_ids() -> None:
    known = remembering([user("weather?"), assistant(None, "call-1")], "small")
    loop = [user("weather?"), assistant("", "call-1"), tool("call-1")]
    assert known.find("k", loop, now=1.0) == "small"
    assert known.find("k", [user("weather?"), assistant("", "call-2"), tool("call-2")], now=1.0) is None
    assert in_tool_loop(loop)
    assert in_tool_loop([{"role": "function", "name": "f", "content": "x"}])
    assert not in_tool_loop([*loop, user("thanks")])


def test_an_answer_cut_short_by_its_user_is_recognised() -> None:
    words = "word " * 400
    known = remembering([user("tell"), assistant(words)], "large")
    assert known.find("k", [user("tell"), assistant(words[:500]), user("go on")], now=1.0) == "large"
    assert known.find("k", [user("tell"), assistant("other " + words), user("go on")], now=1.0) is None


def test_an_empty_answer_is_nobodys() -> None:
    known = remembering([user("hello"), assistant("")], "large")
    assert len(known) == 0
    remembering([user("hello"), assistant(" \n")], "large", known)
    assert known.find("k", [user("hello"), assistant(""), user("x")], now=1.0) is None


def test_memory_is_bounded_by_number_and_by_time() -> None:
    known = Conversations(capacity=2, ttl_seconds=10.0)
    for index in range(3):
        known.remember("k", [user(f"q{index}")], answered(assistant("a")), "large", now=float(index))
    assert len(known) == 2

    def find(index: int, now: float) -> str | None:
        return known.find("k", [user(f"q{index}"), assistant("a"), user("x")], now=now)

    assert [find(index, 3.0) for index in range(3)] == [None, "large", "large"]
    assert [find(index, 11.5) for index in range(3)] == [None, None, "large"]
    assert len(known) == 1
    known.remember("k", [user("q2")], answered(assistant("a")), "small", now=12.0)  # the same again: one entry, younger
    assert (len(known), find(2, 21.0)) == (1, "small")
    assert (find(2, 22.5), len(known)) == (None, 0)


@pytest.mark.parametrize("ending", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("per_chunk", [1, 3, 100])
def test_a_streamed_answer_has_the_head_of_the_whole_one(ending: str, per_chunk: int) -> None:
    message = assistant(" It's a  long answer,\nit is.", "call-1", "call-2")
    deltas: list[Message] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": message["content"][start : start + 3]} for start in range(0, 30, 3)]
    for index, call in enumerate(message["tool_calls"]):
        deltas.append({"tool_calls": [{"index": index, "id": call["id"], "function": {"name": "f", "arguments": ""}}]})
        deltas.append({"tool_calls": [{"index": index, "id": None, "function": {"arguments": "{}"}}]})
    chunks = [{"choices": [{"index": 1, "delta": {"content": "another choice"}}]}]
    chunks += [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}, {"choices": [], "usage": {}}]
    events = [
        f": comment{ending}",
        *(f"data: {json.dumps(chunk)}{ending}" for chunk in chunks),
        f"data: [DONE]{ending}",
    ]
    head = AnswerHead(first_choice)
    starts = range(0, len(events), per_chunk)
    complete = [head.feed("".join(events[start : start + per_chunk]).encode()) for start in starts]
    assert head.head == answered(message).head != b""
    assert complete.index(True) == (len(events) - 3) // per_chunk  # with the finish reason, before [DONE]


def test_a_long_stream_is_read_no_further_than_its_head() -> None:
    head = AnswerHead(first_choice)
    events = 0
    while not head.feed(b'data: {"choices":[{"index":0,"delta":{"content":"word and "}}]}\n\n'):
        events += 1
    assert events < 256 / len("wordand")
    assert head.head == answered(assistant("word and " * 999)).head


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"choices":[]}', b'{"choices":[7,{"message":8}]}'])
def test_an_answer_of_an_odd_shape_has_no_head(body: bytes) -> None:
    head = AnswerHead(first_choice)
    head.whole(json_of(body))
    assert (head.head, head.complete) == (b"", True)


# The same through a whole gateway.


async def turn(gateway: Running, turns: list[Message], text: str | Message, **fields: Any) -> tuple[str, str]:
    """Sends a user's turn, appends it and the answer to `turns`, returns (pool, reason)."""
    turns.append(user(text) if isinstance(text, str) else text)
    body = {"model": "auto", "messages": turns, **fields}
    answer = await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body)
    data = await answer.read()
    assert answer.status == 200, data
    if not fields.get("stream"):
        turns.append(json.loads(data)["choices"][0]["message"])
    else:
        chunks = [json.loads(event[6:]) for event in data.split(b"\n\n")[:-2]]
        turns.append(assistant("".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)))
    return answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]


# Under `difficulty` a predicted quality lies between 0 and 1, so these thresholds decide and not the estimator.
EASY: dict[str, Any] = {"model": "auto-0"}
HARD: dict[str, Any] = {"model": "auto-1"}
BY_THRESHOLD = {"rule": "difficulty"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_keeps_its_pool_and_moves_up(start: StartGateway, stream: bool) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=BY_THRESHOLD) as gateway:

        async def say(turns: list[Message], text: str, how: dict[str, Any]) -> tuple[str, str]:
            return await turn(gateway, turns, text, stream=stream, **how)

        turns: list[Message] = []
        assert await say(turns, "sum", EASY) == ("small", "confident")
        assert await say(turns, "number", EASY) == ("small", "sticky")
        fork = list(turns)
        assert await say(turns, "theorem", HARD) == ("large", "unsure")
        assert await say(turns, "thanks", EASY) == ("large", "sticky")
        assert await say(fork, "again", EASY) == ("small", "sticky")
        assert await say([], "theorem", HARD) == ("large", "unsure")
        assert await say([user("theorem"), assistant("nobody said this")], "thanks", EASY) == ("small", "confident")


async def test_a_tool_loop_does_not_move(start: StartGateway) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": assistant(None, "call-1")["tool_calls"]}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=BY_THRESHOLD) as gateway:
        turns: list[Message] = []
        small.script.body = json.dumps({"choices": [{"index": 0, "message": call}]}).encode()
        assert await turn(gateway, turns, "theorem", **EASY) == ("small", "confident")
        assert await turn(gateway, turns, tool("call-1"), **HARD) == ("small", "sticky")  # alone it would be unsure
        assert await turn(gateway, turns, "theorem", **HARD) == ("large", "unsure")


async def test_stickiness_can_be_turned_off(start: StartGateway) -> None:
    routing = {**BY_THRESHOLD, "sticky": False}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=routing) as gateway:
        turns: list[Message] = []
        assert await turn(gateway, turns, "theorem", **HARD) == ("large", "unsure")
        assert await turn(gateway, turns, "sum", **EASY) == ("small", "confident")


async def test_a_known_conversation_is_not_explored(start: StartGateway) -> None:
    routing = {**BY_THRESHOLD, "explore": 1.0}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=routing) as gateway:
        turns: list[Message] = []
        assert await turn(gateway, turns, "sum", model="small") == ("small", "pinned")
        for _ in range(8):
            assert await turn(gateway, turns, "thanks", **EASY) == ("small", "sticky")
        assert (await turn(gateway, [], "sum", **EASY))[1] == "explore"


def test_turns_too_deep_to_be_distinguished_are_served_anyway() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    turns = [user(deep), assistant("yes"), user("and now?")]
    assert remembering(turns[:2], "large").find("k", turns, now=1.0) == "large"
