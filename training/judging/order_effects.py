"""Order effects of a judging model: how far its verdict on two answers depends on which of them stands first."""

import math
from collections.abc import Sequence

from depo_gateway.estimator.share_interval import NORMAL_QUANTILE, share_text

Grades = tuple[float, float]  # of the first answer and of the second
FLIPS_SHOWN_AS_FAULT = 0.3  # share of comparisons whose winner depends on the order, from which on it is a warning


def order_effect(straight: Grades, swapped: Grades) -> str:
    """`none`: both orders name the same winner, or both a tie. Else the position that the pair favours, `first` or
    `second`. `swapped` is the verdict on the same answers in the other order.
    """
    if _sign(straight[0] - straight[1]) == _sign(swapped[1] - swapped[0]):
        return "none"
    return "first" if straight[0] - straight[1] + swapped[0] - swapped[1] > 0 else "second"


class OrderEffects:
    """The order effects of many comparisons. Each is two verdicts, on the same two answers in both orders."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("none", "first", "second"), 0)
        self._first_wins: list[float] = []  # by comparison with a winner: its verdicts won by the first position
        self._advantages: list[float] = []  # by comparison: the first position's grade less the second's

    def add(self, straight: Grades, swapped: Grades) -> None:
        self.counts[order_effect(straight, swapped)] += 1
        won = [float(first > second) for first, second in (straight, swapped) if first != second]
        if won:
            self._first_wins.append(sum(won) / len(won))
        self._advantages.append((straight[0] - straight[1] + swapped[0] - swapped[1]) / 2)

    @property
    def flipped(self) -> float:
        """The share of comparisons whose winner depends on the order; 0 without comparisons."""
        total = sum(self.counts.values())
        return 1 - self.counts["none"] / total if total else 0.0

    def text(self) -> str:
        """Lines on how often the order decides, for the user; "" without comparisons."""
        total = sum(self.counts.values())
        if not total:
            return ""
        changed = total - self.counts["none"]
        lines = [
            f"judge: {total} comparisons in both orders; the winner changed with the order in"
            f" {share_text(changed / total, total)} of them"
        ]
        if self._first_wins:
            first = share_text(sum(self._first_wins) / len(self._first_wins), len(self._first_wins))
            lines.append(
                f"judge: the answer in first position won {first} of the verdicts"
                f" with a winner (unbiased: 50%); its grade was {_mean_with_interval(self._advantages)} higher of 10"
            )
        if self.flipped >= FLIPS_SHOWN_AS_FAULT:
            lines.append(
                "judge: the mean over both orders cancels this bias, but such verdicts say little about the answers:"
                " use a stronger judge, or a clearer rubric"
            )
        return "".join(f"{line}\n" for line in lines)


def _mean_with_interval(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    half = NORMAL_QUANTILE * spread / math.sqrt(len(values))
    mean, low, high = (round(value, 1) + 0.0 for value in (mean, mean - half, mean + half))  # + 0.0: no "-0.0"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
