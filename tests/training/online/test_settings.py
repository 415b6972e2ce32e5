"""learner.yaml: closed, checked, every mistake one sentence."""

from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator.configuration import yaml_tree as tree
from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.training.online import settings as learner_settings

POOLS = {
    "small": {"model": "org/small", "backends": [{"url": "http://a:8000/v1"}]},
    "large": {"model": "org/large", "backends": [{"url": "http://b:8000"}], "cost": 5},
}
RECORDS = {"url": "sqlite:///records.db"}


def test_an_empty_file_learns_from_feedback_alone(tmp_path: Path) -> None:
    file = tmp_path / "learner.yaml"
    file.write_text("")
    found = learner_settings.load_settings(file, "sqlite:///records.db")
    assert found == learner_settings.load_settings(None, "sqlite:///records.db")
    assert (found.shadow.share, found.judge.kind, found.pools) == (0.0, "none", {})
    assert database_url(found.records) == f"sqlite:///{Path.cwd()}/records.db"


def test_paths_are_relative_to_the_file_and_the_command_line_stands_over_it(tmp_path: Path) -> None:
    file = tmp_path / "learner.yaml"
    file.write_text("records: {url: 'sqlite:///records.db'}\nreference: ours.jsonl\n")
    found = learner_settings.load_settings(file)
    assert found.records.url == f"sqlite:///{tmp_path}/records.db"
    assert found.reference == str(tmp_path / "ours.jsonl")
    assert learner_settings.load_settings(file, "sqlite:///other.db").records.url == f"sqlite:///{Path.cwd()}/other.db"


def test_a_file_named_in_the_environment_is_beside_the_config_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECORDS", "sqlite:///records.db")
    found = learner_settings.parse_settings({"records": {"url_env": "RECORDS"}}, tmp_path)
    assert database_url(found.records) == f"sqlite:///{tmp_path}/records.db"


def test_a_secret_address_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECORDS", "postgresql://me:secret@db/records")
    found = learner_settings.parse_settings({"records": {"url_env": "RECORDS"}})
    assert database_url(found.records) == "postgresql://me:secret@db/records"
    assert "secret" not in repr(found)


def test_plain_values_make_the_same_tree_again() -> None:
    found = learner_settings.parse_settings(
        {"records": {"url": "sqlite:////r.db"}, "pools": POOLS, "shadow": {"share": 0.5}}
    )
    assert learner_settings.parse_settings(tree.plain(found)) == found


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "address is missing; give --records URL"),
        ({"records": {**RECORDS, "url_env": "X"}}, "both url and url_env"),
        ({"records": {"url_env": "NOT_THERE"}}, "'NOT_THERE' is not set"),
        ({"records": {"url": "mysql://x"}}, "must be sqlite:///FILE or postgresql://"),
        ({"shadw": {}}, "unknown key 'shadw'; did you mean 'shadow'"),
        ({"shadow": {"share": 1.5}, "pools": POOLS}, "shadow.share is 1.5"),
        ({"shadow": {"share": 0.1}}, "there are no pools to ask"),
        ({"shadow": {"priority": "low"}}, "shadow.priority is the text 'low'; write a whole number"),
        ({"shadow": {"max_concurrent": 0}}, "shadow.max_concurrent is 0"),
        ({"shadow": {"cost_per_hour": -1.0}}, "shadow.cost_per_hour is -1"),
        ({"pools": {"small": {"model": "m", "backends": []}}}, "pools.small.backends is empty"),
        ({"pools": {"small": {"model": "m", "backends": [{"url": "b:80"}]}}}, "is not an http or https address"),
        ({"pools": {"small": {"model": "m", "backends": [{"url": "http://k@b"}]}}}, "give a key by api_key_env"),
        ({"judge": {"kind": "best"}}, "judge.kind is 'best'; write one of none, exact, math, model, webhook"),
        ({"judge": {"kind": "model", "pool": "huge"}, "pools": POOLS}, "the pools are: small, large"),
        ({"judge": {"kind": "webhook"}}, "requires judge.url"),
        ({"judge": {"kind": "exact", "url": "http://x"}}, "judge.url is read by kind: webhook alone"),
        ({"refresh": {"keep": 0}}, "refresh.keep is 0"),
        ({"refresh": {"learn": {"min_label": 5}}}, "did you mean 'min_labels'"),
        ({"listen": {"port": 70000}}, "listen.port is 70000"),
    ],
)
def test_mistakes_are_one_sentence(raw: dict[str, Any], said: str) -> None:
    records = {} if "records" in raw or not raw else {"records": RECORDS}
    with pytest.raises(ValueError) as mistake:
        learner_settings.parse_settings({**records, **raw})
    assert said in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_nothing_here_imports_torch() -> None:
    import subprocess
    import sys

    program = "import sys, depo_gateway.training.online.daemon; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
