"""Reward functions for TRL's trainers, from a verifier or from a function of the user's."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from depo_gateway.training.rewards.import_path import import_callable, one_line
from depo_gateway.training.rewards.verifiers import COUNTS, Grader, beginning_of, is_pairwise, is_verifier
from depo_gateway.training.rewards.worker_pool import RewardError, as_reward


class PairReward:
    """A verifier as a TRL reward function: the dataset's `answer_column` holds the references."""

    def __init__(self, grader: Grader, answer_column: str) -> None:
        self.__name__ = _short(grader.name)
        self._grader, self._answer_column = grader, answer_column
        self._unanswered = 0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Rewards of B completions (texts or message lists); None: no reward, for instance if the row has no answer."""
        if self._answer_column not in columns:
            present = ", ".join(sorted(name for name, column in columns.items() if isinstance(column, list)))
            raise ValueError(f"the dataset has no column {self._answer_column!r} to grade against, only {present}")
        answers = columns[self._answer_column]
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        graded = self._grader.grade(
            [(text_of(completions[row]), str(answers[row])) for row in rows], [text_of(prompts[row]) for row in rows]
        )
        rewards: list[float | None] = [None] * len(completions)
        for row, reward in zip(rows, graded, strict=True):
            rewards[row] = reward
        self._unanswered += len(completions) - len(rows)
        return rewards

    def check_references(self, answers: Sequence[str | None]) -> None:
        """Raises ValueError, which names rows from 1, if the verifier cannot use an answer. A row may have none."""
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        faults = self._grader.unusable([str(answers[row]) for row in rows])
        unusable = [(row, fault) for row, fault in zip(rows, faults, strict=True) if fault is not None]
        if unusable:
            row, fault = unusable[0]
            others = ", ".join(str(row + 1) for row, _ in unusable[1:10]) + (", ..." if len(unusable) > 10 else "")
            raise ValueError(
                f"the answer of the data set's row {row + 1}, {beginning_of(str(answers[row]))}, {fault}"
                + (f"; {len(unusable) - 1} more rows have such answers: {others}" if others else "")
                + "; correct or remove them, or set another reward"
            )

    def counts(self) -> dict[str, int]:
        """As Grader.counts; a row without an answer counts as a reference that cannot be used."""
        counts = self._grader.counts()
        counts["references"] += self._unanswered
        self._unanswered = 0
        return counts

    def close(self) -> None:
        self._grader.close()


class BatchReward:
    """The user's reward function with TRL's arguments, its values checked. It runs in this process."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__ = _short(name)
        self._name, self._function = name, function
        self._runner: asyncio.Runner | None = None
        self._counts = dict.fromkeys(COUNTS.values(), 0)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Rewards of B completions; None and NaN: no reward."""
        what, among = f"reward function {self._name}", _among(prompts)
        try:
            values = self._function(prompts=prompts, completions=completions, **columns)
            if inspect.isawaitable(values):
                self._runner = (
                    self._runner or asyncio.Runner()
                )  # one loop for all calls, because clients belong to a loop
                values = self._runner.run(_awaited(values))
        except Exception as error:  # boundary: the user's code; its traceback is the cause
            raise RewardError(f"the {what} raised {one_line(error)}, {among}") from error
        sized = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
        if not sized or len(values) != len(completions):
            size = f"{len(values)} values" if sized else repr(values)[:60]
            raise RewardError(f"the {what} returned {size} for {len(completions)} completions {among}")
        try:
            rewards = [as_reward(value) for value in values]
        except RewardError as error:
            raise RewardError(f"the {what} {error}, {among}") from None
        missing = rewards.count(None)
        self._counts["graded"] += len(rewards) - missing
        self._counts["failures"] += missing
        return rewards

    def counts(self) -> dict[str, int]:
        """As Grader.counts: a None or NaN is a failure; without a deadline there are no timeouts."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


def reward_function(
    name_or_path: str, answer_column: str = "answer", deadline_s: float = 5.0
) -> PairReward | BatchReward:
    """A reward function for TRL's trainers, from a verifier's name or a function's import path.

    A function whose first two parameters are named `completion` and `reference`, with defaults for any others, is a
    verifier: it is called once per completion, in worker processes with the deadline. Any other function must take
    TRL's keywords (prompts, completions, the dataset's columns and more, so **kwargs) and runs in this process, without
    a deadline.

    Raises:
        ValueError: the verifier is unknown, cannot be imported, is not callable, or takes neither kind of arguments.
    """
    if is_verifier(name_or_path) or is_pairwise(function := import_callable(name_or_path)):
        return PairReward(Grader(name_or_path, deadline_s), answer_column)
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any:
        raise ValueError(
            f"{name_or_path} takes ({', '.join(parameters)}): a verifier takes (completion, reference), "
            "a reward function (prompts, completions, **kwargs)"
        )
    return BatchReward(name_or_path, function)


def text_of(turns: Any) -> str:
    """A completion's text: the string itself, or the last message's content ("" if none; text parts joined)."""
    if isinstance(turns, str):
        return turns
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _among(prompts: Sequence[Any]) -> str:
    first = beginning_of(text_of(prompts[0])) if prompts else "none"
    return f"in a batch of {len(prompts)} whose first prompt is {first}"


async def _awaited(values: Any) -> Any:
    return await values
