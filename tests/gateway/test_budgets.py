"""Per-key budgets: the arithmetic by properties, then a gateway that enforces it."""

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import budgets, config
from depo_gateway.gateway.auth_config import Key
from depo_gateway.gateway.budgets import BURST, Account, Budgets
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.routing import Decision, Eligible
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway, running, settings


def opened(**limits: float) -> Account:
    made = Budgets()
    made.apply([Key("a", "0", **limits)], 0.0)
    account = made.account("a")
    assert account is not None
    return account


@given(
    share=st.floats(0.0, 1.0),
    wants=st.lists(st.tuples(st.sampled_from(["large", "small", "lost", "insists"]), st.integers(0, 30)), max_size=300),
)
def test_the_last_pool_serves_at_most_the_share_of_what_is_answered_and_a_burst(
    share: float, wants: list[tuple[str, int]]
) -> None:
    """Each ends when so many others have come after it."""
    account = opened(large_share=share)
    served, running = [], dict[int, list[str]]()
    for now, (want, lasts) in enumerate(wants):
        paid = want != "small" and account.pay()
        running.setdefault(now + lasts, []).append(want if paid else "refused" if want == "insists" else "small")
        for end in running.pop(now, []):
            if end == "lost":
                account.refund()
            elif end == "small":
                account.earn()
            if end in ("large", "insists", "small"):
                served.append(int(end != "small"))
    burst = BURST if share else 0.0
    for start in range(len(served)):
        for end in (start + 1, (start + len(served)) // 2, len(served)):
            late = 30 * share if start else 0.0  # what was paid before the window and answered in it
            assert sum(served[start:end]) <= share * max(0, end - start) + burst + late + 1e-6


@given(st.floats(0.01, 1.0))
def test_what_is_allowed_is_used(share: float) -> None:
    account = opened(large_share=share)
    served = 0
    for _ in range(1000):
        if account.pay():
            served += 1
        else:
            account.earn()
    assert served >= int(share * 1000)


def test_a_share_of_nothing_is_nothing_and_none_is_no_limit() -> None:
    nothing, free = opened(large_share=0.0), opened()
    for _ in range(50):
        assert not nothing.pay()
        nothing.earn()
        assert free.pay()


@given(
    rate=st.floats(0.5, 600.0),
    gaps=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=200),
)
def test_requests_a_minute_are_bounded(rate: float, gaps: list[float]) -> None:
    account, now = opened(requests_per_minute=rate), 0.0
    times = []
    for gap in gaps:
        now += gap
        wait = account.admit(now)
        assert (wait == 0.0) or 0 < wait <= 60 / rate + 1e-6
        if not wait:
            times.append(now)
    for index, start in enumerate(times):
        within = [time for time in times[index:] if time <= start + 60]
        assert len(within) <= max(1.0, rate) + rate + 1e-6


def test_a_client_that_waits_retry_after_is_admitted() -> None:
    account = opened(requests_per_minute=6)
    assert [account.admit(0.0) for _ in range(7)] == [0.0] * 6 + [10.0]
    assert account.admit(9.9) > 0
    assert account.admit(10.0) == 0.0
    assert account.admit(5.0) > 0  # a clock that went back gives nothing away


def test_a_reload_keeps_the_buckets_of_keys_that_stay() -> None:
    made = Budgets()
    keys = [Key("a", "0", 60, 0.5), Key("b", "1", 60, 0.5), Key("c", "2")]
    made.apply(keys, 0.0)
    for name in ("a", "b"):
        account = made.account(name)
        assert account is not None
        for _ in range(60):
            account.admit(0.0)
        for _ in range(20):
            account.pay()
    held = made.account("a")
    assert made.account("nobody") is None
    made.apply([dataclasses.replace(keys[0], large_share=0.4), Key("c", "2", 5, 0.1)], 1.0)
    assert made.account("b") is None
    a, c = made.account("a"), made.account("c")
    assert a is not None
    assert c is not None
    assert (a.requests, a.calls, a.key.large_share) == (0.0, 0.0, 0.4)
    assert a is held  # which requests under way will settle with
    held.refund()
    assert a.calls == pytest.approx(0.6)
    assert (c.requests, c.calls) == (5.0, BURST)
    made.apply([Key("a", "0", 60, 0.5), keys[1]], 2.0)
    b = made.account("b")
    assert b is not None
    assert (b.requests, b.calls) == (60.0, BURST)  # gone and come back


# In a gateway.

KEYS = {name: f"sk-depo-{name}" for name in ("bounded", "slow", "free")}


def auth(**limits: dict[str, Any]) -> dict[str, Any]:
    return {
        "keys": [
            {"name": name, "sha256": config.key_digest(KEYS[name]), **limits.get(name, {})} for name in sorted(limits)
        ]
    }


async def ask(gateway: Running, key: str, text: str = "hard", model: str = "auto") -> aiohttp.ClientResponse:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer = await gateway.session.post(
        f"{gateway.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEYS[key]}"}
    )
    await answer.read()
    return answer


async def test_a_key_over_its_share_is_routed_down(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.2}, free={})
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], auth=limits) as gateway:
        answers = [await ask(gateway, "bounded", f"prove the hard theorem {index}") for index in range(60)]
        assert {answer.status for answer in answers} == {200}
        pools = [answer.headers["x-depo-pool"] for answer in answers]
        assert pools[:10] == ["large"] * 10
        assert 12 <= pools.count("large") <= 0.2 * 60 + BURST
        assert {answer.headers["x-depo-reason"] for answer in answers if answer.headers["x-depo-pool"] == "small"} == {
            "budget"
        }
        assert await gateway.metric("gateway_decisions_total", reason="budget", pool="small") == pools.count("small")
        others = [await ask(gateway, "free", f"hard {index}") for index in range(30)]
        assert {answer.headers["x-depo-pool"] for answer in others} == {"large"}


@pytest.mark.parametrize("model", ["large", "org/large-9b", "auto-1.0"])
async def test_who_insists_on_the_last_pool_gets_429(start: StartGateway, model: str) -> None:
    limits = auth(bounded={"large_share": 0.1})
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], auth=limits) as gateway:
        answers = [await ask(gateway, "bounded", f"prove the hard theorem {index}", model) for index in range(40)]
        assert 10 <= len(large.seen) <= 0.1 * 40 + BURST
        assert not small.seen
        refused = [answer for answer in answers if answer.status != 200]
        assert len(refused) == 40 - len(large.seen)
        error = (await refused[0].json())["error"]
        assert (refused[0].status, error["type"], error["code"]) == (429, "rate_limit_error", "large_share_exceeded")
        assert "has used up its share of pool large (0.1 of its requests); ask for auto" in error["message"]
        assert (await ask(gateway, "bounded", "easy", "small")).status == 200


async def test_what_only_the_last_pool_takes_gets_429(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.0})
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], auth=limits, small={"accepts": ["text"]}) as gateway,
    ):
        body = {"model": "auto", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, image]}]}
        headers = {"authorization": f"Bearer {KEYS['bounded']}"}
        answer = await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status == 429
        assert "no other pool can take this request" in (await answer.json())["error"]["message"]


async def test_a_fallback_is_paid_for_too_and_what_failed_is_given_back(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.1})
    fails = Script(status=503, body=b"{}")
    quick = {"budget": 10.0, "per_second": 1000.0}
    async with (
        FakeVllm(script=fails) as small,
        FakeVllm() as large,
        start([small], [large], auth=limits, retries=quick) as gateway,
    ):
        answers = [await ask(gateway, "bounded", f"easy {index}") for index in range(40)]
        served = [answer for answer in answers if answer.status == 200]
        assert {answer.headers["x-depo-reason"] for answer in served} == {"fallback"}
        assert 10 <= len(served) <= 0.1 * 40 + BURST
        assert len(large.seen) == len(served)
        assert "the key's share of the last pool is used up" in (await answers[-1].json())["error"]["message"]
    async with (  # and the other way about: what the large pool did not answer is not paid
        FakeVllm() as small,
        FakeVllm(script=fails) as large,
        start([small], [large], auth=limits, retries=quick) as gateway,
    ):
        answers = [await ask(gateway, "bounded", f"prove the hard theorem {index}") for index in range(20)]
        assert {answer.headers["x-depo-reason"] for answer in answers} == {"fallback"}


BOTH, PINNED = Eligible(("small", "large")), Eligible(("large",))


def control(**limits: Any) -> Control:
    """One that has taken a config with the key `bounded`; it never sees a checkpoint."""
    made = Control()
    made._config = bounded(**limits)
    assert made._config.auth is not None
    made._budgets.apply(made._config.auth.keys, 0.0)
    return made


def bounded(**limits: Any) -> Config:
    pools = {name: {"model": f"org/{name}", "backends": [{"url": f"http://{name}"}]} for name in ("small", "large")}
    return config.parse_config({"version": 1, "pools": pools, "auth": auth(bounded=limits)})


def test_refused_requests_earn_nothing() -> None:
    """A client that pins the last pool and tries again after each 429."""
    ruled, served = control(large_share=0.1), 0
    for _ in range(2000):
        accounting = Accounting()
        with contextlib.suppress(ApiError):
            ruled.commit(accounting, "bounded", "hi", PINNED, Decision("large", Reason.PINNED))
            served += 1
            ruled.conclude(accounting, "large", 10)
    assert served <= 0.1 * served + BURST


@pytest.mark.parametrize("pool", [None, "small"])
def test_what_nobody_answered_earns_nothing(pool: str | None) -> None:
    ruled = control(large_share=0.1)
    account = ruled._budgets.account("bounded")
    assert account is not None
    account.calls = 0.0
    for _ in range(50):
        accounting = Accounting()
        ruled.commit(accounting, "bounded", "hi", BOTH, Decision("small", Reason.CONFIDENT))
        ruled.conclude(accounting, pool, 0, answered=False)
    assert account.calls == 0.0


async def test_a_new_checkpoint_or_config_loses_no_refund() -> None:
    ruled = control(large_share=0.5)
    accountings = [Accounting() for _ in range(10)]
    for accounting in accountings:
        ruled.commit(accounting, "bounded", "hi", BOTH, Decision("large", Reason.UNSURE))
    account = ruled._budgets.account("bounded")
    assert account is not None
    assert account.calls == 5.0
    ruled._budgets.apply(bounded(large_share=0.5).auth.keys, 1.0)  # type: ignore[union-attr]
    for accounting in accountings:
        ruled.conclude(accounting, None, 0)
    assert ruled._budgets.account("bounded") is account
    assert account.calls == BURST


@pytest.mark.parametrize("ends", ["hangs up", "time is over"])
@pytest.mark.parametrize("stream", [False, True])
async def test_who_gives_up_while_the_last_pool_works_has_paid(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, ends: str, stream: bool
) -> None:
    monkeypatch.setattr(budgets, "BURST", 2.0)
    limits = auth(bounded={"large_share": 0.1})
    slow = Script(before_head_s=30)
    timeouts = {"total_s": 0.2} if ends == "time is over" else {}
    async with (
        FakeVllm() as small,
        FakeVllm(script=slow) as large,
        start([small], [large], auth=limits, timeouts=timeouts) as gateway,
    ):
        body = {"model": "large", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        sent = {"json": body, "headers": {"authorization": f"Bearer {KEYS['bounded']}"}}
        statuses = []
        for _ in range(6):
            seen = len(large.seen)
            task = asyncio.create_task(gateway.session.post(f"{gateway.url}/v1/chat/completions", **sent))
            while not task.done() and len(large.seen) == seen:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            if ends == "hangs up" and not task.done():
                task.cancel()
            answer = (await asyncio.gather(task, return_exceptions=True))[0]
            statuses.append(answer.status if isinstance(answer, aiohttp.ClientResponse) else 499)
        assert len(large.seen) == 2
        assert statuses[2:] == [429] * 4


async def test_a_prompt_too_long_for_all_but_the_last_pool_gets_429(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.0})
    too_long = Script(status=400, body=b'{"message": "This model\'s maximum context length is 100 tokens."}')
    async with FakeVllm(script=too_long) as small, FakeVllm() as large:
        async with start([small], [large], auth=limits, routing={"threshold": 0.0}) as gateway:
            answer = await ask(gateway, "bounded", "easy")
            assert answer.status == 429
            error = (await answer.json())["error"]
            assert error["code"] == "large_share_exceeded"
            assert error["message"] == (
                "The key 'bounded' has used up its share of pool large (0 of its requests), "
                "and no other pool can take this request."
            )
            assert not large.seen
            small.script = Script(status=503)
            assert (await ask(gateway, "bounded", "easy")).status == 503  # an outage, which ends


async def test_requests_a_minute(start: StartGateway) -> None:
    limits = auth(slow={"requests_per_minute": 3}, free={})
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], auth=limits) as gateway:
        answers = [await ask(gateway, "slow", "easy", model) for model in ("auto", "small", "large", "auto")]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        error = (await answers[-1].json())["error"]
        assert error["message"] == "The key 'slow' is over its 3 requests a minute."
        assert error["code"] == "rate_limit_exceeded"
        assert {(await ask(gateway, "free", "easy")).status for _ in range(8)} == {200}
        assert len(small.seen) + len(large.seen) == 11


async def test_calls_that_come_together_share_one_budget(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.1})
    slow = Script(before_head_s=0.2)
    async with FakeVllm() as small, FakeVllm(script=slow) as large, start([small], [large], auth=limits) as gateway:
        answers = await asyncio.gather(*(ask(gateway, "bounded", f"prove the hard theorem {n}") for n in range(50)))
        assert {answer.status for answer in answers} == {200}
        assert 10 <= len(large.seen) <= 0.1 * 50 + BURST


async def test_the_decision_alone_costs_no_share_but_is_a_request(start: StartGateway) -> None:
    limits = auth(bounded={"large_share": 0.05, "requests_per_minute": 20})
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], auth=limits) as gateway:
        body = {"messages": [{"role": "user", "content": "prove the hard theorem"}], "model": "auto"}
        for _ in range(15):
            headers = {"authorization": f"Bearer {KEYS['bounded']}"}
            answer = await gateway.session.post(f"{gateway.url}/v1/route", json=body, headers=headers)
            assert (await answer.json())["pool"] == "large"
        assert [(await ask(gateway, "bounded")).status for _ in range(6)] == [200] * 5 + [429]
        assert len(large.seen) == 5
        answer = await gateway.session.post(f"{gateway.url}/v1/route", json=body, headers=headers)
        assert answer.status == 429


async def test_a_reload_leaves_what_was_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    admin = {"port": 0, "key_sha256": config.key_digest("sk-depo-admin")}
    limits = auth(bounded={"large_share": 0.01, "requests_per_minute": 1000})
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_checkpoint, auth=limits, admin=admin)
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, path) as gateway:
            for index in range(12):
                await ask(gateway, "bounded", f"hard {index}")
            before = len(large.seen)
            reloaded = await gateway.session.post(
                f"{gateway.admin}/admin/reload", headers={"authorization": "Bearer sk-depo-admin"}
            )
            assert reloaded.status == 200
            assert (await ask(gateway, "bounded")).headers["x-depo-reason"] == "budget"
            assert len(large.seen) == before == 10
