"""Two scripted OpenAI backends, right or wrong by the table, with the endpoints that gateway and learner need."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from benchmarks.replay.questions import POOLS, Question, token_confidence

WRONG = "no idea"


def answer_of(question: Question, pool: int, logprobs: bool) -> dict[str, Any]:
    """A chat completion: the reference, or WRONG."""
    text = question.reference if question.right[pool] else WRONG
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs:
        value = math.log(token_confidence(question, pool))
        choice["logprobs"] = {"content": [{"token": text, "logprob": value, "bytes": None, "top_logprobs": []}]}
    usage = {"prompt_tokens": len(question.text) // 4 + 1, "completion_tokens": 4}
    usage["total_tokens"] = sum(usage.values())
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@contextlib.asynccontextmanager
async def backends(questions: Mapping[str, Question]) -> AsyncIterator[dict[str, str]]:
    """Runs both; yields pool -> url."""
    async with contextlib.AsyncExitStack() as stack:
        urls = {}
        for number, pool in enumerate(POOLS):
            runner = web.AppRunner(application(questions, number), access_log=None)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls[pool] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield urls


def application(questions: Mapping[str, Question], pool: int) -> web.Application:
    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        question = questions[body["messages"][-1]["content"]]
        return web.json_response(answer_of(question, pool, bool(body.get("logprobs"))))

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/health", health)
    return app
