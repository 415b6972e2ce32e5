"""Prompts -> labelled completions of every pool, one outcome row a prompt."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp

from depo_gateway.training.judging.spend_cap import SpentError
from depo_gateway.training.outcomes.completions import ModelLabel, mean_confidence
from depo_gateway.training.outcomes.labelling import Labeller
from depo_gateway.training.outcomes.prompts import Prompt
from depo_gateway.training.outcomes.sampling_client import Backend, Refusal, Sampling, sample_completions
from depo_gateway.training.outcomes.saved_completions import Save
from depo_gateway.training.outcomes.table_file import COMPLETIONS


async def collect_outcomes(
    session: aiohttp.ClientSession,
    backends: Sequence[Backend],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    label: Labeller,
    concurrency: int,
    refusals: dict[str, list[str]],
    save: Save | None = None,
) -> AsyncIterator[dict[str, Any]]:
    """Rows as they are finished, in no order. A prompt that every backend refuses, and one that the judge did not
    answer, give no row; one whose completions all have no label gives a row with their counts alone.

    Args:
        refusals: by model, the messages of its refusals; appended to.
        save: is given the completions and labels of each row before it comes.

    Raises:
        BackendError, RewardError, JudgeError: it cannot go on.
        SpentError: the judge's cap is used up; the rows of all prompts in progress came before.
    """
    gates = {backend.pool: asyncio.Semaphore(concurrency) for backend in backends}
    waiting = iter(prompts)
    spent: SpentError | None = None

    async def row_of(prompt: Prompt) -> dict[str, Any] | None:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    backend.model: group.create_task(
                        sample_completions(session, gates[backend.pool], backend, prompt.messages, sampling)
                    )
                    for backend in backends
                }
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        results = {name: task.result() for name, task in tasks.items()}
        for name, result in results.items():
            if isinstance(result, Refusal):
                refusals.setdefault(name, []).append(result.message)
        completions = {name: result for name, result in results.items() if not isinstance(result, Refusal)}
        labels = await label(prompt, completions) if completions else None
        if labels is None:
            return None
        if save is not None:
            save(prompt, completions, labels)
        return _row(prompt, labels, {name: mean_confidence(some) for name, some in completions.items()})

    running: set[asyncio.Task[dict[str, Any] | None]] = set()
    try:
        while True:
            while spent is None and len(running) < 2 * concurrency and (prompt := next(waiting, None)) is not None:
                running.add(asyncio.create_task(row_of(prompt)))
            if not running:
                break
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:  # if one raises, the others' exceptions are taken below
                running.discard(task)
                try:
                    row = task.result()
                except SpentError as error:
                    spent, row = error, None
                if row is not None:
                    yield row
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    if spent is not None:
        raise spent


def _row(prompt: Prompt, labels: Mapping[str, ModelLabel], confidence: Mapping[str, float | None]) -> dict[str, Any]:
    """The row of an outcome table."""
    qualities = {name: label.quality for name, label in labels.items() if label.quality is not None}
    confidences = {name: confidence[name] for name in labels if confidence[name] is not None}
    row = {**prompt.row, "correct": qualities}
    if confidences:
        row["token_confidence"] = confidences
    return {**row, COMPLETIONS: {name: dict(label.counts) for name, label in labels.items()}}
