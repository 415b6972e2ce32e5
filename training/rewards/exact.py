"""The verifier `exact`: equal texts."""

import re

from depo_gateway.training.rewards.verdicts import NO_REFERENCE, RewardVerdict, verdict_of


def grade_exact(completion: str, reference: str) -> RewardVerdict:
    """1 if the texts are equal, ignoring case, outer punctuation and repeated whitespace."""
    if not reference.strip():
        return NO_REFERENCE
    return verdict_of(_normalised(completion) == _normalised(reference))


def _normalised(text: str) -> str:
    plain = " ".join(text.split())
    return (re.sub(r"^[\s.,;:!?\"'`*]+|[\s.,;:!?\"'`*]+$", "", plain) or plain).casefold()
