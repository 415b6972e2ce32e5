"""The files that the chart writes are taken by the programs that read them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.gateway import config
from depo_gateway.training.online import settings as learner_settings
from tests.helm import chart
from tests.helm.cases import CASES, EVERY_LEARNER_SETTING, EVERY_SETTING
from tests.helm.chart import Manifest, Pod

KEYS_FILE = "/etc/depo-gateway/keys/keys.yaml"
case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


def set_environment(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container's variables and no others, with something in the place of each secret."""
    for name in ("DEPO_DATABASE_URL", "DEPO_HASH_KEY"):
        monkeypatch.delenv(name, raising=False)
    for variable in pod.main.get("env", []):
        if "secretKeyRef" in variable.get("valueFrom", {}):
            monkeypatch.setenv(variable["name"], "postgresql://depo:secret@database/depo")
        elif "value" in variable and not variable["name"].lower().endswith("_proxy"):
            monkeypatch.setenv(variable["name"], variable["value"])


def mounted(pod: Pod, path: str) -> bool:
    return any(Path(path).is_relative_to(mount["mountPath"]) for mount in pod.main["volumeMounts"])


def gateway_config(manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    pod = chart.pod_of(manifests, "gateway")
    assert "/etc/depo-gateway/gateway.yaml" in pod.main["command"]
    set_environment(pod, monkeypatch)
    raw: dict[str, Any] = chart.file_of(manifests, "gateway", "gateway.yaml")
    if raw["auth"] != "none" and "keys_file" in raw["auth"]:
        assert raw["auth"]["keys_file"] == KEYS_FILE
        (volume,) = [item for item in pod.spec["volumes"] if item["name"] == "config"]
        (secret,) = [source["secret"] for source in volume["projected"]["sources"] if "secret" in source]
        assert secret["items"][0]["path"] == "keys/keys.yaml"
        keys = tmp_path / "keys.yaml"  # as the Secret holds it
        keys.write_text(yaml.safe_dump([{"name": "team-of-the-file", "sha256": "ef" * 32}]))
        raw["auth"]["keys_file"] = str(keys)
    written = tmp_path / "gateway.yaml"
    written.write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load_config(written)


@case
def test_the_gateway_takes_its_file(values: chart.Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = chart.rendered(values)
    pod = chart.pod_of(manifests, "gateway")
    found = gateway_config(manifests, tmp_path, monkeypatch)
    costs = [pool.cost for pool in found.pools.values()]
    assert costs == sorted(costs)
    ports = {port["name"]: port["containerPort"] for port in pod.main["ports"]}
    assert (found.listen.port, found.admin.port) == (ports["http"], ports["admin"])
    services = {
        item["metadata"]["name"]: [port["port"] for port in item["spec"]["ports"]]
        for item in chart.of_kind(manifests, "Service")
    }
    for name, pool in found.pools.items():
        deployed = [
            item for item in chart.of_kind(manifests, "Deployment")
            if item["metadata"]["labels"].get("depo-gateway/pool") == name
        ]  # fmt: skip
        for backend in pool.backends:
            host = backend.url.split("/")[2]
            if deployed:
                service, _, port = host.partition(":")
                assert int(port) in services[service]
                served = chart.pod_of(manifests, "backend", name).main
                named = [arg.split("=", 1)[1] for arg in served["args"] if arg.startswith("--served-model-name=")]
                assert pool.model == (named[0] if named else served["args"][0])
            else:
                assert host.partition(":")[0] not in services
    if found.estimator.path != "builtin":
        assert mounted(pod, found.estimator.path)
    if found.records is not None and found.records.url_env is None:
        assert found.records.url is not None
        assert mounted(pod, found.records.url.removeprefix("sqlite:///"))


@case
def test_the_learner_takes_its_file(values: chart.Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = chart.rendered(values)
    if not any(pod.component == "learner" for pod in chart.pods(manifests)):
        assert not any("learner" in chart.name_of(item) for item in manifests if "dashboard" not in chart.name_of(item))
        return
    gateway = gateway_config(manifests, tmp_path, monkeypatch)
    pod = chart.pod_of(manifests, "learner")
    set_environment(pod, monkeypatch)
    found = learner_settings.parse_settings(
        chart.file_of(manifests, "learner", "learner.yaml"), Path("/etc/depo-gateway")
    )
    assert found.listen.host == "0.0.0.0"
    if pod.owner.startswith("Deployment/"):
        assert {port["name"]: port["containerPort"] for port in pod.main["ports"]}["metrics"] == found.listen.port
    assert gateway.records is not None
    assert gateway.records.prompts == "full"
    assert (found.records.url, found.records.url_env) == (gateway.records.url, gateway.records.url_env)
    assert list(found.pools) == list(gateway.pools)
    for name, pool in gateway.pools.items():
        asked = found.pools[name]
        assert (asked.model, asked.cost) == (pool.model, pool.cost)
        assert [vars_of(backend) for backend in asked.backends] == [vars_of(backend) for backend in pool.backends]
    out = next(arg for arg in pod.main["args"] if arg.startswith("--out=")).removeprefix("--out=")
    assert out == gateway.estimator.path
    assert mounted(pod, out)
    claims = [
        [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in each.spec["volumes"]
            if volume["name"] == "checkpoints"
        ]
        for each in (pod, chart.pod_of(manifests, "gateway"))
    ]
    assert claims[0] == claims[1] != []
    base = values.set.get("learner", {}).get("base", "builtin")
    assert f"--base={base}" in pod.main["args"]
    assert ("--follow" in pod.main["args"]) == pod.owner.startswith("Deployment/")


def vars_of(backend: Any) -> tuple[str, str | None]:
    return backend.url, backend.api_key_env


def test_every_setting_of_the_gateway_reaches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = chart.rendered(CASES["every-setting"])
    raw = chart.file_of(manifests, "gateway", "gateway.yaml")
    for section, wanted in EVERY_SETTING.items():
        if section not in ("pools", "records", "auth"):
            found = raw[section]
            assert found == wanted | {"path": found.get("path")} if section == "estimator" else found == wanted
    assert raw["auth"] == EVERY_SETTING["auth"]
    assert raw["records"].items() >= EVERY_SETTING["records"].items()
    found = gateway_config(manifests, tmp_path, monkeypatch)
    assert found.limits.body_bytes == 33554432
    assert found.pools["small"].context_tokens == 1000000
    assert (found.pools["small"].model, found.pools["large"].context_tokens) == ("tiny", None)


def test_every_setting_of_the_learner_reaches_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    raw = chart.file_of(chart.rendered(CASES["every-learner-setting"]), "learner", "learner.yaml")
    for section, wanted in EVERY_LEARNER_SETTING.items():
        assert raw[section] == wanted, section
    assert learner_settings.parse_settings(raw).refresh.learn.newest == 5000000


def test_hashed_prompts_have_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gateway_config(chart.rendered(CASES["hashed-prompts"]), tmp_path, monkeypatch)
    assert found.records is not None
    assert (found.records.prompts, found.records.hash_key_env) == ("hash", "DEPO_HASH_KEY")


def test_keys_replace_open_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway_config(chart.rendered(CASES["defaults"]), tmp_path, monkeypatch).auth is None
    found = gateway_config(chart.rendered(CASES["keys"]), tmp_path, monkeypatch)
    assert found.auth is not None
    assert [key.name for key in found.auth.keys] == ["team-of-the-file"]


def test_pools_are_written_cheapest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = {name: list(gateway_config(chart.rendered(CASES[name]), tmp_path, monkeypatch).pools) for name in CASES}
    assert order["defaults"] == ["small", "large"]
    assert order["three-pools"] == ["small", "mid-size", "large"]
    assert order["other-pools"] == ["b", "a"]  # 9.5 before 10, which as text would come first


def test_the_first_checkpoint_is_seeded_for_the_pools_in_order() -> None:
    pod = chart.pod_of(chart.rendered(CASES["other-pools"]), "gateway")
    (seed,) = pod.spec["initContainers"]
    assert seed["command"] == ["depo-gateway", "seed", "/var/lib/depo-gateway/checkpoints", "--pools", "b", "a"]
    mount = next(item for item in seed["volumeMounts"] if item["name"] == "checkpoints")
    assert not mount.get("readOnly", False)
    assert "initContainers" not in chart.pod_of(chart.rendered(CASES["stateless"]), "gateway").spec
