"""Example: what an estimator learns from. One prompt and what was seen of each pool on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its labels. A pool that is absent, or None, has no label: it is masked, never guessed.

    `quality` is the mean reward of that pool on this prompt, in [0, 1]; `token_confidence` is exp of the mean token
    log-probability of its completions, in (0, 1]. `group` keeps related prompts on one side of a split ("" = alone).
    """

    prompt: str
    quality: Mapping[str, float | None]
    token_confidence: Mapping[str, float | None] = field(default_factory=dict)
    weight: float = 1.0
    group: str = ""
    context: str = ""  # the conversation before the prompt, as text.prompt_of_messages gives it

    def __post_init__(self) -> None:
        for name, labels in (("quality", self.quality), ("token confidence", self.token_confidence)):
            for pool, value in labels.items():
                if value is not None and not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} of pool {pool!r} is {value}; it must lie between 0 and 1")
        if not self.weight >= 0.0:
            raise ValueError(f"an example's weight is {self.weight}; it must be 0 or more")
