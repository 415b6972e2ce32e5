"""Settings that both programs have: the same keys, checks and messages, each program's own defaults."""

from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator.configuration.shared import (
    BackendConfig,
    Listen,
    PoolBackends,
    RecordsDatabase,
    check_backends,
    database_url,
    resolve_database,
)
from depo_gateway.gateway import config
from depo_gateway.training.online import settings

POOLS = {name: {"model": name[0], "backends": [{"url": f"http://{name}:8000"}]} for name in ("small", "large")}


def gateway(**raw: Any) -> config.Config:
    return config.parse_config({"version": 1, "pools": POOLS, **raw})


def learner(**raw: Any) -> settings.LearnerSettings:
    return settings.parse_settings({"records": {"url": "sqlite:////r.db"}, "pools": POOLS, **raw})


def test_each_program_has_its_own_port_also_where_only_the_host_is_set() -> None:
    assert (gateway().listen, learner().listen) == (Listen(port=8000), Listen(port=9100))
    host = {"host": "127.0.0.2"}
    assert gateway(listen=host).listen == Listen("127.0.0.2", port=8000)
    assert learner(listen=host).listen == Listen("127.0.0.2", port=9100)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"pools": {**POOLS, "small": {"model": "", "backends": []}}}, "pools.small.model is empty"),
        ({"pools": {**POOLS, "small": {"model": "s", "backends": []}}}, "pools.small.backends is empty"),
        ({"pools": {**POOLS, "small": {**POOLS["small"], "cost": -1}}}, "pools.small.cost is -1"),
        ({"records": {"url": "sqlite:///a", "url_env": "B"}}, "records has both url and url_env; write one of them"),
        ({"records": {"url_env": "NOT_THERE"}}, "records.url_env: the environment variable 'NOT_THERE' is not set"),
        ({"listen": {"port": 70000}}, "listen.port is 70000 and must be between 0 and 65535"),
    ],
)
def test_both_programs_say_the_same(raw: dict[str, Any], words: str) -> None:
    for program in (gateway, learner):
        with pytest.raises(ValueError) as mistake:
            program(**raw)
        assert words in str(mistake.value)


def test_a_servers_address_stays_in_the_environment_and_a_files_path_becomes_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = RecordsDatabase(url_env="RECORDS")
    monkeypatch.setenv("RECORDS", "postgresql://me:secret@db/records")
    assert resolve_database(section, tmp_path, "records.url_env") == section
    assert database_url(section) == "postgresql://me:secret@db/records"
    monkeypatch.setenv("RECORDS", "sqlite:///r.db")
    assert resolve_database(section, tmp_path, "records.url_env").url == f"sqlite:///{tmp_path}/r.db"


def test_backends_are_checked_one_by_one() -> None:
    backends = (BackendConfig("http://a"), BackendConfig("http://b", "NOT_THERE"))
    with pytest.raises(ValueError, match=r"pools.x.backends\[1\].api_key_env: .* 'NOT_THERE' is not set"):
        check_backends("x", PoolBackends("m", backends))
