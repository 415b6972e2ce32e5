"""Settings of how labels of served traffic are weighed."""

from __future__ import annotations

from dataclasses import dataclass

from depo_gateway.estimator.configuration.yaml_tree import at_least, within


@dataclass(frozen=True, slots=True)
class TrafficConfig:
    """Which labels are used, and how much each counts."""

    clip: float = 10.0  # the largest inverse-propensity weight
    key_share: float = 0.2  # of the weight of all client claims, one key's part at most; of few keys 1 / their number
    burst: int = 20  # near-duplicate prompts with like labels of one key within burst_seconds: all are left out
    burst_seconds: float = 600.0
    near: float = 0.8  # Jaccard similarity of shingles of words from which on two prompts are near-duplicates
    lying: float = 4.0  # robust z-score of a key's disagreement with the other labels, from which on it is untrusted

    def __post_init__(self) -> None:
        at_least(self.clip, 1, "clip")
        within(self.key_share, 0.01, 1, "key_share")
        at_least(self.burst, 2, "burst")
        at_least(self.burst_seconds, 0, "burst_seconds")
        within(self.near, 0.1, 1, "near")
        at_least(self.lying, 1, "lying")
