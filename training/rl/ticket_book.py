"""The tickets of a selector: chosen and waiting to be taken, in flight, reported. Not thread-safe; Selector locks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depo_gateway.training.rl.group_labels import Group
from depo_gateway.training.rl.tickets import InFlight, Ticket


class TicketBook:
    """Which tickets exist, and what was reported of them."""

    def __init__(self) -> None:
        self.next_id = 0
        self.waiting: list[Ticket] = []  # chosen, not yet taken
        self._out: dict[int, Ticket] = {}  # taken and not yet learned from
        self._reported: dict[int, Group] = {}  # by ticket, since the last step
        self._again: list[Ticket] = []  # in flight when the state was saved, and to be taken again

    def issue(self, row: int, version: int, propensity: float, logits: tuple[float, float], predicted: float) -> None:
        """A new ticket, which waits to be taken."""
        self.waiting.append(Ticket(self.next_id, row, version, propensity, logits, predicted))
        self.next_id += 1

    def take(self, count: int) -> list[Ticket]:
        """Up to `count` tickets: first those to be taken again, then waiting ones."""
        taken, self._again = self._again[:count], self._again[count:]
        fresh = count - len(taken)
        taken += self.waiting[:fresh]
        self.waiting = self.waiting[fresh:]
        self._out |= {ticket.id: ticket for ticket in taken}
        return taken

    def rows(self) -> set[int]:
        """The rows that have a ticket."""
        return {ticket.row for ticket in (*self._out.values(), *self.waiting)}

    def report(self, ticket: int, rewards: Sequence[float | None], log_probs: Sequence[float]) -> bool:
        if ticket not in self._out or ticket in self._reported:
            return False
        group = Group(self._out[ticket].row, tuple(map(float, numbers(rewards))), tuple(map(float, log_probs)))
        self._reported[ticket] = group
        self._again = [other for other in self._again if other.id != ticket]
        return True

    def release(self, ticket: int) -> bool:
        if ticket not in self._out or ticket in self._reported:
            return False
        del self._out[ticket]
        self._again = [other for other in self._again if other.id != ticket]
        return True

    def unreported_before(self, version: int) -> list[int]:
        """The tickets in flight that were chosen before generation `version`."""
        return [t.id for t in self._out.values() if t.id not in self._reported and t.version < version]

    def settle(self) -> list[tuple[Ticket, Group]]:
        """The tickets reported since the last call with their groups, in the order of their reports; now done with."""
        reported = [(self._out.pop(ticket), group) for ticket, group in self._reported.items()]
        self._reported.clear()
        return reported

    def state_dict(self) -> dict[str, Any]:
        return {
            "next": self.next_id,
            "waiting": [_ticket_values(ticket) for ticket in self.waiting],
            "out": [_ticket_values(ticket) for ticket in self._out.values()],
            "reported": [
                [ticket, plain_values(group.rewards), plain_values(group.log_probs)]
                for ticket, group in self._reported.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], in_flight: InFlight) -> None:
        self.next_id = state["next"]
        self.waiting = [_ticket_of(values) for values in state["waiting"]]
        out = [_ticket_of(values) for values in state["out"]]
        reported = {ticket for ticket, *_ in state["reported"]}
        self._out = {ticket.id: ticket for ticket in out if in_flight != "dropped" or ticket.id in reported}
        self._reported = {
            ticket: Group(self._out[ticket].row, numbers(rewards), numbers(log_probs))
            for ticket, rewards, log_probs in state["reported"]
        }
        self._again = [ticket for ticket in out if in_flight == "again" and ticket.id not in reported]


def plain_values(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON: None for NaN."""
    return [None if math.isnan(value) else value for value in values]


def numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    """What plain_values() was made of."""
    return tuple(math.nan if value is None else value for value in values)


def _ticket_values(ticket: Ticket) -> list[Any]:
    head = [ticket.id, ticket.row, ticket.version, ticket.propensity]
    return [*head, plain_values(ticket.logits), *plain_values([ticket.predicted])]


def _ticket_of(values: Sequence[Any]) -> Ticket:
    number, row, version, propensity, logits, predicted = values
    mean, spread = numbers(logits)
    return Ticket(number, row, version, propensity, (mean, spread), *numbers([predicted]))
