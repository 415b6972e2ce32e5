"""DEPO plus: rank candidates by the probability that their rollouts differ, which is what GRPO learns from."""

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.selection_config import POLICY, SPREAD
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Informative(SelectionRule):
    """Ranks `candidates` times the prompts needed; reads further ones until enough are good."""

    heads = (POLICY, SPREAD)
    settings = ("candidates",)
    reads = ("explore", "refill_cap")

    def __init__(self, candidates: float = 4.0) -> None:
        self.candidates = candidates

    def select(self, need: int, candidates: Candidates) -> Selection:
        limit, wanted = candidates.limit(need), round(need * self.candidates)
        rows, threshold = candidates.carried(), candidates.worth_threshold()
        worth: dict[int, float] = {}
        considered, missing = len(rows), max(wanted - len(rows), 0)
        while True:
            rows += candidates.draw(missing)
            considered += missing
            worth |= zip(rows, candidates.worth(rows).tolist(), strict=True)
            good = sum(value >= threshold for value in worth.values())
            if good >= need or considered >= limit:
                break
            rows, missing = [], min(need, limit - considered)
        ranked = sorted(worth, key=lambda row: -worth[row])
        accepted = min(good, wanted)  # good ones beyond this batch and the next return with the next epoch
        return Selection(ranked[:accepted], ranked[accepted:])
