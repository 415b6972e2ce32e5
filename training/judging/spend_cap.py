"""The cap on what a judge may spend: calls and tokens are reserved before they are used."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class SpentError(Exception):
    """The cap does not allow the next judgement. The message names what is used up."""


class SpendCap:
    """Reserves calls and tokens, so that judgements in progress together don't exceed the cap.

    Args:
        calls, tokens: at most so many in total; None: no cap.
        used_tokens: the tokens that finished calls have used.
    """

    def __init__(self, calls: int | None, tokens: int | None, used_tokens: Callable[[], float]) -> None:
        self.calls = 0  # reserved so far
        self._most_calls, self._most_tokens, self._used_tokens = calls, tokens, used_tokens
        self._reserved_tokens = 0  # of judgements in progress
        self._released = asyncio.Condition()

    @property
    def tokens(self) -> int:
        return round(self._used_tokens())

    @asynccontextmanager
    async def reserve(self, calls: int, tokens: int) -> AsyncIterator[None]:
        """Waits until the judgement fits, as others in progress may use less than they reserved.

        Args:
            tokens: an upper estimate for the judgement.

        Raises:
            SpentError: it will not fit.
        """
        async with self._released:
            while not self._fits_tokens(tokens):
                if not self._reserved_tokens:
                    raise SpentError(f"{self.tokens} of {self._most_tokens} tokens")
                await self._released.wait()
            if self._most_calls is not None and self.calls + calls > self._most_calls:
                raise SpentError(f"{self.calls} of {self._most_calls} calls")
            self.calls += calls
            self._reserved_tokens += tokens
        try:
            yield
        finally:
            async with self._released:
                self._reserved_tokens -= tokens
                self._released.notify_all()

    def _fits_tokens(self, tokens: int) -> bool:
        return self._most_tokens is None or self._used_tokens() + self._reserved_tokens + tokens <= self._most_tokens
