"""Every prompt in its turn: GRPO, DAPO, and every rule's warm-up."""

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class InOrder(SelectionRule):
    """Leaves no prompt out."""

    selective = False

    def select(self, need: int, candidates: Candidates) -> Selection:
        rows = candidates.carried()
        while len(rows) < need:
            rows += candidates.draw(need - len(rows))
        return Selection(rows)
