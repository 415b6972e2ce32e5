"""What one API key may use: requests a minute, and the share of them that the last pool serves. Pure: time comes in.

Both are buckets. Each replica of the gateway holds its own, so n replicas let a key make n times the requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.config import Key

BURST = 10.0  # calls of the last pool beyond the share that a key may have saved up


@dataclass(slots=True, eq=False)
class Account:
    """One key's buckets."""

    key: Key
    requests: float  # that may come now
    calls: float  # of the last pool that are left
    at: float  # seconds, when `requests` was right

    @property
    def at_once(self) -> float:
        """The most requests that may come together: a minute's."""
        return max(1.0, self.key.requests_per_minute or 0.0)

    @property
    def most_calls(self) -> float:
        """The most calls of the last pool that a key may have saved up; its share may be 0, and then it has none."""
        return BURST if self.key.large_share else 0.0

    def admit(self, now: float) -> float:
        """Takes one request. 0, or the seconds after which the next one will be let in."""
        rate = self.key.requests_per_minute
        if rate is None:
            return 0.0
        self.requests = min(self.at_once, self.requests + max(0.0, now - self.at) * rate / 60)
        self.at = now
        if self.requests < 1.0:
            return (1.0 - self.requests) * 60 / rate
        self.requests -= 1.0
        return 0.0

    def earn(self) -> None:
        """A request's share of a call of the last pool."""
        if self.key.large_share is not None:
            self.calls = min(self.most_calls, self.calls + self.key.large_share)

    def pay(self) -> bool:
        """Takes one call of the last pool, if there is one: in any n requests at most large_share * n + BURST are."""
        if self.key.large_share is None:
            return True
        if self.calls < 1.0 - 1e-9:  # ten times .1 is a little less than 1
            return False
        self.calls = max(0.0, self.calls - 1.0)
        return True

    def refund(self) -> None:
        """Gives a call back that the last pool did not answer."""
        if self.key.large_share is not None:
            self.calls = min(self.most_calls, self.calls + 1.0)


class Budgets:
    """The accounts of all keys, by name."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def apply(self, keys: Iterable[Key], now: float) -> None:
        """Takes the keys of a config. Those that were there keep what they have, within their new bounds."""
        accounts = {}
        for key in keys:
            fresh = accounts[key.name] = Account(key, 0.0, 0.0, now)
            fresh.requests, fresh.calls = fresh.at_once, fresh.most_calls
            before = self._accounts.get(key.name)
            if before is not None and before.key.requests_per_minute is not None:
                fresh.requests, fresh.at = min(before.requests, fresh.at_once), before.at
            if before is not None and before.key.large_share is not None:
                fresh.calls = min(before.calls, fresh.most_calls)
        self._accounts = accounts

    def account(self, name: str) -> Account | None:
        """None for the name of no key: an open gateway's."""
        return self._accounts.get(name)
