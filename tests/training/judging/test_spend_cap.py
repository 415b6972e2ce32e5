"""The cap on what a judge may spend."""

import asyncio

import pytest

from depo_gateway.training.judging.spend_cap import SpendCap, SpentError


async def test_calls_never_exceed_the_cap() -> None:
    cap = SpendCap(5, None, lambda: 0)
    for _ in range(2):
        async with cap.reserve(2, 100):
            pass
    with pytest.raises(SpentError, match="4 of 5 calls"):
        async with cap.reserve(2, 0):
            pass
    async with cap.reserve(1, 0):
        pass
    assert cap.calls == 5


async def test_tokens_wait_for_what_others_reserved_and_did_not_use() -> None:
    used = 0.0
    most, now = 0.0, 0

    async def judge(cap: SpendCap) -> bool:
        nonlocal used, most, now
        try:
            async with cap.reserve(1, 400):
                now += 1
                await asyncio.sleep(0.001)
                most = max(most, used + 400 * now)
                used += 100
                now -= 1
        except SpentError:
            return False
        return True

    cap = SpendCap(None, 1000, lambda: used)
    done = await asyncio.gather(*(judge(cap) for _ in range(20)))
    assert sum(done) == 7  # with 700 used, 400 don't fit
    assert most <= 1000
    assert used == 700
