"""What another routing would have scored, from logged decisions and their labels alone. Pure.

Two estimates of the mean quality of a policy that was not the one that served:

- SNIPS, self-normalised inverse propensity (Swaminathan and Joachims 2015): the mean of the labels of those records on
  which the policy agrees with what was done, each weighing one over the probability of having been seen. It assumes
  nothing of the estimator.
- Doubly robust (Dudik, Langford and Li 2011, arXiv 1103.4601): predicted qualities, corrected by what labels deviated
  from them, so weighted. Here the predictions are the checkpoint's own, which narrows the interval and can't bias it,
  unless the checkpoint was fitted on these very records (no cross-fitting is done).

A record with labels of every pool (shadowed) is a known outcome of any policy, and weighs 1. Labels are taken to be
there or not whatever they say, given the pool that served: the probability of having been seen is propensity times the
share of that pool's records that have one. Users who complain more than they praise break that.

A propensity of 1 says that no other pool had a chance. Where a policy would have taken one, nothing is known of it:
`unsupported` is the share of such records, and beyond UNSUPPORTED there is no estimate. Nor is there one where fewer
than LEAST effective records are to be expected: what was explored rarely may by luck not have been seen at all, and
then neither the estimate nor a bootstrap nor the weights that did turn up show it.

Shapes: N records, K pools cheapest first, T policies, C conversations, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
CLIP = 100.0  # the largest 1 / propensity: explore: 0.02 over two pools
UNSUPPORTED = 0.01  # an estimate can be wrong by no more than the share it knows nothing of
LEAST = 30.0  # effective records; with fewer an interval covers the truth far less often than it says
RESAMPLES = 500
CHUNK = 50  # resamples at once: memory of CHUNK x C


@dataclass(frozen=True, slots=True)
class Logs:
    """Free decisions, and what is known of their outcomes."""

    pool: Integers  # (N,) that served
    propensity: Array  # (N,) with which it was chosen
    observed: Array  # (N, K) labels in [0, 1], NaN where there is none
    predicted: Array  # (N, K) quality by the checkpoint
    conversation: Integers  # (N,) 0 to C - 1: intervals resample whole ones

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(N,): whether every pool's outcome is known."""
        return np.asarray(~np.isnan(self.observed).any(1))

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(N,): whether the outcome of the pool that served is all that is known."""
        return np.asarray(~np.isnan(self.observed[np.arange(len(self.pool)), self.pool]) & ~self.complete)


@dataclass(frozen=True, slots=True)
class Values:
    """Mean quality of T policies by one method, NaN where there is no support, and R bootstrap draws of each.

    The same resamples everywhere, so that differences of draws are paired.
    """

    point: Array  # (T,)
    draws: Array  # (R, T)


@dataclass(frozen=True, slots=True)
class Estimated:
    snips: Values
    doubly_robust: Values
    shares: Array  # (T, K) of the calls
    share_draws: Array  # (R, T, K)
    effective: Array  # (T,) sample size (sum w)^2 / sum w^2 of the weights that SNIPS used
    expected: Array  # (T,) the same of the weights that were to be expected, whatever chance has shown
    unsupported: Array  # (T,) share of records whose outcome under the policy no log could show
    clipped: float  # share of the labels whose 1 / propensity was clipped


def subset(logs: Logs, rows: NDArray[np.bool_]) -> Logs:
    """The records in `rows` (N,), their conversations numbered anew."""
    return Logs(
        logs.pool[rows],
        logs.propensity[rows],
        logs.observed[rows],
        logs.predicted[rows],
        np.unique(logs.conversation[rows], return_inverse=True)[1],
    )


def usable(logs: Logs) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """The records (N,) that an estimate can stand on, and how many are left out of it, by reason.

    Where some records were logged with explore above 0, those without stay out: theirs was another time, or a turn
    that had to move up. Where none was, all stay, and there is support only where the policy does as was done. Records
    without any label stay in, to tell the shares, unless no partial label can speak for them.
    """
    left_out = {}
    keep = np.ones(len(logs.pool), bool)
    chance = (logs.propensity < 1.0) | logs.complete
    if (logs.propensity < 1.0).any() and not chance.all():
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


def weights(logs: Logs, clip: float = CLIP) -> Array:
    """(N,): one over the probability of having seen what is known: 1 of complete records, 0 of those without label."""
    rates = label_rates(logs)[logs.pool]
    inverse = np.minimum(1.0 / logs.propensity, clip) / np.where(rates > 0, rates, 1.0)
    return np.where(logs.complete, 1.0, np.where(logs.seen, inverse, 0.0))


def estimate(
    logs: Logs,
    policies_NT: Integers,
    clip: float = CLIP,
    least: float = LEAST,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimated:
    """Values of policies that send record n to pool `policies_NT[n, t]`; NaN of those with too little to stand on."""
    count, pools = logs.observed.shape
    rows = np.arange(count)[:, None]
    complete, seen = logs.complete[:, None], logs.seen[:, None]
    agrees = (policies_NT == logs.pool[:, None]) & seen
    known = np.where(complete, logs.observed[rows, policies_NT], 0.0)
    believed = logs.predicted[rows, policies_NT]
    reward = np.where(seen[:, 0], np.nan_to_num(logs.observed[rows[:, 0], logs.pool]), 0.0)[:, None]
    deviation = reward - logs.predicted[rows[:, 0], logs.pool][:, None]
    inverse = agrees * np.minimum(1.0 / logs.propensity, clip)[:, None]
    of_pool = [(logs.pool == k)[:, None] for k in range(pools)]
    # Sums by conversation, those divided by a pool's label rate kept apart by pool: a resample has rates of its own
    parts = [known, complete + np.zeros_like(known), np.where(complete, known, believed)]
    for k in range(pools):
        weight = inverse * of_pool[k]
        parts += [weight * reward, weight, weight * deviation, (policies_NT == k).astype(float)]
    counted = [np.ones((count, 1)), *(mask & ~complete for mask in of_pool), *(mask & seen for mask in of_pool)]
    sums = _by_conversation(np.concatenate([*parts, *counted], 1, dtype=float), logs.conversation)
    policies = policies_NT.shape[1]
    drawn = [
        _values(drawn_sums, policies, pools) for drawn_sums in _resampled(sums, resamples, np.random.default_rng(seed))
    ]
    snips, robust, shares = (np.concatenate([part[i] for part in drawn]) for i in range(3))
    point = _values(sums.sum(0, keepdims=True), policies, pools)
    chances = _chances(logs, policies_NT)
    unsupported = np.mean(chances == 0, 0)
    expected = (chances > 0).sum(0) ** 2 / np.maximum(
        np.divide(1.0, chances, where=chances > 0, out=0 * chances).sum(0), 1
    )
    lost = (unsupported > UNSUPPORTED) | (expected < least)
    for values in (snips, robust, point[0], point[1]):
        values[:, lost] = np.nan
    used = weights(logs, clip)[:, None] * (agrees | complete)
    with np.errstate(invalid="ignore"):
        effective = np.nan_to_num(used.sum(0) ** 2 / (used**2).sum(0))
    labelled = logs.seen
    return Estimated(
        Values(point[0][0], snips),
        Values(point[1][0], robust),
        point[2][0],
        shares,
        effective,
        expected,
        unsupported,
        float((1.0 / logs.propensity[labelled] > clip).mean()) if labelled.any() else 0.0,
    )


def _chances(logs: Logs, policies_NT: Integers) -> Array:
    """The probability (N, T) with which the outcome under a policy was to be seen. Of three pools or more, those that
    did not serve share what the one that did leaves, evenly: logs don't tell more.
    """
    others = (1.0 - logs.propensity) / max(logs.observed.shape[1] - 1, 1)
    chosen = np.where(policies_NT == logs.pool[:, None], logs.propensity[:, None], others[:, None])
    return np.where(logs.complete[:, None], 1.0, chosen * label_rates(logs)[policies_NT])


def coin(of_constants: Values, shares: Array, share_draws: Array) -> Values:
    """A policy that sends each pool the same shares (T, K) by coin, from the values of the K constant policies."""
    used = shares > 0  # a constant without support spoils only the coins that need it
    point = np.where(used, shares * of_constants.point, 0.0).sum(1)
    draws = np.where(used, share_draws * of_constants.draws[:, None, :], 0.0).sum(2)
    return Values(point, draws)


def difference(one: Values, other: Values) -> Values:
    """Paired."""
    return Values(one.point - other.point, one.draws - other.draws)


def interval(values: Values) -> tuple[Array, Array]:
    """The 95% percentile interval of each policy, two (T,); NaN without support."""
    low, high = (np.full(len(values.point), np.nan) for _ in range(2))
    for t, draws in enumerate(values.draws.T):
        if not np.isnan(values.point[t]) and not np.isnan(draws).all():
            low[t], high[t] = np.nanpercentile(draws, [2.5, 97.5])
    return low, high


def by_length(length: Array, shares: Array) -> Integers:
    """(N, T): the shortest prompts to the first pool, the longest to the last, as many to each as `shares` (T, K)."""
    order = np.argsort(length, kind="stable")
    rank = np.empty(len(length))
    rank[order] = (np.arange(len(length)) + 0.5) / max(len(length), 1)
    edges = np.cumsum(shares, 1)[:, :-1]
    return np.asarray((rank[:, None, None] > edges[None]).sum(2), np.int64)


def _by_conversation(parts_NX: Array, conversation: Integers) -> Array:
    """Sums of rows by conversation, (C, X)."""
    order = np.argsort(conversation, kind="stable")
    starts = np.flatnonzero(np.diff(conversation[order], prepend=-1))
    return np.add.reduceat(parts_NX[order], starts, 0)


def _resampled(sums_CX: Array, resamples: int, generator: np.random.Generator) -> list[Array]:
    """Totals (CHUNK, X) of conversations drawn with replacement, R of them in all."""
    conversations = len(sums_CX)
    chunks = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        times = np.stack(
            [
                np.bincount(generator.integers(0, conversations, conversations), minlength=conversations)
                for _ in range(size)
            ]
        )
        chunks.append(times @ sums_CX)
    return chunks


def _values(totals_RX: Array, policies: int, pools: int) -> tuple[Array, Array, Array]:
    """Totals, in the order of `parts` -> SNIPS (R, T), doubly robust (R, T), shares (R, T, K)."""
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
