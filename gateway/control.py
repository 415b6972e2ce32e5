"""What stands around a decision: the target's threshold, a key's budgets, drift, the floor, the candidate.

`Control` outlives reloads and checkpoints; a `Accounting` is what it knows of one request. All of it runs on the event
loop, between a request's scores and its departure, without waiting.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from depo_gateway.estimator.calibration import Curve
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.standing import Standing
from depo_gateway.gateway.budgets import Account, Budgets
from depo_gateway.gateway.candidate import Candidate, Offer
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.protocol import ApiError
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.score_drift import ScoreDrift
from depo_gateway.gateway.scoring import Scored
from depo_gateway.gateway.threshold_controller import Step, ThresholdController

OBEYING = ("confident", "unsure", "context", "accepts")  # reasons of decisions that the threshold makes

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Accounting:
    """One request: what its decision stood on, and what has to be put right when it ends otherwise."""

    requested_threshold: float | None = None  # the threshold in auto-0.85
    decisive_confidence: float | None = None  # the confidence that decides about the last pool; None: nothing does
    typical: bool = False  # scored by the full stage, among all pools, as calibrations are
    version: str = ""
    # All of one moment: a reload puts others in their place, and what was counted is put right where it was.
    config: Config | None = None
    controller: ThresholdController | None = None
    account: Account | None = None
    paid: bool = False
    step: Step | None = None

    def scored(self, confidence: Mapping[str, float], candidates: Eligible, pools: int, scored: Scored) -> None:
        """Notes what a prompt's scores came to, `pools` being how many the config has."""
        self.version = scored.version
        below = [confidence[name] for name in candidates.pools[:-1] if name in confidence]
        self.decisive_confidence = max(below, default=None)
        self.typical = scored.stage != "cheap" and len(candidates.pools) == pools

    def pays(self) -> bool:
        """Whether the last pool may answer after all, where another one was chosen."""
        if self.account is not None and not self.paid:
            self.paid = self.account.pay()
            return self.paid
        return True


class Control:
    """One gateway's."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.budgets = Budgets()
        self.candidate: Candidate | None = None
        self.floor: Standing | None = None  # labels say that the scores are no better than a coin
        self.drift = ScoreDrift(None)
        self.controller: ThresholdController | None = None
        self._fixed = 1.0
        self._config: Config | None = None
        self._version = ""

    def follow(self, config: Config, runtime: Runtime) -> None:
        """Takes a new config or a new checkpoint, and keeps what still holds."""
        before, self._config = self._config, config
        rules = config.routing
        curve = curve_of(runtime, config)
        if before is None or runtime.version != self._version or _reading(before) != _reading(config):
            self._version = runtime.version
            self.drift = ScoreDrift(curve)
            self.floor = None
            if self.controller is not None:
                self.controller.expect(curve)
        if before is None or before.routing.target != rules.target or _prices(before) != _prices(config):
            self.controller = _controller(config, curve)
        self._fixed = fixed_threshold(config, runtime)
        self.budgets.apply(config.auth.keys if config.auth else (), time.monotonic())
        self._show()

    @property
    def threshold(self) -> float:
        return self._fixed if self.controller is None else self.controller.threshold

    def coin(self, shares: Mapping[str, float]) -> dict[str, float] | None:
        """Each pool's chance where the scores must not decide; None where they do.

        The last pool's is the target's, or what the scores used to send there; the others divide the rest as usual.
        """
        if self.floor is None or self._config is None:
            return None
        *others, last = self._config.pools
        large = self.floor.large_share if self.controller is None else self.controller.rank
        rest = sum(shares.get(name, 0.0) for name in others)
        weights = {
            name: (1.0 - large) * (shares.get(name, 0.0) / rest if rest > 0 else 1 / len(others)) for name in others
        }
        return weights | {last: large}

    def judge(self, standing: Standing | None) -> None:
        """Takes what labels say; what they say of another checkpoint means nothing."""
        worse = standing is not None and standing.version == self._version and not standing.beats_random
        if worse and self.floor is None and standing is not None:
            log.error(
                "labels show the estimator %s no better than a coin at the same share (%+.4f, from %+.4f to %+.4f, "
                "%d labels): requests are routed by share until it is refreshed",
                *(standing.version, standing.advantage, standing.low, standing.high, standing.labels),
            )
        elif not worse and self.floor is not None:
            log.warning("labels no longer hold against the estimator %s: its scores decide again", self._version)
        self.floor = standing if worse else None
        self._show()

    def show_budgets(self) -> None:
        """Brings the metric of the keys' budgets up to date; a key that a reload took away is no longer in it."""
        gauge = self.metrics.key_large_share_left
        gauge.clear()
        for name, calls in self.budgets.left().items():
            gauge.labels(name).set(calls)

    def admit(self, key: str) -> None:
        """Raises ApiError, 429, for a key that is over its requests a minute."""
        account = self.budgets.account(key)
        wait = account.admit(time.monotonic()) if account is not None else 0.0
        if account is not None and wait > 0:
            raise ApiError(
                429,
                f"The key {key!r} is over its {account.key.requests_per_minute:g} requests a minute.",
                "rate_limit_exceeded",
                headers=((b"retry-after", b"%d" % math.ceil(wait)),),
            )

    def commit(
        self, accounting: Accounting, key: str, asked: Any, candidates: Eligible, decision: Decision
    ) -> Decision:
        """The decision as the key's budget lets it be, counted.

        Args:
            asked: what was scored, or would have been.

        Raises:
            ApiError: 429, the last pool was wanted, no other will do, and the key's share of it is used up.
        """
        config = accounting.config = self._config
        assert config is not None
        decision = self._within_budget(accounting, key, candidates, decision)
        if decision.reason == "pinned":
            return decision
        if self.controller is not None:
            spent = _spent(config, decision.pool)
            obeys = accounting.requested_threshold is None and decision.reason in OBEYING
            obeys = obeys or self.floor is not None or (decision.reason == "sticky" and decision.pool != _last(config))
            accounting.controller = self.controller
            accounting.step = self.controller.decided(spent, accounting.decisive_confidence if obeys else None)
        if accounting.decisive_confidence is not None and accounting.typical and accounting.version == self._version:
            self.drift.saw(accounting.decisive_confidence)
        if self.candidate is not None and accounting.decisive_confidence is not None:
            followed = decision.pool if decision.reason in OBEYING else None
            self.candidate.offer(Offer(asked, candidates, decision.threshold or 0.0, followed))
        self._show()
        return decision

    def conclude(self, accounting: Accounting, pool: str | None, tokens: int, answered: bool = True) -> None:
        """Puts right what `commit` counted.

        Args:
            pool: who answered, or was at work when the client hung up or time was over; None if nobody was.
            tokens: 0 if not known.
            answered: False where `pool` was at work only.
        """
        config, account, controller = accounting.config, accounting.account, accounting.controller
        if config is None:
            return
        served_last = pool == _last(config)
        if account is not None and accounting.paid and not served_last:
            account.refund()
        if account is not None and pool is not None and answered and not (accounting.paid and served_last):
            account.earn()
        if controller is None or accounting.step is None:
            return
        weight = 1.0
        target = config.routing.target
        if tokens > 0 and target is not None and target.cost is not None:
            weight = controller.weight(tokens)
        controller.correct(accounting.step, None if pool is None else _spent(config, pool), weight)
        self._show()

    def describe(self) -> dict[str, Any]:
        """For /admin/status."""
        told: dict[str, Any] = {
            "threshold": round(self.threshold, 6),
            "drift": None if math.isnan(self.drift.distance) else round(self.drift.distance, 4),
            "routes_by_share": self.floor is not None,
            "candidate": self.candidate.version if self.candidate else None,
        }
        if self.controller is not None:
            realised = self.controller.realised
            told["target"] = {
                "wanted": self.controller.wanted,
                "realised": None if math.isnan(realised) else round(realised, 4),
            }
        if self.floor is not None:
            told["standing"] = {
                "advantage": self.floor.advantage, "low": self.floor.low, "high": self.floor.high,
                "labels": self.floor.labels, "time": self.floor.time,
            }  # fmt: skip
        return told

    def _within_budget(self, accounting: Accounting, key: str, candidates: Eligible, decision: Decision) -> Decision:
        assert self._config is not None
        account = accounting.account = self.budgets.account(key)
        if account is None or account.key.large_share is None:
            return decision
        last = _last(self._config)
        if decision.pool != last:
            return decision
        accounting.paid = account.pay()
        if accounting.paid:
            return decision
        below = [name for name in candidates.pools if name != last]
        insists = decision.reason == "pinned" or (
            accounting.requested_threshold is not None and accounting.requested_threshold >= 1.0
        )
        if insists or not below:
            raise share_used_up(account, last, insists)
        return replace(decision, pool=below[0], reason="budget", propensity=1.0)

    def _show(self) -> None:
        metrics = self.metrics
        metrics.threshold.set(self.threshold)
        metrics.target_share.set(math.nan if self.controller is None else self.controller.realised)
        metrics.target_wanted.set(math.nan if self.controller is None else self.controller.wanted)
        metrics.score_drift.set(self.drift.distance)
        metrics.router_floor.set(self.floor is not None)


def share_used_up(account: Account, last: str, insists: bool = False) -> ApiError:
    """For a request that only the last pool may answer; `insists`: because its sender wants so."""
    return ApiError(
        429,
        f"The key {account.key.name!r} has used up its share of pool {last} "
        f"({account.key.large_share or 0.0:g} of its requests)"
        + ("; ask for auto." if insists else ", and no other pool can take this request."),
        "large_share_exceeded",
    )


def curve_of(runtime: Runtime, config: Config) -> Curve | None:
    """The calibration's curve for the config's rule, None where it has none or was measured with other pools."""
    pools, known = tuple(config.pools), runtime.pools
    by_order = len(known) == len(pools) and not set(known) >= set(pools)
    fits = len(known) == 1 or known == pools or by_order
    return runtime.calibration.curves.get(config.routing.rule) if fits else None


def fixed_threshold(config: Config, runtime: Runtime) -> float:
    """The threshold that stands still under this checkpoint; under a target of share or cost, where it starts.

    Raises:
        ValueError: one sentence, the checkpoint's calibration can't say what keeps the quality wanted.
    """
    routing = config.routing
    if routing.target is None:
        return routing.threshold
    if routing.target.quality is None:
        return calibrated_threshold(config, runtime) or routing.threshold
    refusal = f"routing.target.quality can't be kept with the estimator {runtime.version}: "
    if curve_of(runtime, config) is None:
        known = ", ".join(runtime.pools)
        raise ValueError(
            f"{refusal}its calibration has no curve for the rule {routing.rule} and the pools "
            f"{', '.join(config.pools)} (it has {', '.join(runtime.calibration.curves) or 'none'} for {known}); "
            "make one with depo-train calibrate"
        )
    try:
        return runtime.calibration.threshold(routing.rule, quality=routing.target.quality)
    except ValueError as error:
        raise ValueError(f"{refusal}{error}") from None


def calibrated_threshold(config: Config, runtime: Runtime) -> float | None:
    """What this checkpoint's own calibration makes of the target; None without a target, or where it can't say.

    Raises:
        ValueError: see `fixed_threshold`.
    """
    target = config.routing.target
    if target is None:
        return None
    if target.quality is not None:
        return fixed_threshold(config, runtime)
    if curve_of(runtime, config) is None:
        return None
    return runtime.calibration.threshold(config.routing.rule, large_share=_start(config))


def _start(config: Config) -> float:
    """The last pool's share that spends what is wanted, if everything else goes to the cheapest."""
    target = config.routing.target
    assert target is not None
    if target.cost is None:
        return target.large_share or 0.0
    prices = [pool.cost for pool in config.pools.values()]
    least = prices[0] / prices[-1]
    return 1.0 if least >= 1.0 else (target.cost - least) / (1.0 - least)


def _controller(config: Config, curve: Curve | None) -> ThresholdController | None:
    target = config.routing.target
    if target is None or target.quality is not None:
        return None
    wanted = target.cost if target.cost is not None else target.large_share
    assert wanted is not None
    return ThresholdController(wanted, _start(config), curve)


def _last(config: Config) -> str:
    return next(reversed(list(config.pools)))


def _spent(config: Config, pool: str) -> float:
    """What a request in this pool counts for: its price, relative to the last one's, or whether it is the last."""
    pools, target, last = config.pools, config.routing.target, _last(config)
    if target is not None and target.cost is not None and pool in pools:  # a reload may have taken it away
        return pools[pool].cost / pools[last].cost
    return float(pool == last)


def _reading(config: Config) -> tuple[object, ...]:
    """What a confidence depends on, the checkpoint aside."""
    return config.routing.rule, tuple(config.pools)


def _prices(config: Config) -> dict[str, float]:
    return {name: pool.cost for name, pool in config.pools.items()}
