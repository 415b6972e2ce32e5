"""The checkpoints that a refresh starts from."""

from pathlib import Path

from depo_gateway.estimator.records.types import Labelled, Record
from depo_gateway.training.online.champion import starting_point


def test_the_shipped_estimators_pools_take_the_names_of_the_traffics_in_order(tmp_path: Path) -> None:
    labelled = [Labelled(Record("r1", 1.0, pool="cheap", pools=("cheap", "dear"), status=200, asked="a"), ())]
    start = starting_point(Path("builtin"), tmp_path, False, labelled)
    assert start.champion is not None
    assert start.pools == start.champion.estimator.config.pools == ("cheap", "dear")
    assert start.parent == start.base.manifest.version


def test_a_cold_start_has_no_champion(tmp_path: Path) -> None:
    labelled = [Labelled(Record("r1", 1.0, pool="a", pools=("a", "b", "c"), status=200, asked="a"), ())]
    start = starting_point(Path("builtin"), tmp_path, True, labelled)
    assert (start.champion, start.pools) == (None, ("a", "b", "c"))
