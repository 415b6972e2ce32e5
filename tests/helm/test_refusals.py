"""Values that contradict each other are refused in a sentence that names the remedy."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helm import chart
from tests.helm.cases import KEYS, MANY, POSTGRESQL, SHARED, UNRECORDED
from tests.helm.chart import Values, merged, nested

TWO = {"gateway": {"replicas": 2}}
IMAGE = {"checkpoints": {"kind": "image"}}
NO_LEARNER = {"learner": {"enabled": False}}
OPENED = {"config": {"pools": {"huge": {"cost": 50}}}}
MISPLACED = [  # a key that belongs elsewhere, what is written, the remedy
    ("huggingFace.token", "hf_x", "existing Secret that holds it in huggingFace.existingSecret"),
    (
        "records.postgresql.url",
        "postgresql://u:p@h/d",
        "existing Secret that holds it in records.postgresql.existingSecret",
    ),
    ("config.records.url", "postgresql://u:p@h/d", "records.postgresql.existingSecret"),
    ("config.auth.keys_file", "/k", "auth.existingSecret"),
    ("auth.keys", [{"name": "a", "sha256": "0" * 64}], "config.auth.keys"),
    ("config.pools.small.backends", [{"url": "http://a"}], "backends.small.url with backends.small.deploy: false"),
]
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [  # what each is, the values, words of the sentence
    ("replicas on SQLite", merged(SHARED, TWO), ["2 gateways", "SQLite", "records.kind: postgresql"]),
    (
        "replicas on one node's volume",
        merged(POSTGRESQL, TWO),
        ["2 gateways", "ReadWriteOnce", "checkpoints.accessMode: ReadWriteMany", "checkpoints.kind: image"],
    ),
    (
        "replicas on SQLite without checkpoints",
        merged(merged(IMAGE, NO_LEARNER), TWO),
        ["2 gateways", "SQLite", "records.kind: postgresql"],
    ),
    (
        "autoscaling on SQLite",
        merged(SHARED, {"gateway": {"autoscaling": {"enabled": True}}}),
        ["10 gateways", "SQLite", "records.kind: postgresql"],
    ),
    (
        "KEDA on SQLite",
        merged(SHARED, {"gateway": {"keda": {"enabled": True, "maxReplicas": 7}}}),
        ["7 gateways", "SQLite"],
    ),
    (
        "autoscaling on one node's volume",
        merged(POSTGRESQL, {"gateway": {"autoscaling": {"enabled": True}}}),
        ["10 gateways", "checkpoints.accessMode: ReadWriteMany"],
    ),
    (
        "two autoscalers",
        merged(MANY, {"gateway": {"autoscaling": {"enabled": True}, "keda": {"enabled": True}}}),
        ["gateway.autoscaling and gateway.keda", "disable one"],
    ),
    (
        "autoscaling by nothing",
        merged(MANY, {"gateway": {"autoscaling": {"enabled": True, "cpu": None}}}),
        ["gateway.autoscaling.cpu", "gateway.autoscaling.inFlight"],
    ),
    (
        "fewer at most than at least",
        merged(MANY, {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}}}),
        ["gateway.autoscaling.minReplicas", "maxReplicas"],
    ),
    ("learner without records", {"config": {"records": None}}, ["learner.enabled", "config.records.prompts: full"]),
    (
        "learner without prompts",
        {"config": {"records": {"prompts": "none"}}},
        ["config.records.prompts: full", "learner.enabled: false"],
    ),
    (
        "learner with hashes alone",
        {"config": {"records": {"prompts": "hash"}}, "records": {"hashKey": {"existingSecret": "h"}}},
        ["config.records.prompts: full"],
    ),
    ("learner without a volume", IMAGE, ["learner.enabled", "checkpoints.kind: pvc"]),
    (
        "scheduled learner without a volume",
        merged(IMAGE, {"learner": {"kind": "CronJob"}}),
        ["learner.enabled", "checkpoints.kind: pvc"],
    ),
    (
        "hashes without a key",
        merged(NO_LEARNER, {"config": {"records": {"prompts": "hash"}}}),
        ["config.records.prompts is hash", "records.hashKey.existingSecret"],
    ),
    (
        "PostgreSQL's address beside SQLite",
        nested("records.postgresql.existingSecret", "db"),
        ["records.kind: postgresql"],
    ),
    ("PostgreSQL without an address", {"records": {"kind": "postgresql"}}, ["records.postgresql.existingSecret"]),
    ("a pool without a backend", OPENED, ["config.pools.huge", "backends.huge"]),
    ("a backend without a pool", {"backends": {"huge": {"model": "m"}}}, ["backends.huge", "config.pools.huge"]),
    (
        "one pool",
        {"config": {"pools": {"small": None}}, "backends": {"small": None}},
        ["config.pools", "two or more"],
    ),
    ("no url", {"backends": {"small": {"deploy": False}}}, ["backends.small", "backends.small.url", "deploy: true"]),
    *((path, nested(path, value), [path, remedy]) for path, value, remedy in MISPLACED),
    *(
        (
            f"a pool called {name}",
            {"config": {"pools": {name: {"cost": 20}}}, "backends": {name: {"model": "m"}}},
            [f"config.pools.{name} ", why],
        )
        for name, why in (
            ("Medium", "lower-case letters"),
            ("mid_size", "lower-case letters"),
            ("mid.size", "lower-case letters"),
            ("3b", "a letter first"),
            ("x" * 31, "up to 30"),
            ("auto", "requests routing"),
            ("auto-fast", "requests routing"),
            *((word, "its own objects") for word in ("admin", "learner", "checkpoints", "records", "test")),
            ("small-shared", "its own objects"),
            ("small-single", "its own objects"),
            *((word, "not a name in YAML") for word in ("on", "no", "off", "null")),  # true, false: in a label
        )
    ),
    ("no keys", nested("config.auth", {}), ["config.auth is absent or empty", "auth.existingSecret"]),
    *(
        (f"the url {url}", {"backends": {"small": {"deploy": False, "url": url}}}, ["backends.small.url", remedy])
        for url, remedy in (
            ("vllm:8000", "write http://vllm:8000,"),
            ("10.0.0.7:8000/v1", "write http://10.0.0.7:8000/v1,"),
            ("ftp://vllm", "write http://HOST:PORT"),
            ("http://v llm", "write http://HOST:PORT"),
            ("http://user:pass@vllm", "apiKey.existingSecret"),
        )
    ),
    ("runbooks without a scheme", nested("monitoring.rules.runbookBaseUrl", "git.a.com"), ["http://git.a.com"]),
    (
        "Prometheus without a scheme",
        nested("monitoring.prometheusAddress", "prometheus:9090"),
        ["http://prometheus:9090"],
    ),
    ("a url beside vLLM", nested("backends.small.url", "http://a"), ["backends.small.deploy: false"]),
    ("no model", nested("backends.small.model", ""), ["backends.small.model"]),
    (
        "one model twice",
        nested("backends.large.model", "Qwen/Qwen2.5-1.5B-Instruct"),
        ["Qwen/Qwen2.5-1.5B-Instruct", "config.pools."],
    ),
    (
        "a model named as another pool",
        nested("config.pools.small.model", "large"),
        ["config.pools.small.model", "large"],
    ),
    (
        "a model that requests routing",
        nested("config.pools.small.model", "auto"),
        ["config.pools.small.model", "auto"],
    ),
    (
        "replicas on one node's weights",
        nested("backends.small.replicas", 2),
        ["backends.small.weights.accessMode: ReadWriteMany", "weights.enabled: false"],
    ),
    (
        "a pool scaled on one node's weights",
        nested("backends.small.keda.enabled", True),
        ["backends.small", "4 replicas", "ReadWriteMany"],
    ),
    (
        "three pools and the shipped estimator",
        merged(OPENED, {"backends": {"huge": {"model": "m"}}}),
        ["the shipped estimator scores two", "checkpoints.existingClaim"],
    ),
    (
        "three pools without a volume",
        merged(merged(OPENED, {"backends": {"huge": {"model": "m"}}}), merged(IMAGE, NO_LEARNER)),
        ["config.estimator.path"],
    ),
    (
        "a path beside the volume",
        nested("config.estimator.path", "/models/a"),
        ["config.estimator.path", "checkpoints.kind: image"],
    ),
    (
        "a target and a threshold",
        {"config": {"routing": {"threshold": 0.5, "target": {"cost": 0.5}}}},
        ["config.routing", "threshold", "target"],
    ),
    ("a judge that is no pool", nested("learner.config.judge.pool", "giant"), ["learner.config.judge.pool", "giant"]),
    ("no door at all", {"config": {"auth": None}}, ["config.auth", "auth.existingSecret", "none"]),
    ("a loopback address", nested("config.listen.host", "127.0.0.1"), ["config.listen.host", "0.0.0.0"]),
    ("a loopback address of the admin", nested("config.admin.host", "localhost"), ["config.admin.host", "0.0.0.0"]),
    ("one port twice", nested("config.admin.port", 8000), ["config.admin.port", "8000"]),
    ("a route to nowhere", nested("httpRoute.enabled", True), ["httpRoute.parentRefs"]),
    (
        "a target that no pool can meet",
        nested("config.routing.target", {"cost": 0.1}),
        ["config.routing.target.cost", "0.2"],
    ),
    (
        "overload to a pool that isn't",
        nested("config.routing.on_overload", "huge"),
        ["config.routing.on_overload", "huge"],
    ),
    (
        "unfamiliar prompts to a pool that isn't",
        nested("config.routing.unfamiliar", "huge"),
        ["config.routing.unfamiliar", "huge", "explore"],
    ),
    (
        "a webhook without an address",
        {"learner": {"config": {"judge": {"kind": "webhook"}}}},
        ["learner.config.judge.url"],
    ),
    (
        "a judge's pool that isn't asked",
        {"learner": {"config": {"judge": {"kind": "exact", "pool": "large"}}}},
        ["learner.config.judge.pool", "model"],
    ),
    (
        "KEDA without the gateway's metrics",
        merged(MANY, {"gateway": {"keda": {"enabled": True}}, **nested("monitoring.serviceMonitor.enabled", False)}),
        ["gateway.keda", "monitoring.serviceMonitor.enabled: auto"],
    ),
    (
        "KEDA without vLLM's metrics",
        merged(
            {"backends": {"large": {"keda": {"enabled": True}, "weights": {"enabled": False}}}},
            nested("monitoring.podMonitor.enabled", False),
        ),
        ["backends.large.keda", "monitoring.podMonitor.enabled: auto"],
    ),
    *(
        (
            f"the chart's {argument}",
            nested("backends.small.args", [argument]),
            ["which the chart sets: remove it", remedy],
        )
        for argument, remedy in (
            ("--port=9000", "--port"),
            ("--host", "--host"),
            ("--served-model-name=a", "config.pools.small.model"),
            ("--shutdown-timeout=5", "backends.small.shutdownSeconds"),
            ("--scheduling_policy=fcfs", "--scheduling-policy"),
            ("--api-key=sk-1", "backends.small.apiKey.existingSecret"),
        )
    ),
    *(
        (
            f"an amount of {text}",
            nested("backends.small.resources.limits.memory", text),
            [f"is {text},", "512Mi or 16Gi"],
        )
        for text in ("16 GB", "16GB", "sixteen", "16gi", "-1Gi")
    ),
    (
        "a GPU without its maker",
        nested("backends.small.resources.limits", {"gpu": 1}),
        ["limits.gpu", "nvidia.com/gpu"],
    ),
    *(
        (
            f"more {name} than its limit",
            {"gateway": {"resources": {"requests": {name: request}, "limits": {name: limit}}}},
            [f"gateway.resources.requests.{name} is {request}", f"which is {limit}"],
        )
        for name, request, limit in (
            ("cpu", "2", "500m"),
            ("cpu", 3, 2),
            ("cpu", "1001m", 1),
            ("memory", "2Gi", "2000M"),
            ("memory", "1025Ki", "1Mi"),
            ("memory", "1.5Gi", "1500Mi"),
        )
    ),
    (
        "more than the limit of all backends",
        nested("backends.large.resources.requests.memory", "33Gi"),
        ["backends.large.resources.requests.memory is 33Gi"],
    ),
]


@pytest.mark.parametrize(("values", "words"), [entry[1:] for entry in REFUSED], ids=[entry[0] for entry in REFUSED])
def test_a_contradiction_is_refused_with_its_remedy(values: dict[str, Any], words: list[str]) -> None:
    message = chart.refusal(Values(values))
    for word in words:
        assert word in message
    said = [
        line for line in message.splitlines() if line and not line.startswith(("Error:", "Use --debug", "coalesce.go"))
    ]
    assert len(said) == 1 or "shipped estimator" in message, said
    for line in said:
        assert line.endswith("."), line
        assert "nil pointer" not in line


def test_every_key_that_the_schema_leaves_to_the_templates_is_refused() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())

    def keys(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (key for key, found in node.items() if found == {"$ref": "#/definitions/elsewhere"})
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from keys(inner)

    assert sorted(keys(schema)) == sorted(path.split(".")[-1] for path, *_ in MISPLACED)


def test_a_secret_is_not_repeated() -> None:
    values = merged(nested("huggingFace.token", "hf_x1"), nested("records.postgresql.url", "postgresql://u:x2@h/d"))
    message = chart.refusal(Values(merged(values, nested("monitoring.prometheusAddress", "http://u:x3@h"))))
    assert message.count("existingSecret") == 3
    assert not any(secret in message for secret in ("x1", "x2", "x3"))


def test_all_contradictions_are_reported_at_once() -> None:
    message = chart.refusal(Values(merged(TWO, {"config": {"records": {"prompts": "none"}}})))
    assert "SQLite" in message
    assert "checkpoints.accessMode" in message
    assert "config.records.prompts: full" in message


@pytest.mark.parametrize(
    "values",
    [
        merged(MANY, KEYS),
        merged(UNRECORDED, merged(IMAGE, TWO)),
        merged(POSTGRESQL, merged(IMAGE, merged(NO_LEARNER, TWO))),
        {"backends": {"small": {"replicas": 2, "weights": {"enabled": False}}}},
        {"config": {"routing": {"target": {"large_share": 0.3}}}},
        {"config": {"auth": None}, **KEYS},
        nested(
            "gateway.resources",
            {"requests": {"cpu": "1000m", "memory": "1024Ki"}, "limits": {"cpu": 1, "memory": "1Mi"}},
        ),
        nested("gateway.resources.limits", {"cpu": None, "hugepages-2Mi": "4Mi", "memory": None}),
        nested("backends.small", {"deploy": False, "url": "http://a", "args": ["--port=9000"]}),
    ],
)
def test_what_the_sentences_advise_is_taken(values: dict[str, Any]) -> None:
    assert chart.rendered(Values(values))
