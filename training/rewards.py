"""Verifiable rewards: was this completion right, given the reference? Pure functions by name, each in [0, 1]."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

Verifier = Callable[[str, str], float]  # (completion, reference) -> reward

# A sign counts only where no operand stands before it: the last number of `7-3` is 3, of `x = -3` it is -3.
_NUMBER = re.compile(r"(?<![\w.)\]])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<=[-+*/=])\d+(?:\.\d+)?")
_CHOICE_SAID = re.compile(r"(?:answer|choice|option)\s*(?:is|:)?\s*[*_(\[]*([A-E])\b(?!['’])", re.IGNORECASE)
_CHOICE_ALONE = re.compile(r"(?<![\w'’])[*_(\[]*([A-E])(?![\w'’])")


def last_number(text: str) -> Decimal | None:
    """The last number written in a text, thousands separators allowed; None where there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def exact(completion: str, reference: str) -> float:
    """1 if the two are the same text, blind to case, outer punctuation and runs of whitespace."""
    return float(_normalised(completion) == _normalised(reference))


def number(completion: str, reference: str) -> float:
    """1 if the last number of the completion equals the reference's last number (`18` = `18.0` = `$18.00`)."""
    wanted = last_number(reference)
    return float(wanted is not None and last_number(completion) == wanted)


def choice(completion: str, reference: str) -> float:
    """1 if the completion chooses the reference's letter, A to E: the last "answer is X", else a lone capital."""
    wanted = _chosen(reference.upper())
    return float(wanted is not None and _chosen(completion) == wanted)


VERIFIERS: Mapping[str, Verifier] = {"exact": exact, "number": number, "choice": choice}


def verifier(name: str) -> Verifier:
    """The verifier of that name; ValueError naming those there are."""
    if name not in VERIFIERS:
        raise ValueError(f"unknown verifier {name!r}: known are {', '.join(VERIFIERS)}")
    return VERIFIERS[name]


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'`*").casefold()


def _chosen(text: str) -> str | None:
    said = _CHOICE_SAID.findall(text) or _CHOICE_ALONE.findall(text)
    return said[-1].upper() if said else None
