"""Off-policy evaluation: the mean quality of a routing policy that did not serve, from logged decisions. Pure.

Two estimators of a policy's mean quality:

- SNIPS, self-normalised inverse propensity scoring (Swaminathan and Joachims 2015): the mean label of the records on
  which the policy agrees with the logged decision, each weighted by one over the probability that its label was
  observed. It makes no assumption about the estimator.
- Doubly robust (Dudik, Langford and Li 2011, arXiv 1103.4601): predicted qualities, corrected by the equally weighted
  deviations of labels from predictions. The predictions are the checkpoint's own. They narrow the interval and do not
  bias it, unless the checkpoint was fitted on these very records (there is no cross-fitting here).

A record with labels of every pool (shadowed) is a known outcome of any policy and has weight 1. Whether a label exists
is assumed to be independent of its value given the pool that served: the probability of observing it is the propensity
times the share of that pool's records that have a label. Users who complain more than they praise violate this.

A propensity of 1 says that no other pool could have been chosen. Where a policy would choose one, the logs say nothing:
`unsupported` is the share of such records; above MAX_UNSUPPORTED there is no estimate. Nor is there one where fewer
than MIN_EFFECTIVE effective records are expected: by chance, records that were explored rarely may be missing from the
logs, and then neither the estimate nor its bootstrap nor the observed weights show that.

Shapes: N records, K pools cheapest first, T policies, C conversations, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.bootstrap import DEFAULT_RESAMPLES, draw_counts, percentile_interval

Integers = NDArray[np.int64]
MAX_INVERSE_PROPENSITY = 100.0  # explore: 0.02 over two pools
MAX_UNSUPPORTED = 0.01  # the unsupported share bounds the error of an estimate
MIN_EFFECTIVE = 30.0  # effective records; with fewer, intervals cover the truth far less often than 95%
CHUNK = 50  # resamples at once: memory of CHUNK x C


@dataclass(frozen=True, slots=True)
class Logs:
    """Decisions that random choice or scores made, and what is known of their outcomes."""

    pool: Integers  # (N,) that served
    propensity: Array  # (N,) with which it was chosen
    observed: Array  # (N, K) labels in [0, 1], NaN where there is none
    predicted: Array  # (N, K) quality by the checkpoint
    conversation: Integers  # (N,) 0 to C - 1: intervals resample whole ones
    unfamiliar: NDArray[np.bool_] | None = None  # (N,) drawn because the estimator did not know the prompt; None: none

    @property
    def explored(self) -> NDArray[np.bool_]:
        """(N,): whether routing.explore, or the floor, could have chosen another pool."""
        drawn = self.propensity < 1.0
        return drawn if self.unfamiliar is None else drawn & ~self.unfamiliar

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(N,): whether every pool's outcome is known."""
        return np.asarray(~np.isnan(self.observed).any(1))

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(N,): whether the outcome of the pool that served is all that is known."""
        return np.asarray(~np.isnan(self.observed[np.arange(len(self.pool)), self.pool]) & ~self.complete)


@dataclass(frozen=True, slots=True)
class PolicyValues:
    """Mean quality of T policies by one method, NaN where there is no support, and R bootstrap draws of each.

    All values share the same resamples, so that differences of draws are paired.
    """

    point: Array  # (T,)
    draws: Array  # (R, T)


@dataclass(frozen=True, slots=True)
class OffPolicyEstimates:
    """Both estimators' values of T policies, and how much evidence they rest on."""

    snips: PolicyValues
    doubly_robust: PolicyValues
    shares: Array  # (T, K) of the calls
    share_draws: Array  # (R, T, K)
    effective: Array  # (T,) effective sample size (sum w)^2 / sum w^2 of the weights that SNIPS used
    expected: Array  # (T,) the expected effective sample size, given the propensities alone
    unsupported: Array  # (T,) share of records whose outcome under the policy could not be logged
    clipped: float  # share of the labels whose 1 / propensity was clipped


def select_records(logs: Logs, rows: NDArray[np.bool_]) -> Logs:
    """The records in `rows` (N,), their conversations renumbered."""
    return Logs(
        logs.pool[rows],
        logs.propensity[rows],
        logs.observed[rows],
        logs.predicted[rows],
        np.unique(logs.conversation[rows], return_inverse=True)[1],
        None if logs.unfamiliar is None else logs.unfamiliar[rows],
    )


def usable_records(logs: Logs) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """The records (N,) that an estimate can use, and how many are left out of it, by reason.

    Where some records were logged with explore above 0, those without are left out: they come from another period, or
    are turns that had to move up. Where none was, all are used, and only policies that agree with the log have support;
    draws for unfamiliar prompts don't stand for the other prompts.
    Records without a label are used for the shares, unless there is no partial label to represent them.
    """
    left_out = {}
    keep = np.ones(len(logs.pool), bool)
    chance = (logs.propensity < 1.0) | logs.complete
    if logs.explored.any() and not chance.all():
        left_out["without a chance for another pool (explore: 0)"] = int((~chance).sum())
        keep &= chance
    if not (logs.seen & keep).any():
        unlabelled = keep & ~logs.complete
        if unlabelled.any():
            left_out["without label"] = int(unlabelled.sum())
        keep &= logs.complete
    return keep, left_out


def label_rates(logs: Logs) -> Array:
    """(K,): the share of each pool's records, those with labels of every pool aside, that have a label."""
    served = np.bincount(logs.pool[~logs.complete], minlength=logs.observed.shape[1])
    labelled = np.bincount(logs.pool[logs.seen], minlength=logs.observed.shape[1])
    return np.asarray(labelled / np.maximum(served, 1))


def propensity_weights(logs: Logs, clip: float = MAX_INVERSE_PROPENSITY) -> Array:
    """(N,): one over the probability that the label was observed; 1 if complete, 0 without a label."""
    rates = label_rates(logs)[logs.pool]
    inverse = np.minimum(1.0 / logs.propensity, clip) / np.where(rates > 0, rates, 1.0)
    return np.where(logs.complete, 1.0, np.where(logs.seen, inverse, 0.0))


def estimate(
    logs: Logs,
    policies_NT: Integers,
    clip: float = MAX_INVERSE_PROPENSITY,
    min_effective: float = MIN_EFFECTIVE,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> OffPolicyEstimates:
    """Values of policies that send record n to pool `policies_NT[n, t]`; NaN of those without enough evidence."""
    policies, pools = policies_NT.shape[1], logs.observed.shape[1]
    sums = _sums_by_conversation(logs, policies_NT, clip)
    draws = [
        _values_of(totals, policies, pools) for totals in _drawn_totals(sums, resamples, np.random.default_rng(seed))
    ]
    snips, robust, shares = (np.concatenate([part[i] for part in draws]) for i in range(3))
    point = _values_of(sums.sum(0, keepdims=True), policies, pools)
    chances = _observation_probability(logs, policies_NT)
    unsupported = np.mean(chances == 0, 0)
    expected = (chances > 0).sum(0) ** 2 / np.maximum(
        np.divide(1.0, chances, where=chances > 0, out=0 * chances).sum(0), 1
    )
    rejected = (unsupported > MAX_UNSUPPORTED) | (expected < min_effective)
    for values in (snips, robust, point[0], point[1]):
        values[:, rejected] = np.nan
    labelled = logs.seen
    return OffPolicyEstimates(
        PolicyValues(point[0][0], snips),
        PolicyValues(point[1][0], robust),
        point[2][0],
        shares,
        _effective_size(logs, policies_NT, clip),
        expected,
        unsupported,
        float((1.0 / logs.propensity[labelled] > clip).mean()) if labelled.any() else 0.0,
    )


def logged_quality(logs: Logs, resamples: int = DEFAULT_RESAMPLES, seed: int = 0) -> PolicyValues:
    """Mean quality of the routing that served, as one policy (1,), on the same resamples as estimate()'s.

    A pool's answers without a label count as its labelled ones do.
    """
    pools = logs.observed.shape[1]
    label = np.nan_to_num(logs.observed[np.arange(len(logs.pool)), logs.pool])
    of_pool = [logs.pool == k for k in range(pools)]
    terms = [np.ones(len(logs.pool)), label * logs.complete]
    for k in range(pools):
        terms += [label * (logs.seen & of_pool[k]), logs.seen & of_pool[k], ~logs.complete & of_pool[k]]
    sums_CX = np.zeros((int(logs.conversation.max()) + 1, len(terms)))
    np.add.at(sums_CX, logs.conversation, np.stack(terms, 1).astype(float))
    totals = [_drawn_totals(sums_CX, resamples, np.random.default_rng(seed)), [sums_CX.sum(0, keepdims=True)]]
    draws, point = (np.concatenate([_logged_mean(part) for part in parts]) for parts in totals)
    return PolicyValues(point, draws[:, None])


def _logged_mean(totals_RX: Array) -> Array:
    """(R,): of the sums in logged_quality; NaN where a pool that served has no label at all."""
    total = totals_RX[:, 1].copy()
    for k in range(2, totals_RX.shape[1], 3):
        reward, labelled, served = totals_RX[:, k : k + 3].T
        with np.errstate(invalid="ignore", divide="ignore"):
            total += np.where(served > 0, reward / labelled * served, 0.0)
    return np.asarray(total / totals_RX[:, 0])


def random_routing(of_constants: PolicyValues, shares: Array, share_draws: Array) -> PolicyValues:
    """Random routing with the given shares (T, K) of each pool, from the values of the K constant policies."""
    used = shares > 0  # a constant policy without support must not spoil the mixtures that do not use it
    point = np.where(used, shares * of_constants.point, 0.0).sum(1)
    draws = np.where(used, share_draws * of_constants.draws[:, None, :], 0.0).sum(2)
    return PolicyValues(point, draws)


def paired_difference(one: PolicyValues, other: PolicyValues) -> PolicyValues:
    """`one` minus `other`, on the same resamples."""
    return PolicyValues(one.point - other.point, one.draws - other.draws)


def value_intervals(values: PolicyValues) -> tuple[Array, Array]:
    """The 95% percentile interval of each policy, two (T,); NaN without support."""
    low, high = (np.full(len(values.point), np.nan) for _ in range(2))
    for t, draws in enumerate(values.draws.T):
        if not np.isnan(values.point[t]):
            low[t], high[t] = percentile_interval(draws)
    return low, high


def length_routing(length: Array, shares: Array) -> Integers:
    """(N, T): the shortest prompts to the first pool, the longest to the last, with the given shares (T, K)."""
    order = np.argsort(length, kind="stable")
    rank = np.empty(len(length))
    rank[order] = (np.arange(len(length)) + 0.5) / max(len(length), 1)
    edges = np.cumsum(shares, 1)[:, :-1]
    return np.asarray((rank[:, None, None] > edges[None]).sum(2), np.int64)


def _observation_probability(logs: Logs, policies_NT: Integers) -> Array:
    """The probability (N, T) that the outcome under a policy was observed.

    With three pools or more, the pools that did not serve share the remaining probability evenly: it is not logged.
    """
    others = (1.0 - logs.propensity) / max(logs.observed.shape[1] - 1, 1)
    chosen = np.where(policies_NT == logs.pool[:, None], logs.propensity[:, None], others[:, None])
    return np.where(logs.complete[:, None], 1.0, chosen * label_rates(logs)[policies_NT])


def _agreement(logs: Logs, policies_NT: Integers) -> NDArray[np.bool_]:
    """(N, T): whether the policy chooses the pool that served, whose label is known."""
    return np.asarray((policies_NT == logs.pool[:, None]) & logs.seen[:, None])


def _effective_size(logs: Logs, policies_NT: Integers, clip: float) -> Array:
    """(T,): the effective sample size of the weights that SNIPS uses."""
    used = propensity_weights(logs, clip)[:, None] * (_agreement(logs, policies_NT) | logs.complete[:, None])
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nan_to_num(used.sum(0) ** 2 / (used**2).sum(0)))


def _sums_by_conversation(logs: Logs, policies_NT: Integers, clip: float) -> Array:
    """What both estimators sum over records, summed by conversation (C, X), as _values_of reads them.

    Terms that are divided by a pool's label rate are kept per pool, because each resample has its own rates.
    """
    count, pools = logs.observed.shape
    rows = np.arange(count)[:, None]
    complete, seen = logs.complete[:, None], logs.seen[:, None]
    known = np.where(complete, logs.observed[rows, policies_NT], 0.0)
    predicted = logs.predicted[rows, policies_NT]
    reward = np.where(seen[:, 0], np.nan_to_num(logs.observed[rows[:, 0], logs.pool]), 0.0)[:, None]
    deviation = reward - logs.predicted[rows[:, 0], logs.pool][:, None]
    inverse = _agreement(logs, policies_NT) * np.minimum(1.0 / logs.propensity, clip)[:, None]
    of_pool = [(logs.pool == k)[:, None] for k in range(pools)]
    parts = [known, complete + np.zeros_like(known), np.where(complete, known, predicted)]
    for k in range(pools):
        weight = inverse * of_pool[k]
        parts += [weight * reward, weight, weight * deviation, (policies_NT == k).astype(float)]
    counts = [np.ones((count, 1)), *(mask & ~complete for mask in of_pool), *(mask & seen for mask in of_pool)]
    terms_NX = np.concatenate([*parts, *counts], 1, dtype=float)
    order = np.argsort(logs.conversation, kind="stable")
    starts = np.flatnonzero(np.diff(logs.conversation[order], prepend=-1))
    return np.asarray(np.add.reduceat(terms_NX[order], starts, 0))


def _drawn_totals(sums_CX: Array, resamples: int, generator: np.random.Generator) -> Iterator[Array]:
    """Totals (CHUNK, X) over conversations drawn with replacement; R of them in all."""
    counts = draw_counts(len(sums_CX), resamples, generator)
    while chunk := list(islice(counts, CHUNK)):
        yield np.stack(chunk) @ sums_CX


def _values_of(totals_RX: Array, policies: int, pools: int) -> tuple[Array, Array, Array]:
    """Totals of _sums_by_conversation -> SNIPS (R, T), doubly robust (R, T), shares (R, T, K)."""
    width = policies * (3 + 4 * pools)
    parts = totals_RX[:, :width].reshape(len(totals_RX), 3 + 4 * pools, policies)
    count, served, labelled = (
        totals_RX[:, width, None],
        totals_RX[:, width + 1 : width + 1 + pools],
        totals_RX[:, width + 1 + pools :],
    )
    rates = np.where(labelled > 0, labelled / np.maximum(served, 1.0), 1.0)
    top, below, corrected = parts[:, 0], parts[:, 1], parts[:, 2]
    shares = []
    for k in range(pools):
        reward, weight, deviation, chosen = (parts[:, 3 + 4 * k + i] for i in range(4))
        top = top + reward / rates[:, k, None]
        below = below + weight / rates[:, k, None]
        corrected = corrected + deviation / rates[:, k, None]
        shares.append(chosen / count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return top / below, corrected / count, np.stack(shares, 2)
