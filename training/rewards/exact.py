"""The verifier `exact`: equal texts."""

import re

from depo_gateway.training.rewards.answers import answer_part, boxed, hashed, reference_part, statements
from depo_gateway.training.rewards.plain_text import keyboard_text
from depo_gateway.training.rewards.reasoning import final_text
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

_OUTER = " \t\n.,;:!?\"'`*_。、，！？；：「」『』…"
_FONT = re.compile(r"\\(?:text|mathrm)(?:bf|it|rm)?\{([^{}]*)\}")


def grade_exact(completion: str, reference: str) -> RewardVerdict:
    """1 if the texts are equal, ignoring case, outer punctuation, repeated whitespace and the form of quotes.

    The text is the whole completion, or what it marks as its answer.
    """
    expected = _normalised(reference_part(reference))
    if not expected:
        return NO_REFERENCE
    answer = answer_part(final_text(completion) or "")
    if not answer:
        return NOT_READABLE
    texts = (answer, boxed(answer), hashed(answer), next(statements(answer), None))
    return verdict_of(any(text is not None and _normalised(text) == expected for text in texts))


def _normalised(text: str) -> str:
    """The text to compare. Punctuation alone is kept, so that "?" is not equal to "!"."""
    plain = " ".join(_FONT.sub(r"\1", keyboard_text(text)).split())
    return (plain.strip(_OUTER) or plain).casefold()
