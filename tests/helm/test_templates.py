"""Every way to install the chart renders into objects that Kubernetes takes and that fit together."""

import functools
import json
import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
import referencing
from kubernetes_validate import utils as kubernetes

from tests.helm import chart
from tests.helm.cases import CASES
from tests.helm.chart import CHART, Manifest, Pod

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
OWN_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}  # see test_custom_kinds.py
NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


@pytest.fixture
def manifests(values: chart.Values) -> list[Manifest]:
    return chart.rendered(values)


def test_all_presets_are_among_the_cases() -> None:
    presets = {path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml")}
    assert presets == {"cpu", "existing-vllm", "production"}
    assert presets <= {name for values in CASES.values() for name in values.presets}
    assert len(CASES) >= 20


@case
def test_lint_has_nothing_to_say(values: chart.Values) -> None:
    done = chart.run("lint", values)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@case
def test_helm_warns_of_nothing(values: chart.Values) -> None:
    stderr = chart.warnings(values).splitlines()
    # Helm's own word on a map in place of `auth: none`, which is as it should be
    assert [line for line in stderr if "config.auth is a table" not in line] == []


@functools.cache
def schema_of(version: str, kind: str, api: str) -> jsonschema.Draft202012Validator:
    """As kubernetes_validate.validate does it, but each file is read once."""
    exact = next(name for name in kubernetes.all_versions() if kubernetes.major_minor(name) == version)
    folder = f"kubernetes-json-schema/v{exact}-local-strict"
    schema = kubernetes.schema_contents(f"{folder}/{kind.lower()}-{api}.json", version)
    return jsonschema.Draft202012Validator(
        schema, registry=definitions(folder, version).with_resource("", resource(schema))
    )


@functools.cache
def definitions(folder: str, version: str) -> Any:
    found = resource(kubernetes.schema_contents(f"{folder}/_definitions.json", version))
    return found @ referencing.Registry()


def resource(contents: Any) -> Any:
    return referencing.Resource.from_contents(contents)


@functools.cache
def complaints(version: str, manifest: str) -> list[str]:
    item = json.loads(manifest)
    api = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", item["apiVersion"])
    errors = schema_of(version, item["kind"], api).iter_errors(item)
    return [f"{chart.name_of(item)} {'.'.join(map(str, error.path))}: {error.message}" for error in errors]


def test_the_schemas_refuse_what_kubernetes_refuses() -> None:
    service = next(item for item in chart.rendered(CASES["defaults"]) if item["kind"] == "Service")
    service["spec"]["ports"][0]["targetport"] = 80
    assert "targetport" in complaints("1.29", json.dumps(service))[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(version: str) -> None:
    said = []
    for name, values in CASES.items():
        for item in chart.rendered(values):
            if item["kind"] not in OWN_KINDS:
                said += [f"{name}: {line}" for line in complaints(version, json.dumps(item, sort_keys=True))]
    assert said == []


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_the_chart_installs_on(version: str) -> None:
    chart.rendered(CASES["defaults"], f"--kube-version={version}.0")


def test_an_older_kubernetes_is_refused() -> None:
    done = chart.run("template", CASES["defaults"], "--kube-version=1.28.0")
    assert done.returncode == 1
    assert "kubeVersion: >=1.29" in done.stderr


@case
def test_names_are_valid_and_taken_once(values: chart.Values, manifests: list[Manifest]) -> None:
    assert [name for name, count in Counter(map(chart.name_of, manifests)).items() if count > 1] == []
    for item in manifests:
        name = item["metadata"]["name"]
        most = {"CronJob": 52, "PersistentVolumeClaim": 253}.get(item["kind"], 63)
        if "dashboards" in str(item["metadata"].get("labels")) or item["kind"] == "ConfigMap":
            most = 253
        assert NAME.fullmatch(name), name
        assert len(name) <= most, name
    for pod in chart.pods(manifests):
        names = [container["name"] for container in pod.containers]
        assert len(names) == len(set(names))


@case
def test_objects_stand_in_the_release_s_namespace_with_the_usual_labels(
    values: chart.Values, manifests: list[Manifest]
) -> None:
    for item in manifests:
        if item["metadata"]["name"] == f"{values.release}-extra":
            continue
        assert item["metadata"]["namespace"] == "models"
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == values.release
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/part-of"] == "depo-gateway"
        assert labels["app.kubernetes.io/component"] in {"gateway", "learner", "backend", "test"}
        assert labels["app.kubernetes.io/name"] == values.set.get("nameOverride", "depo-gateway")
        assert labels["helm.sh/chart"].startswith("depo-gateway-")
        assert "app.kubernetes.io/version" in labels
        for value in labels.values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", value), value
        for key, value in values.set.get("commonLabels", {}).items():
            assert labels[key] == value
        for key, value in values.set.get("commonAnnotations", {}).items():
            assert item["metadata"]["annotations"][key] == value


@case
def test_each_selector_takes_its_own_pods_and_no_others(values: chart.Values, manifests: list[Manifest]) -> None:
    found = list(chart.pods(manifests))
    for item in chart.of_kind(manifests, "Deployment"):
        selector = item["spec"]["selector"]
        assert [pod.owner for pod in found if chart.selects(selector, pod.labels)] == [chart.name_of(item)]
        pool = {"depo-gateway/pool"} if "depo-gateway/pool" in item["metadata"]["labels"] else set()
        stable = {f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")} | pool
        assert set(selector["matchLabels"]) == stable
    for item in chart.of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = item["spec"]
        selector = spec["podSelector"] if item["kind"] == "NetworkPolicy" else spec["selector"]
        taken = [pod for pod in found if chart.selects(selector, pod.labels)]
        assert len(taken) == 1, f"{chart.name_of(item)} takes {[pod.owner for pod in taken]}"
        assert taken[0].component == item["metadata"]["labels"]["app.kubernetes.io/component"]


def ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for container in pod.containers for port in container.get("ports", [])}


@case
def test_services_and_probes_name_ports_that_are_there(values: chart.Values, manifests: list[Manifest]) -> None:
    found = list(chart.pods(manifests))
    for item in chart.of_kind(manifests, "Service"):
        (pod,) = [pod for pod in found if chart.selects(item["spec"]["selector"], pod.labels)]
        for port in item["spec"]["ports"]:
            assert port["targetPort"] in ports(pod), chart.name_of(item)
    for pod in found:
        numbers = list(ports(pod).values())
        assert len(numbers) == len(set(numbers))
        for container in pod.containers:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports(pod), pod.owner


@case
def test_the_api_and_the_admin_port_have_a_service_each(values: chart.Values, manifests: list[Manifest]) -> None:
    pod = chart.pod_of(manifests, "gateway")
    settings = chart.file_of(manifests, "gateway", "gateway.yaml")
    led = {
        tuple(ports(pod)[port["targetPort"]] for port in item["spec"]["ports"])
        for item in chart.of_kind(manifests, "Service")
        if chart.selects(item["spec"]["selector"], pod.labels)
    }
    assert led == {(settings["listen"]["port"],), (settings["admin"]["port"],)}
    (admin,) = [item for item in chart.of_kind(manifests, "Service") if item["metadata"]["name"].endswith("-admin")]
    assert admin["spec"]["type"] == "ClusterIP"  # it asks for no key
    assert [port["targetPort"] for port in admin["spec"]["ports"]] == ["admin"]


@case
def test_servers_have_all_three_probes_and_time_to_drain(values: chart.Values, manifests: list[Manifest]) -> None:
    for pod in chart.pods(manifests):
        if not pod.owner.startswith("Deployment/"):
            continue
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(pod.main), pod.owner
        if pod.component == "gateway":
            assert pod.main["livenessProbe"]["httpGet"]["path"] == "/livez"
            assert pod.main["readinessProbe"]["httpGet"]["path"] == "/readyz"
            pause = int(pod.main["lifecycle"]["preStop"]["exec"]["command"][-1])
            drain = chart.file_of(manifests, "gateway", "gateway.yaml").get("timeouts", {}).get("drain_s", 60)
            assert pod.spec["terminationGracePeriodSeconds"] > pause + drain
        if pod.component == "backend":
            pause = int(pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0])[-1])
            (drain,) = [int(arg.split("=")[1]) for arg in pod.main["args"] if arg.startswith("--shutdown-timeout=")]
            assert pod.spec["terminationGracePeriodSeconds"] > pause + drain
            assert pause > 0
            assert drain > 0


@case
def test_what_is_mounted_exists(values: chart.Values, manifests: list[Manifest]) -> None:
    own = {chart.name_of(item) for item in manifests}
    outside = json.dumps(values.set) + json.dumps(
        [(CHART / f"values-{name}.yaml").read_text() for name in values.presets]
    )
    for pod in chart.pods(manifests):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        assert len(volumes) == len(pod.spec.get("volumes", []))
        used = set()
        for container in pod.containers:
            mounts = container.get("volumeMounts", [])
            paths = [mount["mountPath"] for mount in mounts]
            assert len(paths) == len(set(paths))
            used |= {mount["name"] for mount in mounts}
            assert all("subPath" not in mount for mount in mounts)  # those are never updated
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(names) == len(set(names)), f"{pod.owner}: {names}"
        assert used == set(volumes), pod.owner
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or f"PersistentVolumeClaim/{claim}" in own or f'"{claim}"' in outside, claim
            sources = volume.get("projected", {}).get("sources", [volume])
            for source in sources:
                name = source.get("configMap", {}).get("name")
                assert name is None or f"ConfigMap/{name}" in own or f'"{name}"' in outside, name


@case
def test_every_claim_and_config_map_has_a_use(values: chart.Values, manifests: list[Manifest]) -> None:
    mounted = json.dumps([pod.spec for pod in chart.pods(manifests)])
    for item in chart.of_kind(manifests, "PersistentVolumeClaim", "ConfigMap"):
        if {"grafana_dashboard"} & set(item["metadata"].get("labels", {})) or item["metadata"]["name"].endswith(
            "-extra"
        ):
            continue
        assert f'"{item["metadata"]["name"]}"' in mounted, chart.name_of(item)


@case
def test_references_between_objects_lead_somewhere(values: chart.Values, manifests: list[Manifest]) -> None:
    own = {chart.name_of(item): item for item in manifests}
    for item in chart.of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        deployment = own[f"{target['kind']}/{target['name']}"]
        assert "replicas" not in deployment["spec"], "an upgrade would set it back"
    for item in chart.of_kind(manifests, "Deployment"):
        scaled = [
            found
            for found in chart.of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
            if found["spec"]["scaleTargetRef"]["name"] == item["metadata"]["name"]
        ]
        assert ("replicas" in item["spec"]) == (not scaled)
        assert len(scaled) < 2
    for item in chart.of_kind(manifests, "Ingress"):
        for rule in item["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = own[f"Service/{path['backend']['service']['name']}"]
                assert path["backend"]["service"]["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    for item in chart.of_kind(manifests, "HTTPRoute"):
        for rule in item["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                service = own[f"Service/{backend['name']}"]
                assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]
    for item in chart.of_kind(manifests, "ServiceMonitor"):
        services = [
            found
            for found in chart.of_kind(manifests, "Service")
            if chart.selects(item["spec"]["selector"], found["metadata"]["labels"])
        ]
        for endpoint in item["spec"]["endpoints"]:
            offering = [s for s in services if endpoint["port"] in [port["name"] for port in s["spec"]["ports"]]]
            assert len(offering) == 1, "every target is scraped once"
            assert offering[0]["metadata"]["name"].endswith("-admin")
            assert endpoint["path"] == "/metrics"
            assert endpoint["honorLabels"] is True  # ours has a label `endpoint`, which is the operator's, too
    for item in chart.of_kind(manifests, "PodMonitor"):
        found = [pod for pod in chart.pods(manifests) if chart.selects(item["spec"]["selector"], pod.labels)]
        assert found
        for pod in found:
            for endpoint in item["spec"]["podMetricsEndpoints"]:
                assert endpoint["port"] in ports(pod)


@pytest.mark.parametrize("name", ["defaults", "cpu", "existing-vllm", "autoscaling"])
def test_custom_objects_are_left_out_where_the_cluster_does_not_know_them(name: str) -> None:
    values = CASES[name]
    bare = chart.Values(values.set, values.presets, custom_kinds=False)
    kinds = {item["kind"] for item in chart.rendered(values)} & OWN_KINDS
    assert {"ServiceMonitor", "PrometheusRule"} <= kinds
    assert {item["kind"] for item in chart.rendered(bare)} & (OWN_KINDS - {"HTTPRoute", "ScaledObject"}) == set()


def test_custom_objects_can_be_forced_and_forbidden() -> None:
    forced = {item["kind"] for item in chart.rendered(CASES["forced-monitoring"])}
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= forced
    assert {item["kind"] for item in chart.rendered(CASES["no-monitoring"])} & OWN_KINDS == set()


def test_extra_objects_are_templates() -> None:
    found = chart.named(chart.rendered(CASES["extra-objects"]), "ConfigMap", "depo-extra")
    assert found["data"] == {"namespace": "models"}
