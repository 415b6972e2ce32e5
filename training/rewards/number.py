"""The verifier `number`: equal numbers."""

import re
from decimal import Decimal, InvalidOperation

from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

# A sign counts only if no operand precedes it: the last number of `7-3` is 3, of `x = -3` it is -3.
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\w.)\]])-?{_UNSIGNED}|(?<=[-+*/=]){_UNSIGNED}")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators allowed; None if there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def grade_number(completion: str, reference: str) -> RewardVerdict:
    """1 if the last number of the completion equals the reference's last number (`18` = `18.0` = `$18.00`)."""
    expected, given = last_number(reference), last_number(completion)
    if expected is None:
        return NO_REFERENCE
    return NOT_READABLE if given is None else verdict_of(given == expected)
