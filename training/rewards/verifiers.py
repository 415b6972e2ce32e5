"""Verifiable rewards: grade a completion against a reference.

A verifier has a name: `exact`, `number`, `choice` (pure functions, in [0, 1]), `math` (math-verify), or the import path
of the user's function. All but the pure ones run in worker processes with a deadline (worker_pool). A missing reward
(None) is not a reward of 0: it is counted, and the caller leaves the completion out.
"""

import asyncio
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from depo_gateway.training.rewards.import_path import absolute_import_path, import_callable, one_line
from depo_gateway.training.rewards.worker_pool import RewardError, Workers, as_reward

Verifier = Callable[[str, str], float]  # (completion, reference) -> reward

# A sign counts only if no operand precedes it: the last number of `7-3` is 3, of `x = -3` it is -3.
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\w.)\]])-?{_UNSIGNED}|(?<=[-+*/=]){_UNSIGNED}")
# A lower-case letter is a choice only before a bracket, a full stop or the line's end: in `the answer is a tricky one`
# it is an article.
_CHOICE_MARKED = re.compile(
    r"(?i:answer|choice|option)\s*(?i:is|:)?\s*[*_(\[]*"
    r"([A-E]\b(?!['’])|[a-e](?=[*_]*(?:[)\]]|\.(?!\w)|\s*$)))",
    re.MULTILINE,
)
_CHOICE_ALONE = re.compile(r"(?<![\w'’])[*_(\[]*([A-E])(?![\w'’])")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators allowed; None if there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def exact(completion: str, reference: str) -> float:
    """1 if the texts are equal, ignoring case, outer punctuation and repeated whitespace."""
    return float(_normalised(completion) == _normalised(reference))


def number(completion: str, reference: str) -> float:
    """1 if the last number of the completion equals the reference's last number (`18` = `18.0` = `$18.00`)."""
    expected = last_number(reference)
    return float(expected is not None and last_number(completion) == expected)


def choice(completion: str, reference: str) -> float:
    """1 if the completion chooses the reference's letter, A to E: of the last "answer is X", else the last capital."""
    expected = _chosen(reference.upper())
    return float(expected is not None and _chosen(completion) == expected)


VERIFIERS: Mapping[str, Verifier] = {"exact": exact, "number": number, "choice": choice}
MATH = "depo_gateway.training.rewards.math_answers:grade"
NAMES = f"{', '.join(VERIFIERS)}, math, or your own function as module:function or file.py:function"


class Grader:
    """Grades (completion, reference) pairs by a named verifier, and counts those without a reward.

    Args:
        name: one of NAMES; a function must take (completion, reference).
        deadline_s: seconds per completion; not used by the pure verifiers.

    Raises:
        ValueError: the verifier is unknown, cannot be imported or takes other arguments.
    """

    def __init__(self, name: str, deadline_s: float = 5.0) -> None:
        if not deadline_s > 0:
            raise ValueError(f"a verifier's deadline must be above 0 seconds, not {deadline_s}")
        self.name, self.deadline_s = name, deadline_s
        self._workers: Workers | None = None
        self._pure = VERIFIERS.get(name)
        self._graded = 0
        if name == "math":
            if importlib.util.find_spec("math_verify") is None:
                raise ValueError(
                    "the verifier math needs math-verify; install it: pip install 'depo-gateway[training]'"
                )
            self._workers = Workers(MATH, deadline_s, strict=False)
        elif self._pure is None:
            if not is_pairwise(_callable(name)):
                raise ValueError(f"{name} must take parameters named (completion, reference) to be a verifier")
            self._workers = Workers(absolute_import_path(name), deadline_s)

    def grade(self, pairs: Sequence[tuple[str, str]], prompts: Sequence[str] = ()) -> list[float | None]:
        """Rewards in the order of (completion, reference) pairs, None where there is none. Any thread may call it.

        `prompts`: the pairs' prompts, if known, for the error message.

        Raises:
            RewardError: the user's function raised, or did not return a number.
        """
        if self._workers is not None:
            try:
                return self._workers.grade(pairs)
            except RewardError as error:
                of = f"of the prompt {_beginning(prompts[error.index])}" if prompts else ""
                which = f"the completion {_beginning(pairs[error.index][0])} {of}".strip()
                raise RewardError(f"the verifier {self.name} {error}, at {which}") from error.__cause__
        assert self._pure is not None
        self._graded += len(pairs)
        return [self._pure(completion, reference) for completion, reference in pairs]

    def counts(self) -> dict[str, int]:
        """Completions since the last call: graded, timeouts, failures (no reward for another reason)."""
        if self._workers is not None:
            return self._workers.counts()
        graded, self._graded = self._graded, 0
        return {"graded": graded, "timeouts": 0, "failures": 0}

    def close(self) -> None:
        """Stops the worker processes. They also end with this process, however it ends."""
        if self._workers is not None:
            self._workers.close()


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

    def counts(self) -> dict[str, int]:
        """As Grader.counts; a row without an answer is a failure."""
        counts = self._grader.counts()
        counts["failures"] += self._unanswered
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
        self._counts = {"graded": 0, "timeouts": 0, "failures": 0}

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
    if name_or_path in VERIFIERS or name_or_path == "math" or is_pairwise(function := _callable(name_or_path)):
        return PairReward(Grader(name_or_path, deadline_s), answer_column)
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any:
        raise ValueError(
            f"{name_or_path} takes ({', '.join(parameters)}): a verifier takes (completion, reference), "
            "a reward function (prompts, completions, **kwargs)"
        )
    return BatchReward(name_or_path, function)


def is_pairwise(function: Callable[..., Any]) -> bool:
    """Whether it is a verifier: its parameters are named completion and reference, any others have defaults."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a builtin
        return False
    free = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return [parameter.name for parameter in parameters[:2]] == ["completion", "reference"] and all(
        parameter.kind in free or parameter.default is not parameter.empty for parameter in parameters[2:]
    )


def text_of(turns: Any) -> str:
    """A completion's text: the string itself, or the last message's content ("" if none; text parts joined)."""
    if isinstance(turns, str):
        return turns
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _callable(name: str) -> Callable[..., Any]:
    if ":" not in name:
        raise ValueError(f"unknown verifier {name!r}: known are {NAMES}")
    return import_callable(name)


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _beginning(text: str) -> str:
    return repr(" ".join(text[:200].split())[:60])


def _among(prompts: Sequence[Any]) -> str:
    first = _beginning(text_of(prompts[0])) if prompts else "none"
    return f"in a batch of {len(prompts)} whose first prompt is {first}"


async def _awaited(values: Any) -> Any:
    return await values


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'`*").casefold()


def _chosen(text: str) -> str | None:
    letters = _CHOICE_MARKED.findall(text) or _CHOICE_ALONE.findall(text)
    return letters[-1].upper() if letters else None
