"""What an API server refuses, or a cluster does wrong, although each field is as the schema of its kind wants it."""

from typing import Any

import pytest

from tests.helm.chart import Values, merged, named, nested, of_kind, pod_of, pods, refusal, rendered


@pytest.mark.parametrize("none", [0, "0%"])
def test_a_rollout_that_could_replace_nothing_is_refused(none: Any) -> None:
    said = refusal(Values(nested("backends.small.strategy.rollingUpdate.maxUnavailable", none)))
    assert "backends.small.strategy.rollingUpdate has 0 for both maxSurge and maxUnavailable" in said


def test_more_gpus_are_one_value() -> None:
    """A request that isn't its limit is refused for all but CPU, memory and storage; without one it is the limit."""
    more = {"backends": {"large": {"resources": {"limits": {"nvidia.com/gpu": 2}}}}}
    found = {pod.owner: pod.main["resources"] for pod in pods(rendered(Values(more)))}
    assert found["Deployment/depo-depo-gateway-large"]["limits"]["nvidia.com/gpu"] == 2
    for owner, resources in found.items():
        for name, amount in resources["requests"].items():
            assert "/" not in name or amount == resources["limits"][name], owner


def test_a_resource_that_was_never_there_can_be_taken_away() -> None:
    """Helm leaves a null where there is no default; an API server reads it as 0, which for GPUs wants a limit of 0."""
    none = {"requests": {"nvidia.com/gpu": None}, "limits": {"nvidia.com/gpu": None}}
    for values in ({"backendDefaults": {"resources": none}}, {"backends": {"large": {"resources": none}}}):
        vllm = pod_of(rendered(Values(values)), "backend", "large").main["resources"]
        assert "nvidia.com/gpu" not in vllm["requests"] | vllm["limits"]
        assert set(vllm["limits"]) == {"memory"}


def test_a_label_named_twice_is_written_once() -> None:
    labels = {"release": "prometheus", "grafana_dashboard": "1", "app.kubernetes.io/part-of": "platform"}
    own = {
        name: {"enabled": True, "labels": labels} for name in ("serviceMonitor", "podMonitor", "rules", "dashboards")
    }
    manifests = rendered(Values(merged({"commonLabels": labels}, {"monitoring": own})))  # refuses a key written twice
    for item in of_kind(manifests, "ServiceMonitor", "PodMonitor", "PrometheusRule"):
        assert item["metadata"]["labels"]["release"] == "prometheus"


def test_sqlite_is_used_on_one_node_alone() -> None:
    """On a file system that many nodes mount, too: its locks can't be relied on between nodes."""
    anywhere = {"records": {"sqlite": {"accessMode": "ReadWriteMany"}}, "checkpoints": {"accessMode": "ReadWriteMany"}}
    manifests = rendered(Values(anywhere))
    for component in ("gateway", "learner"):
        term = pod_of(manifests, component).spec["affinity"]["podAffinity"]
        (term,) = term["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
    assert named(manifests, "Deployment", "depo-depo-gateway")["spec"]["strategy"] == {"type": "Recreate"}


def test_names_are_resolved_where_dns_pods_have_another_port_than_their_service() -> None:
    """Policies see packets as they are once a Service's address is the pod's; OpenShift's DNS pods listen on 5353."""
    for policy in of_kind(rendered(Values()), "NetworkPolicy"):
        opened = [(port["protocol"], port["port"]) for rule in policy["spec"]["egress"] for port in rule["ports"]]
        assert {(kind, port) for kind in ("UDP", "TCP") for port in (53, 5353)} <= set(opened), policy["metadata"][
            "name"
        ]
