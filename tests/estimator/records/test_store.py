"""The records store, on SQLite and on a real PostgreSQL."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from depo_gateway.estimator.records import store as module
from depo_gateway.estimator.records import tables
from depo_gateway.estimator.records.store import Feedback, Store, StoreError
from depo_gateway.estimator.records.tables import LARGEST
from depo_gateway.estimator.records.types import FEEDBACK, Label, Record
from tests.postgres import Postgres

FULL = Record(
    id="req-1",
    time=1000.5,
    key="team-a",
    conversation="c0ffee",
    group="theorems",
    pool="small",
    reason="explore",
    confidence=0.75,
    threshold=0.5,
    estimator="v1",
    stage="full",
    propensity=0.25,
    pools=("small", "large"),
    quality={"small": 0.5, "large": 0.75},
    status=200,
    prompt_tokens=12,
    completion_tokens=34,
    first_token_seconds=0.125,
    total_seconds=2.5,
    finish_reason="stop",
    prompt_hash="beef",
    asked=[{"role": "user", "content": [{"type": "text", "text": "déjà \0 vu 🚀"}]}],
    parameters={"temperature": 0.5, "tools": [{"type": "function"}]},
    answer="42",
    reference="forty-two",
)


@pytest.fixture
def store(records_url: str) -> Iterator[Store]:
    made = Store(records_url)
    made.create()
    yield made
    made.close()


def record(number: int, **changes: object) -> Record:
    base = Record(id=f"req-{number}", time=float(number), pool="small", status=200, asked=f"question {number}")
    return replace(base, **changes)  # type: ignore[arg-type]


def seqs(store: Store) -> list[int]:
    return [item.record.seq for item in store.logged(1000)]


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    store.append([FULL, Record(id="req-2", time=2000.0)])
    first, second = (item.record for item in store.logged(10))
    assert 0 < first.seq < second.seq
    assert replace(first, seq=0) == FULL
    assert replace(second, seq=0) == Record(id="req-2", time=2000.0)


def test_text_that_a_database_cannot_hold_is_stored_without_it(store: Store) -> None:
    odd = {"answer": "a\0b\ud800c", "finish_reason": "\0", "group": "\0", "prompt_tokens": 2**70}
    store.append([replace(FULL, **odd, completion_tokens=-1)])  # type: ignore[arg-type]
    found = store.logged(1)[0].record
    assert found.group == "\ufffd"
    assert (found.answer, found.finish_reason) == ("a\ufffdb?c", "\ufffd")
    assert (found.prompt_tokens, found.completion_tokens) == (LARGEST, 0)


def test_a_batch_that_comes_twice_is_there_once(store: Store) -> None:
    store.append([record(1), record(2)])
    store.append([record(2), record(3)])
    assert [item.record.id for item in store.logged(10)] == ["req-1", "req-2", "req-3"]
    store.append([])


def test_distinguishes_invalid_values_from_an_unavailable_database(store: Store) -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(StoreError, match="can't be written as JSON") as raised:
        store.append([record(1), record(2, parameters={"deep": deep})])
    assert raised.value.rejected
    assert seqs(store) == []


def test_feedback_is_a_label_of_the_pool_that_served(store: Store) -> None:
    store.append([replace(FULL, time=1.0), replace(FULL, time=2.0, pool="large")])
    assert store.feedback([Feedback("req-1", "team-a", 0.25, "meh", 5.0)]) == [True]
    (found,) = store.labelled(10)
    assert found.record.time == 2.0  # the newest under this id
    (label,) = found.labels
    assert label == Label(found.record.seq, "large", FEEDBACK, 0.25, None, 5.0, label.seq)


def test_feedback_is_for_the_key_that_asked_and_overwrites(store: Store) -> None:
    store.append([replace(FULL), record(2, pool="", status=503)])
    one = Feedback("req-1", "team-a", 0.0)
    other = [replace(one, key="team-b"), replace(one, id="req-9"), Feedback("req-2", "", 1.0)]
    assert store.feedback([one, *other, replace(one, score=0.5)]) == [True, False, False, False, True]
    before = store.labelled(10)[0].labels
    assert [label.quality for label in before] == [0.5]
    store.feedback([replace(one, score=1.0)])
    after = store.labelled(10)[0].labels
    assert [label.quality for label in after] == [1.0]
    assert after[0].seq > before[0].seq


def test_labels_of_several_sources_and_pools_stand_beside_each_other(store: Store) -> None:
    store.append([record(1), record(2), record(3)])
    first, second, _ = seqs(store)
    store.add_labels([Label(first, pool, "exact", 1.0, 0.5, 7.0) for pool in ("small", "large")])
    store.add_labels([Label(first, "small", "model", 0.5), Label(second, "small", "none", None, 0.9)])
    store.add_labels([Label(first, "small", "exact", 0.0, 0.5, 8.0), Label(10**6, "small", "exact", 1.0)])
    store.add_labels([])
    found = {item.record.seq: item.labels for item in store.labelled(10)}
    assert list(found) == [first, second]
    assert {(label.pool, label.source): label.quality for label in found[first]} == {
        ("small", "exact"): 0.0,
        ("large", "exact"): 1.0,
        ("small", "model"): 0.5,
    }
    assert [item.record.seq for item in store.labelled(1)] == [second]
    assert [item.record.seq for item in store.labelled(10, since=1.5)] == [second]


def test_counting_what_is_new(store: Store) -> None:
    assert store.count_labels() == (0, 0)
    store.append([record(1), record(2), record(3)])
    first, second, third = seqs(store)
    store.add_labels([Label(first, "small", "exact", 1.0), Label(first, "large", "exact", 1.0)])
    count, highest = store.count_labels()
    assert count == 1
    store.add_labels([Label(second, "small", "exact", 1.0), Label(third, "small", "none", None, 0.5)])
    assert store.count_labels(highest)[0] == 1  # token confidence alone counts for nothing
    store.add_labels([Label(first, "small", "exact", 0.0)])  # said anew
    assert store.count_labels(highest)[0] == 2
    assert store.count_labels(store.count_labels()[1]) == (0, store.count_labels()[1])


def test_what_waits_for_shadowing(store: Store) -> None:
    assert store.last_time() is None
    store.append([record(5), record(1), record(2, asked=None), record(3, status=500), record(4, pool="")])
    store.append([record(0, endpoint="summaries")])
    assert [item.id for item in store.unshadowed(10)] == ["req-1", "req-5"]
    assert [item.id for item in store.unshadowed(1)] == ["req-1"]
    assert [item.id for item in store.unshadowed(10, since=2)] == ["req-5"]
    seq = store.unshadowed(1)[0].seq
    for _ in range(2):
        store.mark_shadowed([seq, seq, 10**6], 9.0)
    assert [item.id for item in store.unshadowed(10)] == ["req-5"]
    assert store.count_records() == (6, 5)
    assert store.last_time() == 5.0


def test_deleting_takes_labels_and_marks_along(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    store.append([record(number) for number in range(10)])
    every = seqs(store)
    store.add_labels([Label(seq, "small", "exact", 1.0) for seq in every])
    store.mark_shadowed(every, 1.0)
    assert store.delete_before(8.0, most=4) == 4
    assert [item.record.time for item in store.logged(100)] == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert store.delete_before(8.0) == 4
    assert [item.record.id for item in store.labelled(100)] == ["req-8", "req-9"]
    assert store.count_labels()[0] == 2
    with store._transaction() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.SHADOWED)).scalar() == 2
    store.append([record(20)])
    assert seqs(store)[-1] > every[-1]  # numbers are never used again


def test_two_processes_may_create_and_write_at_once(records_url: str) -> None:
    script = (
        "import sys\n"
        "from depo_gateway.estimator.records.store import Store\n"
        "from depo_gateway.estimator.records.types import Label, Record\n"
        "store = Store(sys.argv[1]); store.create(); number = int(sys.argv[2])\n"
        "for index in range(25):\n"
        "    store.append([Record(id=f'{number}-{index}', time=float(index), pool='small')])\n"
        "    store.add_labels([Label(seq, 'small', 'exact', number / 4) for seq in range(1, 20)])\n"
        "store.close()"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, records_url, str(number)]) for number in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    store = Store(records_url)
    assert len(seqs(store)) == 75
    assert len(store.labelled(100)) == 19
    store.close()


def test_threads_may_share_one(store: Store) -> None:
    def write(number: int) -> None:
        for index in range(20):
            store.append([record(100 * number + index)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seqs(store)) == 80


def test_a_database_of_another_version_is_refused(store: Store, records_url: str) -> None:
    with store._transaction(write=True) as connection:
        connection.execute(tables.VERSIONS.update().values(version=99))
    again = Store(records_url)
    with pytest.raises(ValueError, match="created by another version \\(schema 99, here 1\\)") as raised:
        again.create()
    assert "secret" not in str(raised.value)
    again.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:////nowhere/at/all/records.db", "the directory /nowhere/at/all does not exist"),
        ("mysql://user:secret@host/base", "records.url names mysql"),
        ("nonsense with secret", "records.url can't be read"),
        ("postgresql://user:secret@host:port/base", "records.url can't be read"),
    ],
)
def test_addresses_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Store(url)
    assert "secret" not in str(raised.value)


def test_a_missing_driver_names_its_package(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from depo_gateway.estimator.records.store import Store\n"
        "try: Store('postgresql://user:secret@host/base')\n"
        "except ValueError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == (
        "the records database postgresql+psycopg://user:***@host/base needs psycopg: "
        "pip install 'depo-gateway[postgres]'\n"
    )


def test_a_database_that_is_away_is_one_sentence(postgres: Postgres) -> None:
    store = Store(postgres.database())
    store.create()
    store.append([record(1)])
    postgres.stop()
    with pytest.raises(StoreError, match=r"the records database postgresql\S+ failed: ") as raised:
        store.append([record(2)])
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not raised.value.rejected
    postgres.start()
    store.append([record(2)])  # the old connections are found to be dead and replaced
    assert len(seqs(store)) == 2
    store.close()


def test_sqlite_is_durable_and_waits_for_no_reader(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    store = Store(f"sqlite:///{path}")
    store.create()
    with store._transaction() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        ]
    assert settings == ["wal", 2, 1, 1]
    reader = sqlite3.connect(path)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM records").fetchone()
    store.append([record(1)])
    reader.close()
    store.close()


def test_a_locked_sqlite_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05)
    store = Store(f"sqlite:///{tmp_path / 'records.db'}")
    store.create()
    other = sqlite3.connect(tmp_path / "records.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        store.append([record(1)])
    other.rollback()
    other.close()
    store.append([record(1)])
    store.close()
