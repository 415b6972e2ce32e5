"""The verifier `exact`: equal texts."""

import re

from depo_gateway.training.rewards.answers import answer_part, boxed, reference_part
from depo_gateway.training.rewards.plain_text import keyboard_text
from depo_gateway.training.rewards.reasoning import final_text
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

_OUTER = " \t\n.,;:!?\"'`*_。、，！？；：「」『』…"
_FONT = re.compile(r"\\(?:text|mathrm)(?:bf|it|rm)?\{([^{}]*)\}")


def grade_exact(completion: str, reference: str) -> RewardVerdict:
    """1 if the texts are equal, ignoring case, outer punctuation, repeated whitespace and the form of quotes."""
    expected = _normalised(reference_part(reference))
    if not expected:
        return NO_REFERENCE
    answer = answer_part(final_text(completion) or "")
    if not answer:
        return NOT_READABLE
    box = boxed(answer)
    return verdict_of(_normalised(answer) == expected or (box is not None and _normalised(box) == expected))


def _normalised(text: str) -> str:
    """The text to compare. Punctuation alone is kept, so that "?" is not equal to "!"."""
    plain = " ".join(_FONT.sub(r"\1", keyboard_text(text)).split())
    return (plain.strip(_OUTER) or plain).casefold()
