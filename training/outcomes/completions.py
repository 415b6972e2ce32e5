"""What became of a model's completions: which finished, which have a label, and the length that would let them finish.

An outcome row counts them by model, in its field `completions`: {model: {outcome: count, "tokens": [lengths]}}.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, linear_regression
from typing import Any

from depo_gateway.training.rewards.verdicts import FAILURE, GRADED, REFERENCE, TIMEOUT, UNREADABLE

CUT_OFF, ABORTED, NO_VERDICT = "cut_off", "aborted", "no_verdict"
TOKENS = "tokens"  # the lengths of the finished completions, as far as the server tells them
# outcome -> how a summary says it, after a number
OUTCOMES = {
    GRADED: "graded",
    UNREADABLE: "finished without a readable result (counted as wrong)",
    CUT_OFF: "cut off",
    ABORTED: "broken off by the server",
    REFERENCE: "with a reference that the verifier can't use",
    TIMEOUT: "over the verifier's deadline",
    FAILURE: "failed in the verifier",
    NO_VERDICT: "without a verdict of the judge",
}
MOST_CUT_OFF = 0.1  # share of a model's completions; above it `fit` refuses
LEFT_CUT_OFF = 0.02  # share that the suggested limit should leave
LEAST_LENGTHS = 20  # finished completions for an estimate
FARTHEST = 8  # times the limit: an estimate never goes beyond it


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion."""

    text: str  # the message's content; reasoning that the server put into another field is not in it
    end: str = ""  # CUT_OFF or ABORTED; "": it finished
    token_confidence: float | None = None
    tokens: int | None = None  # its length, reasoning included; None: the server does not tell


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """One model's label on one prompt."""

    quality: float | None  # the mean over the completions with a label; None: none has one
    counts: Mapping[str, Any]  # the row's entry in `completions`
    outcomes: Sequence[str] = ()  # of each completion
    scores: Sequence[float | None] = ()  # of each completion; None: no label


class CompletionCounts:
    """Counts of one model's completions over many rows."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lengths: list[int] = []

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds a row's entry of the model."""
        self.counts.update({name: count for name, count in counts.items() if name != TOKENS})
        self.lengths += counts.get(TOKENS, [])

    @property
    def cut_off(self) -> float:
        """The share that was cut off; 0 where nothing is known."""
        total = self.counts.total()
        return self.counts[CUT_OFF] / total if total else 0.0

    def text(self, names: Iterable[str] = OUTCOMES) -> str:
        """`3 cut off, 1 unreadable`: those outcomes that occurred."""
        return ", ".join(f"{self.counts[name]} {OUTCOMES[name]}" for name in names if self.counts[name])


def check_counts(counts: Any) -> None:
    """Raises ValueError where a row's `completions` are malformed."""
    entries = counts.values() if isinstance(counts, dict) else [None]
    for entry in entries:
        numbers = [
            value
            for name, given in (entry.items() if isinstance(entry, dict) else [("", None)])
            for value in (given if name == TOKENS and isinstance(given, list) else [given])
        ]
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in numbers):
            raise ValueError("completions must be an object, model -> {outcome: count}")


def enough_tokens(counts: CompletionCounts, limit: int) -> tuple[int, str]:
    """The --max-tokens that would cut off about LEFT_CUT_OFF, and how sure that is, in words.

    The lengths that were observed are those below the limit. A log-normal distribution is fitted to them, each at its
    quantile among all completions, and followed beyond the limit. With too few lengths, or more than half cut off,
    the limit is doubled.
    """
    lengths, cut = sorted(counts.lengths), counts.counts[CUT_OFF]
    total = len(lengths) + cut
    if len(lengths) < LEAST_LENGTHS or 2 * cut > total or lengths[0] == lengths[-1]:
        return 2 * limit, "twice the limit: too few finished with a known length to estimate more"
    normal = NormalDist()
    quantiles = [normal.inv_cdf((rank + 0.5) / total) for rank in range(len(lengths))]
    slope, start = linear_regression(quantiles, [math.log(max(1, length)) for length in lengths])
    exponent = start + slope * normal.inv_cdf(1 - LEFT_CUT_OFF)
    how = f"an estimate, by a log-normal distribution fitted to the lengths of the {len(lengths)} that finished"
    if exponent > math.log(FARTHEST * limit):
        return FARTHEST * limit, f"{how}; more may be needed, and none is enough for a model that repeats itself"
    return round_up(max(math.exp(exponent), 1.25 * limit)), how


def round_up(tokens: float) -> int:
    """The next number of tokens with at most four significant bits: 1536, 1664, 1792."""
    step: int = 2 ** max(0, math.floor(math.log2(tokens)) - 3)
    return math.ceil(tokens / step) * step


def mean_confidence(completions: Sequence[Completion]) -> float | None:
    """The mean token confidence of the finished completions; None where the server tells none."""
    values = [each.token_confidence for each in completions if not each.end and each.token_confidence is not None]
    return round(sum(values) / len(values), 4) if values else None
