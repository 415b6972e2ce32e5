"""DEPO's rule (arXiv 2602.06375): keep the prompts whose predicted pass rate lies in a band."""

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.selection_config import POLICY
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Band(SelectionRule):
    """Reads the stream batch by batch until enough prompts lie in [low, high]. Of the others the nearest come first."""

    heads = (POLICY,)
    settings = ("low", "high")
    reads = ("explore", "refill_cap")

    def __init__(self, low: float = 0.15, high: float = 0.85) -> None:
        self.low, self.high = low, high

    def select(self, need: int, candidates: Candidates) -> Selection:
        accepted, limit = candidates.carried(), candidates.limit(need)
        distance: dict[int, float] = {}
        while len(accepted) < need and candidates.drawn < limit:
            rows = candidates.draw(min(need, limit - candidates.drawn))
            for row, rate in zip(rows, candidates.pass_rates(rows).tolist(), strict=True):
                if self.low <= rate <= self.high:
                    accepted.append(row)
                else:
                    distance[row] = max(self.low - rate, rate - self.high)
        return Selection(accepted, sorted(distance, key=distance.__getitem__), scored=candidates.drawn)
