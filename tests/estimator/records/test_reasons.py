"""The table of decision reasons."""

import pytest

from depo_gateway.estimator.records.reasons import Reason, reason_named
from depo_gateway.estimator.records.types import Record


def named(trait: str) -> list[str]:
    return [reason.value for reason in Reason if getattr(reason, trait)]


def test_what_each_reason_counts_for() -> None:
    assert named("free") == ["confident", "unsure", "explore", "unfamiliar"]
    assert named("in_shares") == ["confident", "unsure", "explore", "context", "accepts"]
    assert named("obeys_threshold") == ["confident", "unsure", "context", "accepts"]
    assert named("random") == ["explore", "unfamiliar", "overload"]


def test_reasons_are_found_by_name() -> None:
    assert [reason_named(reason.value) for reason in Reason] == list(Reason)
    assert reason_named("") is reason_named("of a later version") is None
    assert (f"{Reason.STICKY}", Reason.STICKY == "sticky", Reason("sticky")) == ("sticky", True, Reason.STICKY)


@pytest.mark.parametrize(
    ("reason", "propensity", "free"),
    [
        ("unsure", 1.0, True),
        ("explore", 0.1, True),
        ("explore", 0.0, False),
        ("sticky", 1.0, False),
        ("", 1.0, False),
    ],
)
def test_a_record_is_free_by_its_reason(reason: str, propensity: float, free: bool) -> None:
    assert Record("id", 0.0, reason=reason, propensity=propensity).free is free
