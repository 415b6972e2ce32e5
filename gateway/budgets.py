"""What one API key may use: requests a minute, and the share of them that the last pool serves. Pure: time comes in.

Both are buckets. Each replica of the gateway holds its own, so n replicas let a key make n times the requests.

A request earns its share of a call of the last pool when it is answered: one that is refused or given up earns nothing.
Only a call of the last pool itself has its own share at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from depo_gateway.gateway.auth_config import Key

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
        """The share of a request that another pool has answered."""
        self._add(self.key.large_share or 0.0)

    def pay(self) -> bool:
        """Takes one call of the last pool, less this request's own share, if there is one.

        So of any n requests that a pool answered at most large_share * n + BURST are the last one's.
        """
        price = self._price
        if self.key.large_share is None:
            return True
        if not self.key.large_share or self.calls < price - 1e-9:  # nine times .1 is a little less than .9
            return False
        self.calls = max(0.0, self.calls - price)
        return True

    def refund(self) -> None:
        """Gives back what was paid for a call that the last pool did not serve."""
        self._add(self._price)

    @property
    def _price(self) -> float:
        return 1.0 - (self.key.large_share or 0.0)

    def _add(self, calls: float) -> None:
        self.calls = min(self.most_calls, self.calls + calls)


class Budgets:
    """The accounts of all keys, by name."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def apply(self, keys: Iterable[Key], now: float) -> None:
        """Takes the keys of a config. Those that were there keep what they have, within their new bounds.

        They keep their account, too, for requests under way hold it and settle with it.
        """
        accounts = {}
        for key in keys:
            account = accounts[key.name] = self._accounts.get(key.name) or Account(Key(key.name, ""), 0.0, 0.0, now)
            before, account.key = account.key, key
            if before.requests_per_minute is None:
                account.requests, account.at = account.at_once, now
            if before.large_share is None:
                account.calls = account.most_calls
            account.requests = min(account.requests, account.at_once)
            account.calls = min(account.calls, account.most_calls)
        self._accounts = accounts

    def left(self) -> dict[str, float]:
        """Calls of the last pool saved up by each key that may have any, by its name."""
        return {name: account.calls for name, account in self._accounts.items() if account.key.large_share}

    def account(self, name: str) -> Account | None:
        """None for the name of no key: an open gateway's."""
        return self._accounts.get(name)
