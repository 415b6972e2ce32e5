"""What a verifier says of one completion: its reward, or why there is none."""

from dataclasses import dataclass

GRADED = "graded"  # the completion's result was compared with the reference
UNREADABLE = "unreadable"  # a finished answer without a readable result: reward 0
REFERENCE = "reference"  # the verifier cannot use the reference: no reward
TIMEOUT = "timeout"  # the verifier ran out of time: no reward
FAILURE = "failure"  # the verifier failed, or gave no reward


@dataclass(frozen=True, slots=True)
class RewardVerdict:
    """The reward of a completion and how it came about. `reward` is None where there is no label."""

    reward: float | None
    outcome: str  # one of the above


WRONG = RewardVerdict(0.0, GRADED)
RIGHT = RewardVerdict(1.0, GRADED)
NOT_READABLE = RewardVerdict(0.0, UNREADABLE)
NO_REFERENCE = RewardVerdict(None, REFERENCE)


def verdict_of(equal: bool) -> RewardVerdict:
    """The verdict on a result that was compared."""
    return RIGHT if equal else WRONG
