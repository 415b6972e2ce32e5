"""Prompts -> graded completions of every pool, one outcome row a prompt."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from depo_gateway.training.outcomes.sampling_client import (
    Backend,
    BackendError,
    Outcome,
    Refusal,
    Sampling,
    sample_outcome,
)
from depo_gateway.training.outcomes.table_file import json_lines, prompt_key
from depo_gateway.training.rewards.worker_pool import RewardError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts file."""

    messages: tuple[Mapping[str, Any], ...]
    reference: str
    row: Mapping[str, Any]  # the fields that the outcome row repeats: question or messages, group, source

    @property
    def key(self) -> str:
        return prompt_key(self.row)


async def collect_outcomes(
    session: aiohttp.ClientSession,
    backends: Sequence[Backend],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    concurrency: int,
    refusals: dict[str, list[str]],
) -> AsyncIterator[dict[str, Any]]:
    """Rows as they are finished, in no order. A prompt without a graded completion of any backend gives no row.

    Args:
        refusals: by model, the messages of its refusals; appended to.
    """
    gates = {backend.pool: asyncio.Semaphore(concurrency) for backend in backends}
    waiting = iter(prompts)

    async def row_of(prompt: Prompt) -> dict[str, Any] | None:
        async with asyncio.TaskGroup() as group:
            tasks = {
                backend.model: group.create_task(
                    sample_outcome(session, gates[backend.pool], backend, prompt.messages, prompt.reference, sampling)
                )
                for backend in backends
            }
        graded: dict[str, Outcome] = {}
        for name, task in tasks.items():
            result = task.result()
            if isinstance(result, Refusal):
                refusals.setdefault(name, []).append(result.message)
            elif result.correct is not None:
                graded[name] = result
        if not graded:
            return None
        row = {**prompt.row, "correct": {name: result.correct for name, result in graded.items()}}
        confidence = {name: r.token_confidence for name, r in graded.items() if r.token_confidence is not None}
        return {**row, "token_confidence": confidence} if confidence else row

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
                except* (BackendError, RewardError) as group:
                    raise group.exceptions[0] from None
                if row is not None:
                    yield row
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a JSON-lines file, in order. ValueError names file and line."""
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
