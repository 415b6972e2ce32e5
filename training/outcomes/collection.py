"""Prompts -> graded completions of every pool, one outcome row a prompt."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from depo_gateway.training.outcomes.sampling_client import (
    Backend,
    BackendFailed,
    Outcome,
    Sampling,
    outcome,
)
from depo_gateway.training.outcomes.table_file import json_lines, key_of
from depo_gateway.training.rewards.worker_pool import RewardError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts file."""

    messages: tuple[Mapping[str, Any], ...]
    reference: str
    row: Mapping[str, Any]  # what the outcome row repeats: question or messages, group, source

    @property
    def key(self) -> str:
        return key_of(self.row)


async def outcomes(
    session: aiohttp.ClientSession,
    backends: Sequence[Backend],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    concurrency: int,
    refusals: dict[str, list[str]],
) -> AsyncIterator[dict[str, Any]]:
    """Rows as they are done, in no order. A prompt that every backend refuses, or none is graded on, gives no row.

    `refusals` takes the words of each model's refusals as they come.
    """
    gates = {backend.pool: asyncio.Semaphore(concurrency) for backend in backends}
    waiting = iter(prompts)

    async def row_of(prompt: Prompt) -> dict[str, Any] | None:
        async with asyncio.TaskGroup() as group:
            asked = {
                backend.model: group.create_task(
                    outcome(session, gates[backend.pool], backend, prompt.messages, prompt.reference, sampling)
                )
                for backend in backends
            }
        answered: dict[str, Outcome] = {}
        for name, task in asked.items():
            result = task.result()
            if isinstance(result, str):
                refusals.setdefault(name, []).append(result)
            elif result.correct is not None:
                answered[name] = result
        if not answered:
            return None
        row = {**prompt.row, "correct": {name: result.correct for name, result in answered.items()}}
        sure = {name: r.token_confidence for name, r in answered.items() if r.token_confidence is not None}
        return {**row, "token_confidence": sure} if sure else row

    running: set[asyncio.Task[dict[str, Any] | None]] = set()
    try:
        while True:
            while len(running) < 2 * concurrency and (prompt := next(waiting, None)) is not None:
                running.add(asyncio.create_task(row_of(prompt)))
            if not running:
                break
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                try:
                    row = task.result()
                except* (BackendFailed, RewardError) as group:
                    raise group.exceptions[0] from None
                if row is not None:
                    yield row
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def read_prompts(path: Path) -> list[Prompt]:
    """Different prompts of a JSON-lines file, in order. ValueError names file and line."""
    prompts: dict[str, Prompt] = {}
    for number, record in json_lines(path):
        place = f"{path}, line {number}"
        has = [name for name in ("question", "messages") if name in record]
        if len(has) != 1:
            raise ValueError(f'{place}: needs either "question" or "messages"')
        content = record[has[0]]
        if has == ["question"] and not (isinstance(content, str) and content.strip()):
            raise ValueError(f'{place}: "question" must be a text')
        if has == ["messages"] and not (
            isinstance(content, list) and content and all(isinstance(turn, dict) and "role" in turn for turn in content)
        ):
            raise ValueError(f'{place}: "messages" must be a list of OpenAI messages')
        if not isinstance(record.get("answer"), str | int | float) or isinstance(record["answer"], bool):
            raise ValueError(f'{place}: needs "answer", the reference that completions are graded against')
        messages = content if has == ["messages"] else [{"role": "user", "content": content}]
        row: dict[str, Any] = {name: record[name] for name in (has[0], "group", "source") if name in record}
        prompt = Prompt(tuple(messages), str(record["answer"]), row)
        prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return list(prompts.values())
