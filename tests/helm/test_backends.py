"""vLLM pools, what scales them, the ways in from outside, what Prometheus and Grafana are given, and the presets."""

import json
import re
from typing import Any

import pytest
import yaml

from depo_gateway.gateway.upstream import CONNECTION_SECONDS
from tests.helm.chart import CHART, Manifest, Values, file_of, named, of_kind, pod_of, pods, refusal, rendered

FULL = "depo-depo-gateway"
SHARED = {"weights": {"accessMode": "ReadWriteMany"}}
SEVERAL = {
    "records": {"kind": "postgresql", "postgresql": {"existingSecret": "depo-database"}},
    "checkpoints": {"accessMode": "ReadWriteMany"},
}


def backend(values: dict[str, Any], pool: str = "small") -> Manifest:
    """The vLLM container of a pool."""
    return pod_of(rendered(Values(values)), "backend", pool).main


def environment(container: Manifest) -> dict[str, Any]:
    names = [item["name"] for item in container["env"]]
    assert len(names) == len(set(names)), f"a variable is set twice: {names}"
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


def secret(name: str, key: str) -> dict[str, Any]:
    return {"secretKeyRef": {"name": name, "key": key}}


def test_a_pool_is_served_by_vllm_with_a_gpu_of_its_own() -> None:
    pod = pod_of(rendered(Values()), "backend", "large")
    assert pod.main["args"][:5] == [
        "Qwen/Qwen2.5-7B-Instruct",
        "--host=0.0.0.0",
        "--port=8000",
        "--shutdown-timeout=60",
        "--scheduling-policy=priority",
    ]
    assert pod.main["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod.spec["terminationGracePeriodSeconds"] > 10 + 60
    startup = pod.main["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600
    pause = pod.main["lifecycle"]["preStop"]["exec"]["command"]
    assert pause == ["sleep", "10"]
    assert float(pause[1]) > 2 * CONNECTION_SECONDS, "a connection may outlive the pause"
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod.main["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    claim = volumes[mounts["/var/lib/vllm"]]["persistentVolumeClaim"]["claimName"]
    kept = named(rendered(Values()), "PersistentVolumeClaim", claim)
    assert kept["spec"]["resources"]["requests"]["storage"] == "40Gi"
    assert environment(pod.main)["HF_HOME"].startswith("/var/lib/vllm/")


def test_a_rollout_of_a_pool_needs_no_spare_gpu_and_has_time() -> None:
    spec = named(rendered(Values()), "Deployment", f"{FULL}-large")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert spec["progressDeadlineSeconds"] > 600


def test_the_gateway_asks_for_the_model_by_the_name_that_vllm_serves_it_under() -> None:
    values = Values({"config": {"pools": {"small": {"model": "tiny"}}}})
    manifests = rendered(values)
    assert "--served-model-name=tiny" in pod_of(manifests, "backend", "small").main["args"]
    assert not any("served" in word for word in pod_of(manifests, "backend", "large").main["args"])
    for component, file in (("gateway", "gateway.yaml"), ("learner", "learner.yaml")):
        pools = file_of(manifests, component, file)["pools"]
        assert pools["small"]["model"] == "tiny"
        assert pools["large"]["model"] == "Qwen/Qwen2.5-7B-Instruct"
        for pool in pools:
            host, port = re.fullmatch(r"http://(.*):(\d+)", pools[pool]["backends"][0]["url"]).groups()  # type: ignore[union-attr]
            ports = named(manifests, "Service", host)["spec"]["ports"]
            assert [item["port"] for item in ports] == [int(port)]


def test_ones_own_arguments_come_last_and_replace_the_default_ones() -> None:
    args = backend({"backends": {"small": {"args": ["--max-model-len=8192", "--quantization=fp8"]}}})["args"]
    assert args[-2:] == ["--max-model-len=8192", "--quantization=fp8"]
    assert not any("32768" in word for word in args)


def test_the_flag_of_the_drain_can_be_left_out_for_a_vllm_without_it() -> None:
    args = backend({"backendDefaults": {"shutdownSeconds": 0, "preStopSeconds": 0}})["args"]
    assert not any("shutdown" in word for word in args)
    assert "lifecycle" not in backend({"backendDefaults": {"preStopSeconds": 0}})


def test_pools_with_tools_parse_tool_calls() -> None:
    """vLLM answers 400 to `tool_choice: auto` without both flags."""
    manifests = rendered(Values())
    for pool, settings in file_of(manifests, "gateway", "gateway.yaml")["pools"].items():
        assert "tools" in settings["accepts"]
        args = pod_of(manifests, "backend", pool).main["args"]
        assert "--enable-auto-tool-choice" in args
        assert "--tool-call-parser=hermes" in args


def test_secrets_are_named_and_no_more() -> None:
    values = {
        "huggingFace": {"existingSecret": "hf", "key": "HF_TOKEN"},
        "backends": {"small": {"apiKey": {"existingSecret": "vllm-key", "key": "token"}}},
    }
    manifests = rendered(Values(values))
    small = environment(pod_of(manifests, "backend", "small").main)
    large = environment(pod_of(manifests, "backend", "large").main)
    assert small["HF_TOKEN"] == large["HF_TOKEN"] == secret("hf", "HF_TOKEN")
    assert small["VLLM_API_KEY"] == secret("vllm-key", "token")
    assert "VLLM_API_KEY" not in large
    for component in ("gateway", "learner"):
        assert environment(pod_of(manifests, component).main)["DEPO_BACKEND_SMALL_API_KEY"] == small["VLLM_API_KEY"]
    assert "HF_TOKEN" not in environment(backend({}))


def test_a_variable_of_ones_own_replaces_the_charts() -> None:
    variables = environment(backend({"backendDefaults": {"extraEnv": [{"name": "HF_HOME", "value": "/models"}]}}))
    assert variables["HF_HOME"] == "/models"
    own = {
        "huggingFace": {"existingSecret": "hf"},
        "backendDefaults": {"extraEnv": [{"name": "HF_TOKEN", "value": ""}]},
    }
    assert environment(backend(own))["HF_TOKEN"] == ""
    assert variables["HOME"] == "/tmp"


def test_weights_can_be_kept_elsewhere_or_not_at_all() -> None:
    values = {"backends": {"small": {"weights": {"existingClaim": "models"}}, "large": {"weights": {"enabled": False}}}}
    manifests = rendered(Values(values))
    claims = [item["metadata"]["name"] for item in of_kind(manifests, "PersistentVolumeClaim")]
    assert not any("weights" in name for name in claims)
    small, large = (pod_of(manifests, "backend", pool).spec["volumes"][0] for pool in ("small", "large"))
    assert small["persistentVolumeClaim"]["claimName"] == "models"
    assert large["emptyDir"] == {"sizeLimit": "40Gi"}


def test_several_replicas_of_a_pool_are_not_evicted_together() -> None:
    values = Values({"backends": {"large": {"replicas": 3, **SHARED}}})
    budgets = of_kind(rendered(values), "PodDisruptionBudget")
    assert [item["metadata"]["name"] for item in budgets] == [f"{FULL}-large"]
    assert budgets[0]["spec"]["selector"]["matchLabels"]["depo-gateway/pool"] == "large"
    assert "ReadWriteMany" in refusal(Values({"backends": {"large": {"replicas": 3}}}))


def test_a_server_that_runs_already_is_not_deployed() -> None:
    manifests = rendered(Values(presets=("existing-vllm",)))
    assert {pod.component for pod in pods(manifests)} == {"gateway", "learner", "test"}
    urls = [pool["backends"][0]["url"] for pool in file_of(manifests, "gateway", "gateway.yaml")["pools"].values()]
    assert urls == ["http://vllm-small:8000", "http://vllm-large:8000"]


# What scales


def declared() -> set[str]:
    """The names of the gateway's metrics, as it declares them."""
    return set(re.findall(r'"(gateway_\w+)"', (CHART.parent / "gateway" / "metrics.py").read_text()))


def test_pools_scale_on_what_waits_and_gateways_on_what_is_in_flight() -> None:
    values = Values(
        {
            "backendDefaults": {"keda": {"enabled": True, "waiting": 8}, **SHARED},
            "gateway": {"keda": {"enabled": True}},
            **SEVERAL,
        }
    )
    manifests = rendered(values)
    scaled = {item["metadata"]["name"]: item["spec"] for item in of_kind(manifests, "ScaledObject")}
    assert set(scaled) == {FULL, f"{FULL}-small", f"{FULL}-large"}
    jobs = jobs_of(manifests)
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"]["name"] == name
        assert "replicas" not in named(manifests, "Deployment", name)["spec"]
        (trigger,) = spec["triggers"]
        query = trigger["metadata"]["query"]
        metric, namespace, job = re.fullmatch(r'sum\(([\w:]+)\{namespace="(.*)",job="(.*)"\}\)', query).groups()  # type: ignore[union-attr]
        assert metric == "vllm:num_requests_waiting" or metric in declared()
        assert namespace == "models"
        assert job in jobs, "what KEDA asks for has the job that the monitors give"
        assert trigger["metadata"]["threshold"] == ("100" if name == FULL else "8")
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert spec["minReplicaCount"] < spec["maxReplicaCount"]


def test_the_hpa_looks_at_cpu_and_at_a_metric_that_there_is() -> None:
    values = Values({"gateway": {"autoscaling": {"enabled": True, "inFlight": 50}}, **SEVERAL})
    manifests = rendered(values)
    (scaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    cpu, in_flight = scaler["spec"]["metrics"]
    assert cpu["resource"]["target"]["averageUtilization"] == 70
    assert in_flight["pods"]["metric"]["name"] in declared()
    assert in_flight["pods"]["target"]["averageValue"] == "50"
    assert "replicas" not in named(manifests, "Deployment", FULL)["spec"]


# The ways in


@pytest.mark.parametrize(
    ("controller", "expected"),
    [
        (
            "nginx",
            {
                "nginx.ingress.kubernetes.io/proxy-body-size": "1048576",
                "nginx.ingress.kubernetes.io/proxy-buffering": "off",
                "nginx.ingress.kubernetes.io/proxy-read-timeout": "930",
                "nginx.ingress.kubernetes.io/proxy-send-timeout": "930",
            },
        ),
        (
            "f5",
            {
                "nginx.org/client-max-body-size": "1048576",
                "nginx.org/proxy-buffering": "False",
                "nginx.org/proxy-read-timeout": "930s",
                "nginx.org/proxy-send-timeout": "930s",
            },
        ),
        ("haproxy", {"haproxy-ingress.github.io/timeout-server": "930s", "haproxy.org/timeout-server": "930s"}),
        (
            "alb",
            {
                "alb.ingress.kubernetes.io/load-balancer-attributes": "idle_timeout.timeout_seconds=930",
                "alb.ingress.kubernetes.io/target-type": "ip",
                "alb.ingress.kubernetes.io/healthcheck-path": "/readyz",
            },
        ),
        ("other", None),
    ],
)
def test_an_ingress_waits_longer_than_the_gateway_and_buffers_nothing(
    controller: str, expected: dict[str, str] | None
) -> None:
    values = {
        "config": {"timeouts": {"total_s": 900}, "limits": {"body_bytes": 1048576}},
        "ingress": {"enabled": True, "controller": controller, "className": "edge", "host": "llm.example.com"},
    }
    manifests = rendered(Values(values))
    (ingress,) = of_kind(manifests, "Ingress")
    assert ingress["metadata"].get("annotations") == expected
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    service = named(manifests, "Service", path["backend"]["service"]["name"])
    assert path["backend"]["service"]["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    assert service["metadata"]["name"] == FULL, "the API, not the admin port"


def test_annotations_of_ones_own_add_and_replace() -> None:
    prefix = "nginx.ingress.kubernetes.io"
    own = {"a/b": "c", f"{prefix}/proxy-read-timeout": "60"}
    (ingress,) = of_kind(rendered(Values({"ingress": {"enabled": True, "annotations": own}})), "Ingress")
    assert ingress["metadata"]["annotations"] == {
        "a/b": "c",
        f"{prefix}/proxy-body-size": "4194304",
        f"{prefix}/proxy-buffering": "off",
        f"{prefix}/proxy-read-timeout": "60",
        f"{prefix}/proxy-send-timeout": "630",
    }


def test_a_route_waits_longer_than_the_gateway() -> None:
    values = {
        "config": {"timeouts": {"total_s": 599.5}},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["llm.example.com"]},
        "gateway": {"service": {"port": 8080}},
    }
    (route,) = of_kind(rendered(Values(values)), "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "630s", "backendRequest": "630s"}
    assert rule["backendRefs"] == [{"name": FULL, "port": 8080}]
    assert "parentRefs" in refusal(Values({"httpRoute": {"enabled": True}}))


# What Prometheus and Grafana are given


def jobs_of(manifests: list[Manifest]) -> set[str]:
    """The job labels that the monitors give."""
    found = set()
    for item in of_kind(manifests, "ServiceMonitor", "PodMonitor"):
        for endpoint in item["spec"].get("endpoints", item["spec"].get("podMetricsEndpoints")):
            found |= {rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"}
    return found


def test_monitors_name_ports_that_their_pods_have() -> None:
    manifests = rendered(Values())
    assert jobs_of(manifests) == {FULL, f"{FULL}-learner", f"{FULL}-small", f"{FULL}-large"}
    for monitor in of_kind(manifests, "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        taken = [pod for pod in pods(manifests) if wanted <= pod.labels.items()]
        assert taken
        assert all(endpoint["port"] in [port["name"] for port in pod.main["ports"]] for pod in taken)
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    ports = {
        item["metadata"]["name"]: [port["name"] for port in item["spec"]["ports"]]
        for item in of_kind(manifests, "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= item["metadata"]["labels"].items()
    }
    assert [name for name, names in ports.items() if endpoint["port"] in names] == [f"{FULL}-admin"]


def test_vllms_series_are_distinguished_by_pool() -> None:
    monitor = named(rendered(Values()), "PodMonitor", f"{FULL}-backends")
    first, *jobs = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    assert first == {"sourceLabels": ["__meta_kubernetes_pod_label_depo_gateway_pool"], "targetLabel": "pool"}
    assert {rule["regex"]: rule["replacement"] for rule in jobs} == {
        pool: f"{FULL}-{pool}" for pool in ("small", "large")
    }


def test_rules_are_the_files_and_alerts_can_be_left_out() -> None:
    files = [yaml.safe_load((CHART / "rules" / name).read_text()) for name in ("recording.yaml", "alerts.yaml")]
    (rule,) = of_kind(rendered(Values()), "PrometheusRule")
    assert rule["spec"]["groups"] == [group for file in files for group in file["groups"]]
    alerts = [item["alert"] for group in files[1]["groups"] for item in group["rules"]]
    values = {"monitoring": {"rules": {"runbookBaseUrl": "https://git.example.com/depo/", "disabled": alerts[:1]}}}
    (rule,) = of_kind(rendered(Values(values)), "PrometheusRule")
    left = [item for group in rule["spec"]["groups"] for item in group["rules"] if "alert" in item]
    assert [item["alert"] for item in left] == alerts[1:]
    for item in left:
        address = f"https://git.example.com/depo/docs/runbooks/{item['alert']}.md"
        assert item["annotations"]["runbook_url"] == address
    assert "DepoNoSuch," in refusal(Values({"monitoring": {"rules": {"disabled": [alerts[0], "DepoNoSuch"]}}}))


def test_dashboards_come_whole_and_with_the_sidecars_label() -> None:
    boards = {path.name: path.read_text() for path in (CHART / "dashboards").glob("*.json")}
    assert boards
    labelled = [
        item for item in of_kind(rendered(Values()), "ConfigMap") if "grafana_dashboard" in item["metadata"]["labels"]
    ]
    assert {name: text for item in labelled for name, text in item["data"].items()} == {
        f"depo-{name}": text for name, text in boards.items()
    }
    for item in labelled:
        assert item["metadata"]["annotations"] == {"grafana_folder": "DEPO"}
        assert all(json.loads(text)["uid"] for text in item["data"].values())
        assert len(json.dumps(item)) < 1 << 20, "a ConfigMap's most"
    none = rendered(Values({"monitoring": {"dashboards": {"enabled": False}}}))
    assert not any("grafana_dashboard" in item["metadata"]["labels"] for item in of_kind(none, "ConfigMap"))


def test_dashboards_lead_to_the_runbooks() -> None:
    """Their descriptions name pages; Grafana makes links of whole addresses."""
    values = {"monitoring": {"rules": {"runbookBaseUrl": "https://git.example.com/depo/"}}}
    maps = [
        item for item in of_kind(rendered(Values(values)), "ConfigMap") if "-dashboard-" in item["metadata"]["name"]
    ]
    text = "".join(text for item in maps for text in item["data"].values())
    assert text.count("https://git.example.com/depo/docs/runbooks/Depo") == text.count("docs/runbooks/") > 20


# The presets


def test_the_cpu_preset_wants_no_gpu_and_fits_a_laptop() -> None:
    manifests = rendered(Values(presets=("cpu",)))
    assert "nvidia.com/gpu" not in json.dumps(manifests)
    memory = 0.0
    for pod in pods(manifests):
        if pod.component != "test":
            amount = pod.main["resources"]["limits"]["memory"]
            memory += float(amount.removesuffix("Gi"))
    assert memory <= 12
    for pool in ("small", "large"):
        container = pod_of(manifests, "backend", pool).main
        assert container["image"].startswith("vllm/vllm-openai-cpu:")
        assert environment(container)["OMP_NUM_THREADS"] == container["resources"]["limits"]["cpu"]
        context = file_of(manifests, "gateway", "gateway.yaml")["pools"][pool]["context_tokens"]
        assert f"--max-model-len={context}" in container["args"]


def test_in_the_production_preset_nothing_hangs_on_one_pod_or_node() -> None:
    manifests = rendered(Values(presets=("production",)))
    config = file_of(manifests, "gateway", "gateway.yaml")
    assert config["auth"] == {"keys_file": "/etc/depo-gateway/keys/keys.yaml"}
    assert config["records"]["url_env"] == "DEPO_DATABASE_URL"
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    scaled = {item["spec"]["scaleTargetRef"]["name"]: item["spec"] for item in of_kind(manifests, "ScaledObject")}
    for name in (FULL, f"{FULL}-small", f"{FULL}-large"):
        assert scaled[name]["minReplicaCount"] >= 2
        assert named(manifests, "PodDisruptionBudget", name)["spec"]["maxUnavailable"] == 1
        assert named(manifests, "Deployment", name)["spec"]["strategy"]["type"] == "RollingUpdate"


@pytest.mark.parametrize("name", ["cpu", "existing-vllm", "production"])
def test_a_preset_names_every_secret_in_its_head(name: str) -> None:
    head = (CHART / f"values-{name}.yaml").read_text().split("\n\n")[0]
    manifests = rendered(Values(presets=(name,)))
    wanted = set(
        re.findall(r'"(?:secretKeyRef|secret)": \{[^}]*"(?:name|secretName)": "([\w-]+)"', json.dumps(manifests))
    )
    assert {secret for secret in wanted if f"secret generic {secret} " not in head} == set()
