"""A typing mistake in the values is refused by name, and so is a default taken away that the templates need."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, Values, nested, refusal, run

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
ENV_FALSE = [{"name": "VERBOSE", "value": False}]
MISTAKES = [  # path, value, what Helm's message holds
    ("replicas", 2, "Additional property replicas is not allowed"),
    ("gatway.replicas", 2, "Additional property gatway is not allowed"),
    ("config.routing.treshold", 0.5, "config.routing: Additional property treshold is not allowed"),
    ("config.routing.threshold", 1.5, "config.routing.threshold: Must be less than or equal to 1"),
    ("config.routing.threshold", "0.5", "config.routing.threshold: Invalid type. Expected: number, given: string"),
    ("config.routing.rule", "best", 'config.routing.rule must be one of the following: "gain", "difficulty"'),
    (
        "config.routing.target",
        {"cost": 0.5, "large_share": 0.5},
        "config.routing.target: Must have at most 1 properties",
    ),
    ("config.routing.target", {"share": 0.5}, "config.routing.target: Additional property share is not allowed"),
    ("config.version", 2, "config.version does not match: 1"),
    ("config.listen.port", 80, "config.listen.port: Must be greater than or equal to 1024"),
    ("config.listen.port", 70000, "config.listen.port: Must be less than or equal to 65535"),
    ("config.timeout.drain_s", 5, "config: Additional property timeout is not allowed"),
    ("config.timeouts.drain_s", -1, "config.timeouts.drain_s: Must be greater than or equal to 0"),
    ("config.timeouts.drain_s", "60s", "config.timeouts.drain_s: Invalid type. Expected: number, given: string"),
    ("config.limits.body_bytes", "4Mi", "config.limits.body_bytes: Invalid type. Expected: integer, given: string"),
    ("config.pools.small.accepts", ["tools"], "config.pools.small.accepts: At least one of the items must match"),
    ("config.pools.small.accepts", ["text", "video"], "config.pools.small.accepts.1 must be one of the following"),
    ("config.pools.small.cost", "cheap", "config.pools.small.cost: Invalid type. Expected: number, given: string"),
    ("config.pools.mid size", {"cost": 2}, 'config.pools: Property name of "mid size" does not match'),
    ("backends.mid/size", {"model": "m"}, 'backends: Property name of "mid/size" does not match'),
    ("config.auth", "open", "config.auth: Does not match pattern '^none$'"),
    ("config.auth", {"keys": [{"name": "a", "sha256": "sk-123"}]}, "config.auth.keys.0.sha256: Does not match pattern"),
    ("config.records.prompts", "all", 'config.records.prompts must be one of the following: "none", "hash", "full"'),
    ("auth.key", "", "auth.key: Does not match pattern"),
    ("huggingFace.tokens", "hf_x", "huggingFace: Additional property tokens is not allowed"),
    ("backends.small.deploy", "yes", "backends.small.deploy: Invalid type. Expected: boolean, given: string"),
    ("backends.small.replica", 2, "backends.small: Additional property replica is not allowed"),
    ("backends.small.image", "vllm/vllm-openai:latest", "backends.small.image: Invalid type. Expected: object"),
    ("backends.small.args", "--dtype=half", "backends.small.args: Invalid type. Expected: array, given: string"),
    ("backends.small.resources.limits.memory", 1.5, "backends.small.resources.limits.memory: Invalid type"),
    ("backends.small.sharedMemory", 8, "backends.small.sharedMemory: Invalid type. Expected: string, given: integer"),
    ("backends.small.weights.size", "20", "backends.small.weights.size: Does not match pattern"),
    ("backends.small.weights.accessMode", "RWX", "backends.small.weights.accessMode must be one of the following"),
    ("backends.small.keda.maxReplicas", 0, "backends.small.keda.maxReplicas: Must be greater than or equal to 1"),
    ("backendDefaults.deploy", False, "backendDefaults: Additional property deploy is not allowed"),
    ("backendDefaults", None, "(root): backendDefaults is required"),
    ("gateway.replicas", "3", "gateway.replicas: Invalid type. Expected: integer, given: string"),
    ("gateway.image.digest", "0" * 64, "gateway.image.digest: Does not match pattern"),
    ("gateway.image.pullPolicy", "always", "gateway.image.pullPolicy must be one of the following"),
    ("gateway.service", None, "gateway: service is required"),
    ("gateway.service.type", "ExternalName", "gateway.service.type must be one of the following"),
    ("gateway.pdb.maxUnavailable", "half", "gateway.pdb.maxUnavailable: Does not match pattern"),
    ("gateway.autoscaling.cpu", 150, "gateway.autoscaling.cpu: Must be less than or equal to 100"),
    ("gateway.extraEnv", ENV_FALSE, "gateway.extraEnv.0.value: Invalid type. Expected: string, given: boolean"),
    (
        "gateway.extraVolumes",
        [{"name": "a", "hostPath": {"path": "/"}}],
        "gateway.extraVolumes.0: Additional property hostPath is not",
    ),
    ("gateway.podLabels", {"-": "x"}, 'gateway.podLabels: Property name of "-" does not match'),
    ("commonLabels.team", "search & rank", "commonLabels.team: Does not match pattern"),
    ("gateway.podLabels", {"version": 2}, "gateway.podLabels.version: Invalid type. Expected: string, given: integer"),
    ("gateway.tolerations", [{"keys": "gpu"}], "gateway.tolerations.0: Additional property keys is not allowed"),
    (
        "gateway.podSecurityContext.runAsUser",
        0,
        "gateway.podSecurityContext.runAsUser: Must be greater than or equal to 1",
    ),
    ("gateway.securityContext.privileged", True, "gateway.securityContext.privileged does not match: false"),
    (
        "gateway.securityContext.capabilities",
        {"drop": ["NET_RAW"]},
        "gateway.securityContext.capabilities.drop: At least",
    ),
    ("learner.kind", "Job", 'learner.kind must be one of the following: "Deployment", "CronJob"'),
    ("learner.schedule", "daily", "learner.schedule: Does not match pattern"),
    ("learner.config.shadow.share", 5, "learner.config.shadow.share: Must be less than or equal to 1"),
    ("learner.config.records.url", "x", "learner.config: Additional property records is not allowed"),
    ("learner.config.refresh.learn.gate.lest", 50, "learner.config.refresh.learn.gate: Additional property lest"),
    ("checkpoints.kind", "s3", 'checkpoints.kind must be one of the following: "pvc", "image"'),
    ("records.kind", "mysql", 'records.kind must be one of the following: "sqlite", "postgresql"'),
    ("monitoring.rules.enabled", "yes", 'monitoring.rules.enabled must be one of the following: true, false, "auto"'),
    ("monitoring.serviceMonitor.interval", 15, "monitoring.serviceMonitor.interval: Invalid type. Expected: string"),
    ("networkPolicy.ingressFrom", [{}], "networkPolicy.ingressFrom.0: Must have at least 1 properties"),
    ("ingress.host", ["a", "b"], "ingress.host: Invalid type. Expected: string, given: array"),
    ("ingress.path", "/llm", 'ingress.path must be one of the following: "/", "/v1"'),
    ("httpRoute.parentRefs", ["edge"], "httpRoute.parentRefs.0: Invalid type. Expected: object, given: string"),
    ("nameOverride", "My_Router", "nameOverride: Does not match pattern"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), MISTAKES, ids=[f"{path}={value}"[:60] for path, value, _ in MISTAKES]
)
def test_a_mistake_is_refused_by_name(path: str, value: Any, said: str) -> None:
    message = refusal(Values(nested(path, value)))
    assert "values don't meet the specifications of the schema" in message
    assert said in message
    assert len(message.splitlines()) <= 6  # nothing beside it that would hide it


def defaults(node: Any, path: str = "") -> Iterator[str]:
    """The path of every key in values.yaml; a dot in a key is written twice."""
    for key, value in node.items():
        yield path + key.replace(".", "..")
        if isinstance(value, dict):
            yield from defaults(value, path + key.replace(".", "..") + ".")


@pytest.mark.slow
@pytest.mark.parametrize("path", list(defaults(DEFAULTS)))
def test_a_default_taken_away_is_refused_by_name_or_does_no_harm(path: str) -> None:
    """`null` takes a default away in Helm, and a template that reads what is not there fails in words of its own."""
    done = run("template", Values(nested(path, None)))
    if done.returncode:
        assert "nil pointer" not in done.stderr
        assert "error calling" not in done.stderr
        assert path.split(".")[-1] in done.stderr or path.split(".")[-2] in done.stderr
        return
    assert done.stderr == ""
    for line in done.stdout.splitlines():
        assert "<nil>" not in line
        assert "%!" not in line
        assert not re.search(r"^\s*-? *\w+: null$", line), line
