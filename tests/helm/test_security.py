"""Pod Security "restricted", closed networks, no tokens and no secrets, in every way to install the chart."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.helm import chart
from tests.helm.cases import CASES
from tests.helm.chart import Manifest, Pod

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


def violations(pod: Pod) -> list[str]:
    """What Pod Security's levels "baseline" and "restricted" say against a pod."""
    found = []
    spec, general = pod.spec, pod.spec.get("securityContext", {})
    found += [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [volume["name"] for volume in spec.get("volumes", []) if not set(volume) - {"name"} <= VOLUMES]
    if general.get("sysctls"):
        found.append("sysctls")
    for container in pod.containers:
        own = container.get("securityContext", {})
        name = container["name"]
        if own.get("privileged"):
            found.append(f"{name}: privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: capabilities")
        if own.get("runAsNonRoot", general.get("runAsNonRoot")) is not True:
            found.append(f"{name}: runAsNonRoot")
        if own.get("runAsUser", general.get("runAsUser")) == 0:
            found.append(f"{name}: runAsUser")
        if own.get("seccompProfile", general.get("seccompProfile", {})).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            found.append(f"{name}: seccompProfile")
        if own.get("procMount", "Default") != "Default":
            found.append(f"{name}: procMount")
        found += [f"{name}: hostPort" for port in container.get("ports", []) if port.get("hostPort")]
    return found


@case
def test_every_pod_is_admitted_under_restricted(values: chart.Values) -> None:
    found = list(chart.pods(chart.rendered(values)))
    assert len(found) >= 2 or not values.set.get("test", {}).get("enabled", True)
    for pod in found:
        assert violations(pod) == [], pod.owner


def test_a_violation_is_seen() -> None:
    pod = next(iter(chart.pods(chart.rendered(CASES["defaults"]))))
    pod.main["securityContext"] = {"privileged": True}
    pod.spec["hostNetwork"] = True
    said = violations(pod)
    assert "hostNetwork" in said
    assert {line.partition(": ")[2] for line in said if ": " in line} >= {"privileged", "capabilities"}


@case
def test_roots_are_read_only_and_no_token_is_mounted(values: chart.Values) -> None:
    manifests = chart.rendered(values)
    for pod in chart.pods(manifests):
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        assert pod.spec["enableServiceLinks"] is False, pod.owner
        for container in pod.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, f"{pod.owner} {container['name']}"
    for item in chart.of_kind(manifests, "ServiceAccount"):
        assert item["automountServiceAccountToken"] is False
    assert chart.of_kind(manifests, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret") == []
    hooks = [item for item in manifests if "helm.sh/hook" in item["metadata"].get("annotations", {})]
    assert {item["metadata"]["annotations"]["helm.sh/hook"] for item in hooks} <= {"test"}


@case
def test_every_container_says_what_it_needs(values: chart.Values) -> None:
    for pod in chart.pods(chart.rendered(values)):
        for container in pod.containers:
            for key in ("cpu", "memory"):
                assert key in container["resources"]["requests"], f"{pod.owner} {container['name']} {key}"
            assert "memory" in container["resources"]["limits"], f"{pod.owner} {container['name']}"
            # vLLM has none: it would stop the scheduler while the GPU waits
            assert "cpu" in container["resources"]["limits"] or pod.component == "backend"


def test_pods_can_be_run_by_the_user_that_a_cluster_gives_them() -> None:
    for pod in chart.pods(chart.rendered(CASES["openshift"])):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod.spec["securityContext"]), pod.owner
        assert pod.spec["securityContext"]["runAsNonRoot"] is True


def test_no_service_account_is_made_where_there_is_one() -> None:
    manifests = chart.rendered(CASES["no-service-account"])
    assert chart.of_kind(manifests, "ServiceAccount") == []
    assert {pod.spec["serviceAccountName"] for pod in chart.pods(manifests)} == {"mine"}


def references(node: Any) -> set[str]:
    """Every Secret that some place names."""
    if isinstance(node, list):
        return {name for item in node for name in references(item)}
    if not isinstance(node, dict):
        return set()
    found = {node[key]["name"] for key in ("secretKeyRef", "secretRef") if key in node}
    if isinstance(node.get("secret"), dict):
        found.add(node["secret"].get("secretName") or node["secret"]["name"])
    return found | {name for item in node.values() for name in references(item)}


SECRETS: Mapping[str, Any] = {
    "auth": {"existingSecret": "the-keys", "key": "a.yaml"},
    "huggingFace": {"existingSecret": "the-hub", "key": "hub-token"},
    "backendDefaults": {"apiKey": {"existingSecret": "the-vllm", "key": "bearer"}},
    "records": {
        "kind": "postgresql",
        "postgresql": {"existingSecret": "the-database", "key": "address"},
        "hashKey": {"existingSecret": "the-hash", "key": "hmac"},
    },
    "test": {"apiKey": {"existingSecret": "the-test", "key": "client"}},
}


def variables(pod: Pod) -> dict[str, tuple[str, str]]:
    """Each variable from a Secret: the Secret's name and the key."""
    found = {}
    for variable in pod.main.get("env", []):
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            found[variable["name"]] = (reference["name"], reference["key"])
    return found


def test_each_pod_has_its_own_secrets_and_no_others() -> None:
    manifests = chart.rendered(chart.Values(SECRETS))
    backends = {f"DEPO_BACKEND_{pool}_API_KEY": ("the-vllm", "bearer") for pool in ("SMALL", "LARGE")}
    database = {"DEPO_DATABASE_URL": ("the-database", "address")}
    gateway, learner = chart.pod_of(manifests, "gateway"), chart.pod_of(manifests, "learner")
    assert variables(gateway) == backends | database | {"DEPO_HASH_KEY": ("the-hash", "hmac")}
    assert variables(learner) == backends | database
    assert references(gateway.spec) == {"the-keys", "the-vllm", "the-database", "the-hash"}
    assert references(learner.spec) == {"the-vllm", "the-database"}
    for pool in ("small", "large"):
        vllm = chart.pod_of(manifests, "backend", pool)
        assert variables(vllm) == {"HF_TOKEN": ("the-hub", "hub-token"), "VLLM_API_KEY": ("the-vllm", "bearer")}
        assert references(vllm.spec) == {"the-hub", "the-vllm"}
    assert list(variables(chart.pod_of(manifests, "test")).values()) == [("the-test", "client")]


def test_environment_of_the_files_is_the_pods() -> None:
    manifests = chart.rendered(chart.Values(SECRETS))
    for component, ending in (("gateway", "gateway.yaml"), ("learner", "learner.yaml")):
        text = chart.text_of(manifests, component, ending)
        named = set(re.findall(r"_env: (\S+)", text))
        assert len(named) >= 3
        assert named <= set(variables(chart.pod_of(manifests, component)))


@case
def test_nothing_secret_stands_in_a_manifest(values: chart.Values) -> None:
    for item in chart.rendered(values):
        text = json.dumps(item)
        assert not re.search(r"(postgresql|https?)(\+\w+)?://[^\"/ ]*:[^\"/ ]*@", text), chart.name_of(item)
        assert not re.search(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9]{8,})", text), chart.name_of(item)
    for pod in chart.pods(chart.rendered(values)):
        for container in pod.containers:
            for variable in container.get("env", []):
                if re.search(r"TOKEN|PASSWORD|SECRET|API_KEY|HASH_KEY|DATABASE", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], f"{pod.owner} {variable['name']}"


# --- networks


def policy_of(manifests: list[Manifest], pod: Pod) -> Manifest:
    (found,) = [
        item["spec"]
        for item in chart.of_kind(manifests, "NetworkPolicy")
        if chart.selects(item["spec"]["podSelector"], pod.labels)
    ]
    return found


def admits(rules: list[Manifest], side: str, port: int, peer: Pod) -> bool:
    """Whether a rule admits TCP on the port from or to a pod of the same namespace."""
    for rule in rules:
        numbers = [(item.get("port"), item.get("protocol", "TCP")) for item in rule.get("ports", [])]
        if numbers and (port, "TCP") not in numbers:
            continue
        if side not in rule:
            return True
        for term in rule[side]:
            if "ipBlock" in term:
                continue
            here = "namespaceSelector" not in term
            anywhere = term.get("namespaceSelector") == {}
            if (here or anywhere) and chart.selects(term.get("podSelector", {}), peer.labels):
                return True
    return False


def reaches(manifests: list[Manifest], source: Pod, target: Pod, port: int) -> bool:
    out = admits(policy_of(manifests, source)["egress"], "to", port, target)
    return out and admits(policy_of(manifests, target).get("ingress", []), "from", port, source)


@case
def test_every_pod_has_one_policy_for_both_directions(values: chart.Values) -> None:
    manifests = chart.rendered(values)
    if not values.set.get("networkPolicy", {}).get("enabled", True):
        assert chart.of_kind(manifests, "NetworkPolicy") == []
        return
    for pod in chart.pods(manifests):
        policy = policy_of(manifests, pod)
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}, pod.owner
        dns = [{"protocol": kind, "port": port} for port in (53, 5353) for kind in ("UDP", "TCP")]
        assert {"ports": dns} in policy["egress"]
        open_ports = {port["containerPort"] for port in pod.main.get("ports", [])}
        admitted = {port["port"] for rule in policy.get("ingress", []) for port in rule["ports"]}
        assert admitted == open_ports, pod.owner
        for rule in policy["egress"]:
            assert rule.get("ports") or rule.get("to"), "a rule without either admits everything"


@case
def test_pods_reach_each_other_as_they_must_and_not_otherwise(values: chart.Values) -> None:
    manifests = chart.rendered(values)
    if not chart.of_kind(manifests, "NetworkPolicy"):
        return
    found = list(chart.pods(manifests))
    gateway = chart.pod_of(manifests, "gateway")
    serving, admin = (port["containerPort"] for port in gateway.main["ports"])
    for pod in found:
        if pod.component == "backend":
            assert reaches(manifests, gateway, pod, 8000)
            assert not reaches(manifests, pod, gateway, serving)
            assert not reaches(manifests, pod, gateway, admin)
        if pod.component == "learner":
            for backend in found:
                assert backend.component != "backend" or reaches(manifests, pod, backend, 8000)
            assert not reaches(manifests, pod, gateway, admin)
            assert not reaches(manifests, gateway, pod, 9100)
        if pod.component == "test":
            assert reaches(manifests, pod, gateway, serving)
            assert not reaches(manifests, pod, gateway, admin)
            for backend in found:
                assert backend.component != "backend" or not reaches(manifests, pod, backend, 8000)


def test_the_database_and_servers_elsewhere_can_be_reached() -> None:
    for name, port in (("postgresql", 5432), ("one-deployed", 443), ("other-pools", 8000)):
        manifests = chart.rendered(CASES[name])
        for component in ("gateway", "learner"):
            egress = policy_of(manifests, chart.pod_of(manifests, component))["egress"]
            assert any(port in [item["port"] for item in rule.get("ports", [])] and "to" not in rule for rule in egress)
    manifests = chart.rendered(CASES["every-learner-setting"])
    egress = policy_of(manifests, chart.pod_of(manifests, "learner"))["egress"]
    assert any(8443 in [item["port"] for item in rule.get("ports", [])] for rule in egress)
    defaults = policy_of(chart.rendered(CASES["defaults"]), chart.pod_of(chart.rendered(CASES["defaults"]), "gateway"))
    assert sorted(item["port"] for rule in defaults["egress"] for item in rule["ports"]) == [53, 53, 5353, 5353, 8000]


def test_metrics_are_for_prometheus() -> None:
    manifests = chart.rendered(CASES["defaults"])
    prometheus = Pod("", {"labels": {"app.kubernetes.io/name": "prometheus"}}, {})
    stranger = Pod("", {"labels": {"app": "shop"}}, {})
    for component, pool, port in (("gateway", None, 9000), ("learner", None, 9100), ("backend", "small", 8000)):
        ingress = policy_of(manifests, chart.pod_of(manifests, component, pool))["ingress"]
        assert admits(ingress, "from", port, prometheus), component
        assert not admits(ingress, "from", port, stranger), component
    ingress = policy_of(manifests, chart.pod_of(manifests, "gateway"))["ingress"]
    assert admits(ingress, "from", 8000, stranger)


def test_who_may_use_the_api_can_be_named() -> None:
    manifests = chart.rendered(CASES["closed-network"])
    gateway = chart.pod_of(manifests, "gateway")
    ingress = policy_of(manifests, gateway)["ingress"]
    assert not admits(ingress, "from", 8000, Pod("", {"labels": {"app": "shop"}}, {}))
    assert admits(ingress, "from", 8000, chart.pod_of(manifests, "test"))
    assert {"namespaceSelector": {"matchLabels": {"team": "apps"}}} in ingress[0]["from"]
    for component, pool in (("gateway", None), ("learner", None), ("backend", "small")):
        egress = policy_of(manifests, chart.pod_of(manifests, component, pool))["egress"]
        assert CASES["closed-network"].set["networkPolicy"]["egressExtra"][0] in egress
