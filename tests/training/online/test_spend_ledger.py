"""Spending is counted by the hour and by the UTC day, and survives a restart."""

from pathlib import Path

import pytest

from depo_gateway.training.online.spend_ledger import SPEND_FILE, SpendLedger, Spent

MIDNIGHT = 86_400.0 * 20_000


def test_a_restart_continues_the_hour_and_the_day(tmp_path: Path) -> None:
    now = [MIDNIGHT + 100]
    first = SpendLedger(tmp_path, lambda: now[0])
    assert first.today == Spent()
    first.add(Spent(1, 200, 0.5))
    now[0] += 3_600
    first.add(Spent(2, 100, 0.25))
    first.save()
    second = SpendLedger(tmp_path, lambda: now[0])
    assert (second.today, second.this_hour) == (Spent(3, 300, 0.75), Spent(2, 100, 0.25))
    now[0] = MIDNIGHT + 86_399
    assert (second.today, second.this_hour) == (Spent(3, 300, 0.75), Spent())
    now[0] = MIDNIGHT + 86_400
    assert SpendLedger(tmp_path, lambda: now[0]).today == second.today == Spent()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"day": 1}', '{"day": "x"}', '{"day": 20000, "hour": 480000, "of_day": {}, "of_hour": {}}'],
)
def test_a_damaged_file_means_nothing_spent(tmp_path: Path, text: str) -> None:
    (tmp_path / SPEND_FILE).write_text(text)
    ledger = SpendLedger(tmp_path, lambda: MIDNIGHT)
    assert (ledger.today, ledger.this_hour) == (Spent(), Spent())
    ledger.add(Spent(1, 1, 1.0))
    ledger.save()
    assert SpendLedger(tmp_path, lambda: MIDNIGHT).today == Spent(1, 1, 1.0)


def test_what_could_not_be_saved_is_saved_later(tmp_path: Path) -> None:
    ledger = SpendLedger(tmp_path / "gone", lambda: MIDNIGHT)
    ledger.save()  # nothing to write
    ledger.add(Spent(1, 1, 1.0))
    with pytest.raises(OSError, match="gone"):
        ledger.save()
    (tmp_path / "gone").mkdir()
    ledger.save()
    assert SpendLedger(tmp_path / "gone", lambda: MIDNIGHT).today == Spent(1, 1, 1.0)
