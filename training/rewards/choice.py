"""The verifier `choice`: the letter of a multiple-choice question."""

import re

from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

# A lower-case letter is a choice only before a bracket, a full stop or the line's end: in `the answer is a tricky one`
# it is an article.
_CHOICE_MARKED = re.compile(
    r"(?i:answer|choice|option)\s*(?i:is|:)?\s*[*_(\[]*"
    r"([A-E]\b(?!['’])|[a-e](?=[*_]*(?:[)\]]|\.(?!\w)|\s*$)))",
    re.MULTILINE,
)
_CHOICE_ALONE = re.compile(r"(?<![\w'’])[*_(\[]*([A-E])(?![\w'’])")


def grade_choice(completion: str, reference: str) -> RewardVerdict:
    """1 if the completion chooses the reference's letter, A to E: of the last "answer is X", else the last capital."""
    expected, given = _chosen(reference.upper()), _chosen(completion)
    if expected is None:
        return NO_REFERENCE
    return NOT_READABLE if given is None else verdict_of(given == expected)


def _chosen(text: str) -> str | None:
    letters = _CHOICE_MARKED.findall(text) or _CHOICE_ALONE.findall(text)
    return letters[-1].upper() if letters else None
