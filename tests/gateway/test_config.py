"""gateway.yaml: what is taken, what is refused, and how clearly."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.gateway import config
from depo_gateway.gateway.auth_config import Key

SHA = config.key_digest("sk-depo-test")

# The contract's example, whole.
EXAMPLE = f"""
version: 1
listen: {{host: 127.0.0.1, port: 8000}}
admin: {{host: 127.0.0.1, port: 9000}}
pools:
  small:
    model: Qwen/Qwen2.5-1.5B-Instruct
    cost: 1.0
    context_tokens: 32768
    max_in_flight: 256
    accepts: [text, tools]
    backends: [{{url: http://vllm-small:8000}}]
  large:
    model: Qwen/Qwen2.5-7B-Instruct
    cost: 5.0
    backends: [{{url: http://vllm-large:8000}}]
routing:
  rule: gain
  threshold: 0.85
  sticky: true
  explore: 0.0
  on_overload: share
  expose_scores: false
estimator: {{path: builtin, deadline_ms: 50, watch: true}}
timeouts: {{connect_s: 2, first_token_s: 60, idle_s: 30, total_s: 600, drain_s: 60}}
retries: {{budget: 0.2, per_second: 10}}
limits: {{body_bytes: 4194304, header_bytes: 65536, max_queue: 512, queue_timeout_s: 5}}
auth: {{keys: [{{name: team-a, sha256: "{SHA}", requests_per_minute: 600, large_share: 0.5}}]}}
records: {{url: sqlite:///records.db, prompts: none, retention_days: 30}}
"""


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest config, with values set at paths: `routing__threshold` is routing.threshold."""
    raw: dict[str, Any] = {
        "version": 1,
        "pools": {
            "small": {"model": "s", "backends": [{"url": "http://s:8000"}]},
            "large": {"model": "l", "backends": [{"url": "http://l:8000"}]},
        },
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return raw


def mistake(raw: dict[str, Any], directory: Path = Path()) -> str:
    with pytest.raises(ValueError) as caught:
        config.parse_config(raw, directory)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_the_contracts_example_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(EXAMPLE)
    read = config.load_config(path)
    assert list(read.pools) == ["small", "large"]
    assert (read.routing.rule, read.routing.threshold, read.limits.queue_timeout_s) == ("gain", 0.85, 5.0)
    assert read.pools["small"].accepts == ("text", "tools")
    assert read.auth is not None
    assert read.auth.keys == (Key("team-a", SHA, 600.0, 0.5),)
    assert read.records == config.Records(f"sqlite:///{tmp_path}/records.db")


@pytest.mark.parametrize("target", [{"large_share": 0.3}, {"quality": 0.98}, {"cost": 0.4}])
def test_the_contracts_targets_are_taken_instead_of_a_threshold(tmp_path: Path, target: dict[str, float]) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(EXAMPLE.replace("threshold: 0.85", f"target: {target}"))
    read = config.load_config(path)
    assert read.routing.target == config.Target(**target)
    shown = yaml.safe_load(config.resolved_yaml(read))["routing"]
    assert "threshold" not in shown
    assert {name: value for name, value in shown["target"].items() if value is not None} == target


def test_a_resolved_target_is_a_target() -> None:
    read = config.parse_config(tree(routing__target={"large_share": 0.3}, estimator__candidate="/there"))
    assert config.parse_config(yaml.safe_load(config.resolved_yaml(read))) == read


def test_defaults_are_the_examples_values(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(EXAMPLE)
    full, least = config.load_config(path), config.parse_config(tree())
    for section in ("version", "listen", "admin", "routing", "estimator", "timeouts", "retries", "limits"):
        assert getattr(full, section) == getattr(least, section), section
    assert (least.auth, least.records) == (None, None)


def test_a_resolved_config_is_a_config_but_for_its_keys(tmp_path: Path) -> None:
    shown = config.resolved_yaml(config.parse_config(tree()))
    assert config.parse_config(yaml.safe_load(shown)) == config.parse_config(tree())
    path = tmp_path / "gateway.yaml"
    path.write_text(EXAMPLE)
    shown = config.resolved_yaml(config.load_config(path))
    assert SHA not in shown
    assert "team-a" in shown


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("routin", "routing"),
        ("pools__small__modle", "model"),
        ("pools__small__max_inflight", "max_in_flight"),
        ("routing__treshold", "threshold"),
        ("routing__exposescores", "expose_scores"),
        ("estimator__deadline", "deadline_ms"),
        ("timeouts__first_token", "first_token_s"),
        ("limits__body_byte", "body_bytes"),
        ("admin__key_sha", "key_sha256"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(path: str, near: str) -> None:
    message = mistake(tree(**{path: 1}))
    assert f"unknown key '{path.replace('__', '.')}'" in message
    assert f"did you mean '{near}'?" in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"routing__target": {"small_share": 0.3}}, "routing.target.small_share"),
        ({"estimator__candidates": ["a", "b"]}, "estimator.candidates"),
        ({"records": {"urls": ["sqlite:///records.db"]}}, "records.urls"),
        ({"auth__keys": [{"name": "a", "sha256": SHA, "tokens_per_minute": 6}]}, "auth.keys[0].tokens_per_minute"),
        ({"zzz": 1}, "zzz"),
        ({"pools__small__backends": [{"url": "http://x", "weight": 2}]}, "pools.small.backends[0].weight"),
    ],
)
def test_what_does_not_exist_is_unknown(changes: dict[str, Any], key: str) -> None:
    assert f"unknown key '{key}'" in mistake(tree(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"routing__threshold": "0.6"}, "routing.threshold is the text '0.6'; write a number"),
        ({"routing__threshold": True}, "routing.threshold is true or false; write a number"),
        ({"routing__threshold": None}, "routing.threshold is empty; write a number"),
        ({"routing__threshold": 1.2}, "routing.threshold is 1.2 and must be between 0 and 1"),
        ({"routing__threshold": float("nan")}, "routing.threshold is nan; write a finite number"),
        ({"timeouts__total_s": float("inf")}, "timeouts.total_s is inf; write a finite number"),
        ({"routing__explore": -0.1}, "routing.explore is -0.1"),
        ({"routing__sticky": "yes"}, "routing.sticky is the text 'yes'; write true or false"),
        ({"routing__sticky": 1}, "routing.sticky is a whole number; write true or false"),
        ({"routing__rule": "gains"}, "routing.rule is 'gains'; write one of gain, difficulty"),
        ({"routing__on_overload": "huge"}, "write share or a pool's name (small, large)"),
        ({"listen__port": 8000.0}, "listen.port is a number; write a whole number"),
        ({"listen__port": 70_000}, "listen.port is 70000 and must be between 0 and 65535"),
        ({"listen__port": 9000}, "listen and admin both name port 9000"),
        ({"listen": []}, "listen is a list; write a mapping"),
        ({"listen": None}, "listen is empty; write a mapping"),
        ({"limits__body_bytes": 4}, "limits.body_bytes is 4 and must be at least 1024"),
        ({"limits__max_queue": -1}, "limits.max_queue is -1"),
        ({"timeouts__connect_s": 0}, "timeouts.connect_s is 0"),
        ({"retries__budget": -1}, "retries.budget is -1"),
        ({"estimator__deadline_ms": -1}, "estimator.deadline_ms is -1"),
        ({"version": 2}, "version is 2; write one of 1"),
        ({"version": "1"}, "version is '1'"),
        ({"version": True}, "version is True"),
        ({"pools": {}}, "needs two pools or more"),
        ({"pools": []}, "pools is a list; write a mapping"),
        ({"pools": {"small": None, "large": None}}, "pools.small is empty; write a mapping"),
        ({"pools__small__model": ""}, "pools.small.model is empty"),
        ({"pools__small__model": 7}, "pools.small.model is a whole number; write text"),
        ({"pools__small__model": "l"}, "also names pool"),
        ({"pools__small__model": "large"}, "also names pool 'large'"),
        ({"pools__small__model": "auto"}, "pools.small.model can't be 'auto'"),
        ({"pools__small__model": "auto-0.5"}, "pools.small.model can't be 'auto-0.5'"),
        ({"pools__small__cost": 6, "pools__large__cost": 5}, "'large' (5) comes after 'small' (6)"),
        ({"pools__small__cost": -1}, "pools.small.cost is -1"),
        ({"pools__small__max_in_flight": 0}, "pools.small.max_in_flight is 0"),
        ({"pools__small__context_tokens": 0}, "pools.small.context_tokens is 0"),
        ({"pools__small__context_tokens": 1.5}, "pools.small.context_tokens is a number; write a whole number"),
        ({"pools__small__accepts": ["tools"]}, "pools.small.accepts must contain text"),
        ({"pools__small__accepts": ["text", "images"]}, "pools.small.accepts[1] is 'images'; write one of text, tools"),
        ({"pools__small__accepts": "text"}, "pools.small.accepts is the text 'text'; write a list"),
        ({"pools__small__backends": []}, "pools.small.backends is empty"),
        ({"pools__small__backends": ["http://x"]}, "pools.small.backends[0] is the text 'http://x'; write a mapping"),
        ({"pools__small__backends": [{}]}, "'pools.small.backends[0].url' is missing"),
        ({"pools__small__backends": [{"url": "vllm:8000"}]}, "pools.small.backends[0].url 'vllm:8000' is not an http"),
        ({"pools__small__backends": [{"url": "http://"}]}, "is not an http or https address"),
        ({"pools__small__backends": [{"url": "http://x:99999"}]}, "is not an http or https address"),
        ({"pools__small__backends": [{"url": "http://x?key=1"}]}, "is not an http or https address"),
        ({"pools__small__backends": [{"url": "http://a b"}]}, "is not an http or https address"),
        ({"pools__auto": {"model": "x", "backends": [{"url": "http://x"}]}}, "pools.auto: a pool can't be called"),
        ({"pools__auto-1": {"model": "x", "backends": [{"url": "http://x"}]}}, "pools.auto-1: a pool can't be called"),
        ({"pools__a/b": {"model": "x", "backends": [{"url": "http://x"}]}}, "pools.a/b: a pool's name is"),
        ({"listen__host": "0.0.0.0"}, "listen.host 0.0.0.0 can be reached from other machines and auth is absent"),
        ({"listen__host": "::"}, "can be reached from other machines"),
        ({"listen__host": "gateway.internal"}, "can be reached from other machines"),
        ({"auth": None}, "auth is empty; write auth: none"),
        ({"auth": {}}, "auth has no keys"),
        ({"auth": "off"}, "auth is the text 'off'"),
        ({"auth__keys": [{"name": "a", "sha256": "sk-depo-plain"}]}, "auth.keys[0].sha256 (key 'a') is not a sha256"),
        ({"auth__keys": [{"name": "", "sha256": SHA}]}, "auth.keys[0].name is empty"),
        ({"auth__keys": [{"name": "a", "sha256": SHA}] * 2}, "auth.keys[1] repeats"),
        ({"auth__keys_file": "nowhere.yaml"}, "can't read nowhere.yaml: No such file"),
        ({"admin__key_sha256": "secret"}, "admin.key_sha256 is not a sha256"),
        ({"routing__target": {}}, "routing.target takes one of large_share, quality, cost"),
        ({"routing__target": {"large_share": 0.3, "cost": 0.5}}, "routing.target takes one of large_share, quality"),
        ({"routing__target": {"large_share": 1.3}}, "routing.target.large_share is 1.3 and must be between 0 and 1"),
        ({"routing__target": {"quality": "high"}}, "routing.target.quality is the text 'high'; write a number"),
        ({"routing__target": 0.3}, "routing.target is a number; write a mapping"),
        (
            {"routing__target": {"large_share": 0.3}, "routing__threshold": 0.5},
            "routing has both threshold and target; a target moves the threshold, so write one of them",
        ),
        (
            {"routing__target": {"cost": 0.1}, "pools__small__cost": 1, "pools__large__cost": 5},
            "routing.target.cost 0.1 can't be met: with everything in pool small it is 0.2",
        ),
        (
            {"routing__target": {"cost": 0.1}, "pools__small__cost": 0, "pools__large__cost": 0},
            "routing.target.cost needs a cost above 0 for the last pool",
        ),
        ({"estimator__candidate": 7}, "estimator.candidate is a whole number; write text"),
        (
            {"auth__keys": [{"name": "a", "sha256": SHA, "requests_per_minute": 0}]},
            "auth.keys[0].requests_per_minute must be above 0 (key 'a')",
        ),
        (
            {"auth__keys": [{"name": "a", "sha256": SHA, "large_share": 1.5}]},
            "auth.keys[0].large_share (key 'a') is 1.5 and must be between 0 and 1",
        ),
        ({"records": {"url": "mysql://there/db"}}, "records.url must be sqlite:///FILE or postgresql://HOST/DATABASE"),
        ({"records": {"url": "sqlite://"}}, "records.url sqlite:// names no file; write sqlite:///FILE"),
        ({"records": {"url": "sqlite:///:memory:"}}, "records.url sqlite:///:memory: names no file; write sqlite:///"),
        ({"records": {"url": "sqlite:///a", "url_env": "B"}}, "records has both url and url_env; write one of them"),
        ({"records": {"url_env": "NO_SUCH_VARIABLE"}}, "records.url_env: the environment variable 'NO_SUCH_VARIABLE'"),
        ({"records": {"prompts": "some"}}, "records.prompts is 'some'; write one of none, hash, full"),
        ({"records": {"prompts": "hash"}}, "records.prompts: hash requires records.hash_key_env"),
        ({"records": {"retention_days": 0}}, "records.retention_days is 0 and must be above 0"),
        ({"records": None}, "records is empty; write records: {} to keep them in records.db, or leave it out"),
        ({"routing__target": None}, "routing.target is empty; write one of large_share, quality, cost under it"),
    ],
)
def test_a_mistake_is_one_clear_sentence(changes: dict[str, Any], words: str) -> None:
    message = mistake(tree(**changes))
    assert words in message
    assert "sk-depo-plain" not in message


def test_a_name_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    raw = tree()
    raw["pools"][True] = raw["pools"].pop("large")
    assert "pools has the name True, which YAML takes for true or false; put it in quotes" in mistake(raw)


def test_version_and_pools_are_asked_for() -> None:
    assert "'version' is missing" in mistake({"pools": {}})
    assert "'pools' is missing" in mistake({"version": 1})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_a_loopback_address_may_be_open(host: str) -> None:
    assert config.parse_config(tree(listen__host=host)).auth is None


def test_open_on_all_addresses_requires_auth_none() -> None:
    read = config.parse_config(tree(listen__host="0.0.0.0", auth="none"))
    assert read.auth is None
    assert "auth: none" in config.resolved_yaml(read)


def test_a_backends_secret_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tree(pools__small__backends=[{"url": "http://x", "api_key_env": "SMALL_KEY"}])
    monkeypatch.delenv("SMALL_KEY", raising=False)
    where = "pools.small.backends[0].api_key_env"
    assert f"{where}: the environment variable 'SMALL_KEY' is not set" in mistake(raw)
    for value in ("sécret", "secret\n", " secret", "a\tb"):
        monkeypatch.setenv("SMALL_KEY", value)
        message = mistake(raw)
        assert f"{where}: 'SMALL_KEY' holds" in message
        assert "cret" not in message
    monkeypatch.setenv("SMALL_KEY", "the-secret")
    shown = config.resolved_yaml(config.parse_config(raw))
    assert "SMALL_KEY" in shown
    assert "the-secret" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://depo:the-secret@host/records",
        "postgresql://depo:a/the-secret@host/records",
        "postgresql://depo:a:the-secret@host:5432/records",
        "postgresql://depo:a@the-secret@host/records",
        "postgresql://host/records?user=depo&password=the-secret&sslmode=require",
        "postgresql://host/records?sslpassword=the-secret",
    ],
)
def test_a_databases_password_is_not_shown(url: str) -> None:
    shown = config.resolved_yaml(config.parse_config(tree(records__url=url)))
    assert "the-secret" not in shown
    assert "host" in shown
    assert "/records" in shown


def test_a_secret_in_an_address_is_refused_and_not_repeated() -> None:
    message = mistake(tree(pools__small__backends=[{"url": "http://me:pass@vllm:99999"}]))
    assert "pools.small.backends[0].url holds an '@'" in message
    assert "pass" not in message


@pytest.mark.parametrize("form", ["- {{name: a, sha256: {0}}}", "keys:\n  - {{name: a, sha256: {0}}}"])
def test_a_keys_file_lies_beside_the_config(tmp_path: Path, form: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/keys.yaml").write_text(form.format(SHA))
    (tmp_path / "etc/gateway.yaml").write_text(yaml.safe_dump(tree(auth__keys_file="keys.yaml"), sort_keys=False))
    read = config.load_config(tmp_path / "etc/gateway.yaml")
    assert read.auth is not None
    assert read.auth.keys == (Key("a", SHA),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a list of {name, sha256}, found empty"),
        ("a: 1", "expected a list"),
        ("[1]", "[0] is a whole number; write a mapping"),
        ("- {name: a}", "[0].sha256' is missing"),
        ("- {name: a, sha: b}", "did you mean 'sha256'?"),
        ("- {name: a", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_keys_file_name_it(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "keys.yaml").write_text(content)
    message = mistake(tree(auth__keys_file="keys.yaml"), tmp_path)
    assert words in message
    assert str(tmp_path / "keys.yaml") in message


def test_a_relative_database_lies_beside_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECORDS", "sqlite:///there/records.db")
    for section in ({"url": "sqlite:///there/records.db"}, {"url_env": "RECORDS"}):
        read = config.parse_config(tree(records=section), tmp_path).records
        assert read is not None
        assert database_url(read) == f"sqlite:///{tmp_path}/there/records.db"
    monkeypatch.setenv("RECORDS", "postgresql://u:secret@there/db")
    read = config.parse_config(tree(records={"url_env": "RECORDS"}), tmp_path).records
    assert read is not None
    assert (database_url(read), config.shown_url(read)) == ("postgresql://u:secret@there/db", None)
    monkeypatch.setenv("RECORDS", "sqlite:///:memory:")
    assert "records.url_env sqlite:///:memory: names no file" in mistake(tree(records={"url_env": "RECORDS"}))


def test_a_relative_checkpoint_lies_beside_the_config(tmp_path: Path) -> None:
    assert config.parse_config(tree(estimator__path="checkpoints"), tmp_path).estimator.path == str(
        tmp_path / "checkpoints"
    )
    assert config.parse_config(tree(estimator__path="/abs"), tmp_path).estimator.path == "/abs"
    assert config.parse_config(tree(estimator__candidate="next"), tmp_path).estimator.candidate == str(
        tmp_path / "next"
    )
    assert config.parse_config(tree(), tmp_path).estimator.path == "builtin"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nversion: 1\n", "line 2: the key 'version' is written twice"),
        ("version: 1\nlisten: {port: 1, port: 2}\n", "line 2: the key 'port' is written twice"),
        ("? [a]\n: 1\n", "line 1: a key must be plain text"),
        ("version: 1\npools: [\n", "is not valid YAML"),
        ("\t", "is not valid YAML"),
        ("", "expected a mapping with 'version' and 'pools', found empty"),
        ("- 1", "found a list"),
        ("!!python/object:os.system {}", "is not valid YAML"),
        ("version: 1\n1: 2\npools: {}", "unknown key '1'"),
    ],
)
def test_yaml_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        config.load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_are_yaml_too(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("""
version: 1
pools:
  small: &base {model: s, cost: 1, backends: [{url: "http://s"}]}
  large: {<<: *base, model: l, cost: 2}
""")
    assert config.load_config(path).pools["large"].model == "l"


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=words):
            config.load_config(path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        config.load_config(binary)


def test_every_message_of_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(tree(routing__treshold=1), sort_keys=False))
    with pytest.raises(ValueError, match=re.escape(f"{path}: unknown key 'routing.treshold'; did you mean")):
        config.load_config(path)
