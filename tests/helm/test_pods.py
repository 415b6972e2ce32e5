"""What the values ask of pods, images, replicas and Services reaches them, and nothing that an API server refuses."""

from typing import Any

import pytest
import yaml

from tests.helm import chart
from tests.helm.cases import CASES
from tests.helm.chart import CHART


@pytest.mark.parametrize("name", ["pod-keys"])
@pytest.mark.parametrize(("component", "pool"), [("gateway", None), ("learner", None), ("backend", "small")])
def test_what_is_asked_of_pods_reaches_them(name: str, component: str, pool: str | None) -> None:
    asked = CASES[name].set["gateway"]
    pod = chart.pod_of(chart.rendered(CASES[name]), component, pool)
    assert asked["podLabels"].items() <= pod.labels.items()
    assert asked["podAnnotations"].items() <= pod.metadata["annotations"].items()
    for key in ("nodeSelector", "tolerations", "topologySpreadConstraints", "priorityClassName", "runtimeClassName"):
        assert pod.spec[key] == asked[key], key
    wanted = asked["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert wanted in pod.spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert pod.spec["securityContext"]["runAsUser"] == 20001
    assert pod.spec["securityContext"]["supplementalGroups"] == [4]
    assert pod.spec["securityContext"]["runAsNonRoot"] is True
    assert pod.main["securityContext"]["seccompProfile"]["localhostProfile"] == "depo.json"
    assert pod.main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert [entry for entry in asked["extraEnv"] if entry in pod.main["env"]] == asked["extraEnv"]
    assert pod.main["envFrom"] == asked["extraEnvFrom"]
    assert asked["extraVolumes"][0] in pod.spec["volumes"]
    assert asked["extraVolumeMounts"][0] in pod.main["volumeMounts"]


def test_images_are_named_by_tag_or_digest() -> None:
    manifests = chart.rendered(CASES["digests"])
    gateway = chart.pod_of(manifests, "gateway")
    assert gateway.main["image"].startswith("registry.example.com:5000/depo/gateway")
    assert gateway.main["image"].endswith("@sha256:" + "0" * 64)
    assert {container["image"] for container in gateway.containers} == {gateway.main["image"]}
    assert chart.pod_of(manifests, "learner").main["image"] == "depo-gateway/training:2.0.0"
    assert chart.pod_of(manifests, "learner").main["imagePullPolicy"] == "Always"
    assert chart.pod_of(manifests, "backend", "small").main["image"] == "vllm/vllm-openai@sha256:" + "1" * 64
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    default = chart.pod_of(chart.rendered(CASES["defaults"]), "gateway").main["image"]
    assert default == f"depo-gateway/gateway:{version}"


def test_replicas_are_spread_over_nodes_and_zones() -> None:
    pod = chart.pod_of(chart.rendered(CASES["three-replicas"]), "gateway")
    keys = {term["topologyKey"] for term in pod.spec["topologySpreadConstraints"]}
    assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    for term in pod.spec["topologySpreadConstraints"]:
        assert chart.selects(term["labelSelector"], pod.labels)


def test_a_disruption_budget_comes_with_more_than_one_replica() -> None:
    def budgets(name: str) -> list[str]:
        found = chart.of_kind(chart.rendered(CASES[name]), "PodDisruptionBudget")
        return [item["metadata"]["labels"]["app.kubernetes.io/component"] for item in found]

    assert budgets("defaults") == []
    assert budgets("three-replicas") == ["gateway"]
    assert budgets("autoscaling") == ["gateway"]
    assert budgets("backend-keys") == ["backend"]


def test_gateway_and_learner_share_a_node_exactly_where_a_volume_wants_it() -> None:
    def together(name: str, component: str) -> bool:
        pod = chart.pod_of(chart.rendered(CASES[name]), component)
        terms = (
            pod.spec.get("affinity", {})
            .get("podAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", [])
        )
        learner = chart.pod_of(chart.rendered(CASES[name]), "learner").labels
        gateway = chart.pod_of(chart.rendered(CASES[name]), "gateway").labels
        return any(
            term["topologyKey"] == "kubernetes.io/hostname"
            and chart.selects(term["labelSelector"], learner)
            and chart.selects(term["labelSelector"], gateway)
            for term in terms
        )

    def strategy(name: str) -> str:
        return chart.named(chart.rendered(CASES[name]), "Deployment", "depo-depo-gateway")["spec"]["strategy"]["type"]

    for name in ("defaults", "postgresql", "cron", "pod-keys"):
        assert together(name, "learner"), name
        assert strategy(name) == "Recreate"
    learner = chart.named(chart.rendered(CASES["three-replicas"]), "Deployment", "depo-depo-gateway-learner")
    assert (learner["spec"]["replicas"], learner["spec"]["strategy"]) == (1, {"type": "Recreate"})
    for name in ("three-replicas", "cron-postgresql"):
        assert not together(name, "learner"), name
        assert not together(name, "gateway"), name
        assert strategy(name) == "RollingUpdate"


def test_recreate_has_no_rolling_update() -> None:
    """The API server refuses one beside the other."""
    values = chart.Values({"backends": {"small": {"strategy": {"type": "Recreate"}}}})
    for item in chart.of_kind(chart.rendered(values), "Deployment"):
        strategy = item["spec"]["strategy"]
        assert strategy["type"] == "RollingUpdate" or strategy == {"type": "Recreate"}
    small = chart.named(chart.rendered(values), "Deployment", "depo-depo-gateway-small")
    assert small["spec"]["strategy"]["type"] == "Recreate"


@pytest.mark.parametrize(
    ("key", "value", "of"),
    [
        ("nodePort", 30080, {"NodePort", "LoadBalancer"}),
        ("externalTrafficPolicy", "Local", {"NodePort", "LoadBalancer"}),
        ("loadBalancerClass", "example.com/lb", {"LoadBalancer"}),
        ("loadBalancerSourceRanges", ["10.0.0.0/8"], {"LoadBalancer"}),
    ],
)
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_a_service_has_only_what_its_type_takes(kind: str, key: str, value: Any, of: set[str]) -> None:
    values = chart.Values({"gateway": {"service": {"type": kind, key: value}}})
    if kind not in of:
        done = chart.run("template", values)
        assert f"gateway.service.{key}" in done.stderr or (done.returncode == 0 and key not in done.stdout)
        return
    service = chart.named(chart.rendered(values), "Service", "depo-depo-gateway")
    assert value in (service["spec"].get(key), service["spec"]["ports"][0].get(key))


def test_labels_of_one_s_own_never_replace_the_chart_s() -> None:
    taken = {"app.kubernetes.io/name": "other", "app.kubernetes.io/component": "other", "depo-gateway/pool": "other"}
    values = chart.Values(
        {"commonLabels": taken, "gateway": {"podLabels": taken}, "backendDefaults": {"podLabels": taken}}
    )
    for item in chart.of_kind(chart.rendered(values), "Deployment"):
        selector, labels = item["spec"]["selector"], item["spec"]["template"]["metadata"]["labels"]
        assert "other" not in selector["matchLabels"].values()
        assert chart.selects(selector, labels)
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "depo-gateway"


@pytest.mark.parametrize(
    ("component", "section"), [("gateway", "gateway"), ("learner", "learner"), ("backend", "backendDefaults")]
)
def test_a_variable_of_one_s_own_replaces_the_chart_s(component: str, section: str) -> None:
    """Twice the same name is refused by a server-side apply."""
    own = [
        {"name": name, "value": "mine"}
        for name in ("HF_TOKEN", "HF_HOME", "OMP_NUM_THREADS", "DEPO_HASH_KEY", "DEPO_DATABASE_URL", "VLLM_API_KEY")
    ]
    values = chart.Values(
        {
            section: {"extraEnv": own},
            "huggingFace": {"existingSecret": "hf"},
            "records": {
                "kind": "postgresql",
                "postgresql": {"existingSecret": "db"},
                "hashKey": {"existingSecret": "hash"},
            },
            "backends": {"small": {"apiKey": {"existingSecret": "key"}}},
        }
    )
    pod = chart.pod_of(chart.rendered(values), component, "small" if component == "backend" else None)
    names = [variable["name"] for variable in pod.main["env"]]
    assert len(names) == len(set(names))
    assert [variable for variable in pod.main["env"] if variable in own] == own
