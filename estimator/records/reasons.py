"""Decision reasons: one table for both programs.

It is in the estimator package because gateway and training both classify decisions by reason: the gateway when it
counts shares and follows a target, training when it decides which records off-policy evaluation may weigh.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """Why a pool was chosen: `x-depo-reason`, the label `reason` of gateway_decisions_total, `reason` of a record.

    Attributes:
        free: scores or chance chose among all pools, so the propensity on record is that of the pool: off-policy
            evaluation may weigh the record by it.
        in_shares: scores or chance chose, maybe among fewer pools: the decision counts in the pools' moving shares.
        obeys_threshold: the threshold decided: it counts for `routing.target`.
        random: a random draw, or a rule in place of the scores, decided: it is no evidence that a conversation needs a
            better pool.

    UNFAMILIAR is free: what is done depends on the prompt alone, and the propensity says with which probability; it is
    1 where routing.unfamiliar names a pool. It is not in the shares, which it draws from: they are those of the scores.
    """

    free: bool
    in_shares: bool
    obeys_threshold: bool
    random: bool

    def __new__(cls, name: str, free: bool, in_shares: bool, obeys_threshold: bool, random: bool) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.free, member.in_shares = free, in_shares
        member.obeys_threshold, member.random = obeys_threshold, random
        return member

    # fmt: off
    #              name           free   in_shares  obeys_threshold  random
    CONFIDENT  = ("confident",  True,  True,      True,            False)  # the cheapest pool's confidence is enough
    UNSURE     = ("unsure",     True,  True,      True,            False)  # it is not: a more expensive pool serves
    PINNED     = ("pinned",     False, False,     False,           False)  # the client named the pool
    STICKY     = ("sticky",     False, False,     False,           False)  # the conversation keeps its pool
    EXPLORE    = ("explore",    True,  True,      False,           True)   # drawn at random
    UNFAMILIAR = ("unfamiliar", True,  False,     False,           True)   # unlike what the estimator was fitted on
    CONTEXT    = ("context",    False, True,      True,            False)  # too long for the cheapest pool
    ACCEPTS    = ("accepts",    False, True,      True,            False)  # the cheapest pool lacks a modality
    OVERLOAD   = ("overload",   False, False,     False,           True)   # no scores in time: routing.on_overload
    FALLBACK   = ("fallback",   False, False,     False,           False)  # the chosen pool did not answer
    BUDGET     = ("budget",     False, False,     False,           False)  # the key's share of the last pool is used up
    # fmt: on


def reason_named(name: str) -> Reason | None:
    """The reason of that name; None for "" (nothing was decided) and for one that this version does not know."""
    return _BY_NAME.get(name)


_BY_NAME: dict[str, Reason] = {reason.value: reason for reason in Reason}
