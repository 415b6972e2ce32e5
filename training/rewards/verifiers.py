"""Verifiable rewards: grade a completion against a reference.

A verifier has a name: `exact`, `number`, `choice` (pure functions), `math` (math-verify), or the import path of the
user's function. All but the pure ones run in worker processes with a deadline (worker_pool). A missing reward (None) is
not a reward of 0: it is counted, and the caller leaves the completion out.
"""

import importlib.util
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from depo_gateway.training.rewards.choice import grade_choice
from depo_gateway.training.rewards.exact import grade_exact
from depo_gateway.training.rewards.import_path import absolute_import_path, import_callable
from depo_gateway.training.rewards.number import grade_number
from depo_gateway.training.rewards.verdicts import FAILURE, GRADED, REFERENCE, TIMEOUT, UNREADABLE, RewardVerdict
from depo_gateway.training.rewards.worker_pool import RewardError, Workers

PureVerifier = Callable[[str, str], RewardVerdict]  # (completion, reference) -> verdict

VERIFIERS: Mapping[str, PureVerifier] = {"exact": grade_exact, "number": grade_number, "choice": grade_choice}
MATH = "depo_gateway.training.rewards.math_answers:grade_math"
NAMES = f"{', '.join(VERIFIERS)}, math, or your own function as module:function or file.py:function"
# Why a reference cannot be used, after "its answer".
FAULTS = {
    "exact": "is empty",
    "number": "holds no number that the verifier number can read",
    "choice": "names no letter, as A, (B) or C. text do, and no index",
    "math": "holds no answer that math-verify can read",
}
COUNTS = {  # outcome -> its name in Grader.counts
    GRADED: "graded",
    UNREADABLE: "unreadable",
    REFERENCE: "references",
    TIMEOUT: "timeouts",
    FAILURE: "failures",
}


class Grader:
    """Grades (completion, reference) pairs by a named verifier, and counts the verdicts.

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
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
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

    def verdicts(self, pairs: Sequence[tuple[str, str]], prompts: Sequence[str] = ()) -> list[RewardVerdict]:
        """The verdicts on (completion, reference) pairs, in their order. Any thread may call it.

        `prompts`: the pairs' prompts, if known, for the error message.

        Raises:
            RewardError: the user's function raised, or did not return a number.
        """
        verdicts = self._verdicts(pairs, prompts)
        with self._lock:
            self._counts.update(verdict.outcome for verdict in verdicts)
        return verdicts

    def grade(self, pairs: Sequence[tuple[str, str]], prompts: Sequence[str] = ()) -> list[float | None]:
        """The rewards alone of `verdicts`: None where there is no label."""
        return [verdict.reward for verdict in self.verdicts(pairs, prompts)]

    def unusable(self, references: Sequence[str]) -> list[str | None]:
        """For each reference, why this verifier cannot use it ("holds no number ..."); None if it can.

        A function of the user's is not asked: all its references are taken as usable.
        """
        if self.name not in FAULTS:
            return [None] * len(references)
        different = list(dict.fromkeys(references))
        verdicts = dict(zip(different, self._verdicts([("", each) for each in different]), strict=True))
        slow = f"takes the verifier {self.name} over {self.deadline_s:g} s to read"
        faults = {REFERENCE: FAULTS[self.name], TIMEOUT: slow, FAILURE: f"makes the verifier {self.name} fail"}
        return [faults.get(verdicts[reference].outcome) for reference in references]

    def counts(self) -> dict[str, int]:
        """Completions since the last call, each once: graded, unreadable, references, timeouts, failures.

        Those graded and unreadable (a reward of 0: a finished answer without a readable result) have a reward, the
        others have none: the reference cannot be used, the deadline passed, or the verifier failed.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {name: counts[outcome] for outcome, name in COUNTS.items()}

    def close(self) -> None:
        """Stops the worker processes. They also end with this process, however it ends."""
        if self._workers is not None:
            self._workers.close()

    def _verdicts(self, pairs: Sequence[tuple[str, str]], prompts: Sequence[str] = ()) -> list[RewardVerdict]:
        if self._workers is None:
            assert self._pure is not None
            return [self._pure(completion, reference) for completion, reference in pairs]
        try:
            return self._workers.grade(pairs)
        except RewardError as error:
            of = f"of the prompt {beginning_of(prompts[error.index])}" if prompts else ""
            which = f"the completion {beginning_of(pairs[error.index][0])} {of}".strip()
            raise RewardError(f"the verifier {self.name} {error}, at {which}") from error.__cause__


def is_verifier(name: str) -> bool:
    """Whether it is the name of a verifier of ours. Raises ValueError if it is no import path either."""
    if name not in FAULTS and ":" not in name:
        raise ValueError(f"unknown verifier {name!r}: known are {NAMES}")
    return name in FAULTS


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


def beginning_of(text: str) -> str:
    """The first words of a text, quoted, for an error message."""
    return repr(" ".join(text[:200].split())[:60])


def _callable(name: str) -> Callable[..., Any]:
    is_verifier(name)
    return import_callable(name)
