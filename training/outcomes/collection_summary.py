"""What `depo-train collect` tells its user: pass rates, completions without a label, and the next step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from depo_gateway.training.outcomes.completions import (
    CUT_OFF,
    MOST_CUT_OFF,
    CompletionCounts,
    enough_tokens,
)
from depo_gateway.training.outcomes.sampling_client import Backend
from depo_gateway.training.outcomes.table_file import COMPLETIONS
from depo_gateway.training.rewards.verdicts import GRADED, UNREADABLE

SHORT = {UNREADABLE: "unreadable", CUT_OFF: "cut off"}  # in the progress line; the rest is "no label"


@dataclass(slots=True)
class CollectionSummary:
    """Counts over the rows of a table, those of earlier runs included, by model."""

    sums: dict[str, float] = field(default_factory=dict)
    labelled: dict[str, int] = field(default_factory=dict)  # prompts
    completions: dict[str, CompletionCounts] = field(default_factory=dict)
    rows: int = 0  # prompts
    unlabelled: int = 0  # of them without any label
    refusals: dict[str, list[str]] = field(default_factory=dict)  # the server's message, one a refused prompt

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        for name, rate in row["correct"].items():
            self.sums[name] = self.sums.get(name, 0.0) + rate
            self.labelled[name] = self.labelled.get(name, 0) + 1
        for name, counts in row.get(COMPLETIONS, {}).items():
            self.completions.setdefault(name, CompletionCounts()).add(counts)
        self.unlabelled += not row["correct"]

    def rate(self, name: str) -> float | None:
        return self.sums[name] / self.labelled[name] if self.labelled.get(name) else None

    @property
    def nothing_passed(self) -> bool:
        return bool(self.sums) and not any(self.sums.values())

    def progress(self, backends: Sequence[Backend]) -> dict[str, str]:
        """The progress line's entry of each pool: its pass rate, and the completions that are not simply graded."""
        line = {}
        for backend in backends:
            counts = self.completions.get(backend.model, CompletionCounts()).counts
            some = {word: counts[name] for name, word in SHORT.items()}
            some["no label"] = counts.total() - counts[GRADED] - sum(some.values())
            notes = ", ".join(f"{count} {word}" for word, count in some.items() if count)
            rate = self.rate(backend.model)
            line[backend.pool] = ("-" if rate is None else f"{rate:.2f}") + (f" ({notes})" if notes else "")
        return line

    def refusal_lines(self, prompts: int) -> str:
        """Which prompts the servers refused in this run."""
        lines = []
        for name, messages in self.refusals.items():
            some = f"{len(messages)} of {prompts} prompts, for instance"
            lines.append(f"{name} refused {some if self.labelled.get(name) else 'every prompt'}: {messages[0]}\n")
        return "".join(lines)

    def completion_lines(self, backends: Sequence[Backend]) -> str:
        """For each pool with completions that are not simply graded, what became of all."""
        lines = []
        for backend in backends:
            counts = self.completions.get(backend.model)
            if counts is not None and counts.counts.total() > counts.counts[GRADED]:
                lines.append(f"{backend.pool}: of {counts.counts.total()} completions {counts.text()}\n")
        if self.unlabelled:
            lines.append(f"{self.unlabelled} prompts have no label of any pool; their rows hold the counts alone\n")
        return "".join(lines)

    def too_often_cut_off(self, backends: Sequence[Backend]) -> list[Backend]:
        """The backends at which more than MOST_CUT_OFF was cut off: fit refuses them."""
        return [
            backend
            for backend in backends
            if backend.model in self.completions and self.completions[backend.model].cut_off > MOST_CUT_OFF
        ]

    def cut_off_lines(self, backends: Sequence[Backend], limit: int) -> str:
        """What to do about pools at which too much was cut off; "" where there are none."""
        cut = self.too_often_cut_off(backends)
        if not cut:
            return ""
        lines, needed = [], 0
        for backend in cut:
            counts = self.completions[backend.model]
            tokens, how = enough_tokens(counts, limit)
            needed = max(needed, tokens)
            lines.append(
                f"{backend.pool}: {counts.cut_off:.0%} of the completions were cut off at --max-tokens {limit};"
                f" --max-tokens {tokens} would do ({how})\n"
            )
        lines.append(
            "cut-off completions have no label and are mostly those of hard prompts, so depo-train fit refuses this"
            f" table unless --allow-cut-off; collect again with --max-tokens {needed} and another --out\n"
        )
        return "".join(lines)
