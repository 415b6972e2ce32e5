"""What surrounds a decision: the target's threshold, keys' budgets, drift, the floor, the candidate.

`Control` outlives reloads and checkpoints; `Accounting` is its share of one request. All of it runs on the event loop
between a request's scores and its departure; it is synchronous, does no I/O and knows no metrics (state_metrics.py).
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.standing import Standing
from depo_gateway.gateway.budgets import Account, Budgets
from depo_gateway.gateway.candidate import Candidate, Offer
from depo_gateway.gateway.config import Config, last_pool
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.score_drift import ScoreDrift
from depo_gateway.gateway.scoring import Scored
from depo_gateway.gateway.threshold_controller import Step, ThresholdController
from depo_gateway.gateway.thresholds import controller_of, curve_of, fixed_threshold, spent_in

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Accounting:
    """One request: what its decision was based on, and what has to be corrected if it ends otherwise."""

    requested_threshold: float | None = None  # the one in auto-0.85
    decisive_confidence: float | None = None  # the highest among the cheaper eligible pools; None: none has one
    group: str = ""  # the name of the prompt's task
    unfamiliar: bool = False  # the prompt is unlike those of the estimator's fit
    typical: bool = False  # scored by the full stage, among all pools, as calibrations are; and no unfamiliar prompt
    version: str = ""
    # The objects that counted the request: a reload replaces them, and corrections must reach the same ones.
    config: Config | None = None
    controller: ThresholdController | None = None
    account: Account | None = None
    paid: bool = False
    step: Step | None = None

    def note_scores(self, confidence: Mapping[str, float], candidates: Eligible, pools: int, scored: Scored) -> None:
        """Records what a prompt's scores came to; `pools` is the number that the config has."""
        self.version = scored.version
        below = [confidence[name] for name in candidates.pools[:-1] if name in confidence]
        self.decisive_confidence = max(below, default=None)
        self.unfamiliar = scored.unfamiliar
        self.typical = scored.stage != "cheap" and len(candidates.pools) == pools and not scored.unfamiliar

    def pay(self) -> bool:
        """Pays for a call of the last pool that was not chosen at first; False if the key's share is used up."""
        if self.account is not None and not self.paid:
            self.paid = self.account.pay()
            return self.paid
        return True


class Control:
    """One gateway's control of decisions. Its state changes by its methods alone."""

    def __init__(self) -> None:
        self._budgets = Budgets()
        self._candidate: Candidate | None = None
        self._floor: Standing | None = None  # set: labels show the scores to be no better than random routing
        self._drift = ScoreDrift(None)
        self._controller: ThresholdController | None = None
        self._fixed = 1.0
        self._config: Config | None = None
        self._version = ""

    # What it shows.

    @property
    def threshold(self) -> float:
        return self._fixed if self._controller is None else self._controller.threshold

    @property
    def target_wanted(self) -> float:
        """The bound of routing.target; NaN without one that is followed."""
        return math.nan if self._controller is None else self._controller.wanted

    @property
    def target_share(self) -> float:
        """What that target bounds, over the last decisions; NaN without one, or before the first."""
        return math.nan if self._controller is None else self._controller.realised

    @property
    def score_drift(self) -> float:
        return self._drift.distance

    @property
    def routes_by_share(self) -> bool:
        """Whether the floor is in force: scores don't decide."""
        return self._floor is not None

    @property
    def candidate(self) -> Candidate | None:
        return self._candidate

    def budgets_left(self) -> dict[str, float]:
        """Calls of the last pool that each key with a large_share has saved up."""
        return self._budgets.left()

    def describe(self) -> dict[str, Any]:
        """For /admin/status."""
        state: dict[str, Any] = {
            "threshold": round(self.threshold, 6),
            "drift": _rounded(self.score_drift),
            "routes_by_share": self.routes_by_share,
            "candidate": self._candidate.version if self._candidate else None,
        }
        if self._controller is not None:
            state["target"] = {"wanted": self.target_wanted, "realised": _rounded(self.target_share)}
        if self._floor is not None:
            state["standing"] = {
                "advantage": self._floor.advantage, "low": self._floor.low, "high": self._floor.high,
                "labels": self._floor.labels, "time": self._floor.time,
            }  # fmt: skip
        return state

    # What changes between requests.

    def follow(self, config: Config, runtime: Runtime) -> None:
        """Takes a new config or a new checkpoint, and keeps the state that is still valid."""
        before, self._config = self._config, config
        curve = curve_of(runtime, config)
        if before is None or runtime.version != self._version or before.routing.group != config.routing.group:
            _warn_of_groups(config, runtime)
        if before is None or runtime.version != self._version or _meaning(before) != _meaning(config):
            self._version = runtime.version
            self._drift = ScoreDrift(curve)
            self._floor = None
            if self._controller is not None:
                self._controller.expect(curve)
        if before is None or before.routing.target != config.routing.target or _prices(before) != _prices(config):
            self._controller = controller_of(config, curve)
        self._fixed = fixed_threshold(config, runtime)
        self._budgets.apply(config.auth.keys if config.auth else (), time.monotonic())

    def apply_standing(self, standing: Standing | None) -> None:
        """Sets or lifts the floor by what labels say of the checkpoint in service; of another one it is ignored."""
        worse = standing is not None and standing.version == self._version and not standing.beats_random
        if worse and self._floor is None and standing is not None:
            log.error(
                "labels show the estimator %s to be no better than random routing at the same share (%+.4f, from "
                "%+.4f to %+.4f, %d labels): requests are routed by share until it is refreshed",
                *(standing.version, standing.advantage, standing.low, standing.high, standing.labels),
            )
        elif not worse and self._floor is not None:
            log.warning(
                "labels no longer show the estimator %s to be worse than random: its scores decide again", self._version
            )
        self._floor = standing if worse else None

    def replace_candidate(self, fresh: Candidate | None) -> Candidate | None:
        """Takes a new candidate, or none; the one before is the caller's to close."""
        before, self._candidate = self._candidate, fresh
        return before

    # The life of a request.

    def admit(self, key: str) -> None:
        """Raises ApiError, 429, for a key that is over its requests a minute."""
        account = self._budgets.account(key)
        wait = account.admit(time.monotonic()) if account is not None else 0.0
        if account is not None and wait > 0:
            raise ApiError(
                429,
                f"The key {key!r} is over its {account.key.requests_per_minute:g} requests a minute.",
                "rate_limit_exceeded",
                headers=((b"retry-after", b"%d" % math.ceil(wait)),),
            )

    def random_shares(self, shares: Mapping[str, float]) -> dict[str, float] | None:
        """Each pool's probability while the floor is in force; None while the scores decide.

        The last pool's is the target's, or its usual share under the scores; the others divide the rest as usual.
        """
        if self._floor is None:
            return None
        return self._with_large(shares, self._floor.large_share if self._controller is None else self._controller.rank)

    def shares_without_scores(self, shares: Mapping[str, float]) -> Mapping[str, float]:
        """Each pool's probability for a prompt that the scores can't tell: the target's share for the last one."""
        return shares if self._controller is None else self._with_large(shares, self._controller.rank)

    def _with_large(self, shares: Mapping[str, float], large: float) -> dict[str, float]:
        """The last pool at the share `large`; the others divide the rest as usual."""
        assert self._config is not None
        *others, last = self._config.pools
        rest = sum(shares.get(name, 0.0) for name in others)
        weights = {
            name: (1.0 - large) * (shares.get(name, 0.0) / rest if rest > 0 else 1 / len(others)) for name in others
        }
        return weights | {last: large}

    def commit(
        self, accounting: Accounting, key: str, prompt: Any, candidates: Eligible, decision: Decision
    ) -> Decision:
        """Counts a decision; the one returned is within the key's budget.

        Args:
            prompt: what was scored, or would have been.

        Raises:
            ApiError: 429, only the last pool can serve the request, and the key has used up its share of it.
        """
        config = accounting.config = self._config
        assert config is not None
        decision = self._within_budget(accounting, key, candidates, decision)
        if decision.reason is Reason.PINNED:
            return decision
        decisive = accounting.decisive_confidence
        if self._controller is not None:
            accounting.controller = self._controller
            obeys = self._obeys(accounting, decision, last_pool(config.pools))
            accounting.step = self._controller.count(spent_in(config, decision.pool), decisive if obeys else None)
        if decisive is not None and accounting.typical and accounting.version == self._version:
            self._drift.observe(decisive)
        if self._candidate is not None and decisive is not None:
            live = decision.pool if decision.reason.obeys_threshold else None
            self._candidate.offer(Offer(prompt, candidates, decision.threshold or 0.0, live, accounting.group))
        return decision

    def conclude(self, accounting: Accounting, pool: str | None, tokens: int, answered: bool = True) -> None:
        """Corrects what `commit` counted.

        Args:
            pool: the one that answered, or was working when the client hung up or time ran out; None if none was.
            tokens: 0 if not known.
            answered: False if `pool` was only working.
        """
        config, account, controller = accounting.config, accounting.account, accounting.controller
        if config is None:
            return
        served_last = pool == last_pool(config.pools)
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
        controller.correct(accounting.step, None if pool is None else spent_in(config, pool), weight)

    def _obeys(self, accounting: Accounting, decision: Decision, last: str) -> bool:
        """Whether another threshold could have changed where the request went."""
        if accounting.requested_threshold is None and decision.reason.obeys_threshold:
            return True
        kept = decision.reason is Reason.STICKY and decision.pool != last and not accounting.unfamiliar
        return self.routes_by_share or kept

    def _within_budget(self, accounting: Accounting, key: str, candidates: Eligible, decision: Decision) -> Decision:
        assert self._config is not None
        account = accounting.account = self._budgets.account(key)
        last = last_pool(self._config.pools)
        if account is None or account.key.large_share is None or decision.pool != last:
            return decision
        accounting.paid = account.pay()
        if accounting.paid:
            return decision
        below = [name for name in candidates.pools if name != last]
        insists = decision.reason is Reason.PINNED or (accounting.requested_threshold or 0.0) >= 1.0
        if insists or not below:
            raise share_used_up(account, last, insists)
        return replace(decision, pool=below[0], reason=Reason.BUDGET, propensity=1.0)


def share_used_up(account: Account, last: str, insists: bool = False) -> ApiError:
    """For a request that only the last pool may answer; `insists`: because the client asks for that pool."""
    return ApiError(
        429,
        f"The key {account.key.name!r} has used up its share of pool {last} "
        f"({account.key.large_share or 0.0:g} of its requests)"
        + ("; ask for auto." if insists else ", and no other pool can take this request."),
        "large_share_exceeded",
    )


def _warn_of_groups(config: Config, runtime: Runtime) -> None:
    """Says where gateway and checkpoint differ about `routing.group`."""
    if config.routing.group is not None and not runtime.groups:
        log.warning(
            "routing.group is set, but the estimator %s knows no groups: fit one with depo-train fit --groups, or "
            "refresh it from records",
            runtime.version,
        )
    if config.routing.group is None and runtime.groups:
        log.warning(
            "the estimator %s was fitted with groups, but routing.group isn't set: its shares are those of prompts "
            "whose group is known",
            runtime.version,
        )


def _meaning(config: Config) -> tuple[object, ...]:
    """What the meaning of a confidence depends on, beside the checkpoint."""
    return config.routing.rule, tuple(config.pools)


def _prices(config: Config) -> dict[str, float]:
    return {name: pool.cost for name, pool in config.pools.items()}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
