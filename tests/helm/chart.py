"""The chart as Helm renders it, and what a rendered manifest says of its pods."""

import functools
import json
import pickle
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
HELM = Path(sysconfig.get_path("scripts")) / "helm"
CUSTOM_KINDS = (  # what a cluster with all operators says that it knows
    "monitoring.coreos.com/v1",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "keda.sh/v1alpha1",
    "keda.sh/v1alpha1/ScaledObject",
    "gateway.networking.k8s.io/v1",
    "gateway.networking.k8s.io/v1/HTTPRoute",
)
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Values:
    """One way to install the chart."""

    set: Mapping[str, Any] = field(default_factory=dict)  # what a user's own file holds
    presets: tuple[str, ...] = ()  # values-NAME.yaml before it
    release: str = "depo"
    custom_kinds: bool = True  # a cluster with Prometheus' operator, KEDA and the Gateway API

    def over(self, values: Mapping[str, Any]) -> "Values":
        """The same with some values changed."""
        return Values(merged(self.set, values), self.presets, self.release, self.custom_kinds)


@dataclass(frozen=True)
class Pod:
    """A pod as some object makes it."""

    owner: str  # Deployment/depo-gateway
    metadata: Manifest
    spec: Manifest

    @property
    def labels(self) -> dict[str, str]:
        return self.metadata.get("labels", {})

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def main(self) -> Manifest:
        return self.spec["containers"][0]

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=60, check=False)


def run(command: str, values: Values, *more: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
    """`helm COMMAND` of these values: template or lint."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(json.loads(json.dumps(values.set)), file)
        files = [f"--values={CHART / f'values-{name}.yaml'}" for name in values.presets] + [f"--values={file.name}"]
        if command == "lint":
            return helm("lint", "--strict", chart, *files, *more)
        kinds = [f"--api-versions={name}" for name in CUSTOM_KINDS if values.custom_kinds]
        return helm(command, values.release, chart, "--namespace=models", *files, *kinds, *more)


def rendered(values: Values, *more: str) -> list[Manifest]:
    """The manifests that these values give."""
    return pickle.loads(_rendered(json.dumps(vars(values)), *more)[0])


def warnings(values: Values) -> str:
    """What Helm says beside the manifests."""
    return _rendered(json.dumps(vars(values)))[1]


@functools.lru_cache(maxsize=256)
def _rendered(values: str, *more: str) -> tuple[bytes, str]:
    found = json.loads(values)
    found["presets"] = tuple(found["presets"])
    done = run("template", Values(**found), *more)
    assert done.returncode == 0, done.stderr
    return pickle.dumps(parsed(done.stdout)), done.stderr


def parsed(text: str) -> list[Manifest]:
    """The objects of a rendered chart. Most are the same in many cases, and read once."""
    parts = re.split(r"^---$", text, flags=re.MULTILINE)
    return [item for part in parts if (item := pickle.loads(_parsed(part)))]


@functools.cache
def _parsed(text: str) -> bytes:
    return pickle.dumps(yaml.load(text, _UniqueKeys))


class _UniqueKeys(yaml.CSafeLoader):
    """YAML that refuses a key written twice, of which Kubernetes would take one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key is written twice: {keys}"
        return super().construct_mapping(node, deep)


def refusal(values: Values) -> str:
    """What Helm says of values that it must refuse."""
    done = run("template", values)
    assert done.returncode == 1, f"taken: {values.set}"
    assert done.stdout == ""
    return done.stderr


def merged(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {
            key: merged(below[key], above[key])
            if key in below and key in above
            else (above if key in above else below)[key]
            for key in (*below, *(key for key in above if key not in below))
        }
    return above


def nested(path: str, value: Any) -> dict[str, Any]:
    """{a: {b: value}} of a.b; a dot in a key is written as two."""
    keys = [key.replace("\0", ".") for key in path.replace("..", "\0").split(".")]
    for key in reversed(keys):
        value = {key: value}
    return value


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [item for item in of_kind(manifests, kind) if item["metadata"]["name"] == name]
    return found


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    for item in manifests:
        if item["kind"] == "Pod":
            yield Pod(name_of(item), item["metadata"], item["spec"])
            continue
        spec = item.get("spec", {})
        if item["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if "template" in spec:
            yield Pod(name_of(item), spec["template"].get("metadata", {}), spec["template"]["spec"])


def pod_of(manifests: list[Manifest], component: str, pool: str | None = None) -> Pod:
    (found,) = [
        pod
        for pod in pods(manifests)
        if pod.component == component and (pool is None or pod.labels["depo-gateway/pool"] == pool)
    ]
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (or a Service's bare map) takes a pod with these labels."""
    match = selector.get("matchLabels", {}) if {"matchLabels", "matchExpressions"} & set(selector) else selector
    if any(labels.get(key) != value for key, value in match.items()):
        return False
    for term in selector.get("matchExpressions", []):
        inside = labels.get(term["key"]) in term.get("values", [])
        holds = {
            "In": inside,
            "NotIn": not inside,
            "Exists": term["key"] in labels,
            "DoesNotExist": term["key"] not in labels,
        }
        if not holds[term["operator"]]:
            return False
    return True


def file_of(manifests: list[Manifest], component: str, ending: str) -> Any:
    """The YAML of a ConfigMap's file, as the component's main container sees it mounted."""
    return yaml.safe_load(text_of(manifests, component, ending))


def text_of(manifests: list[Manifest], component: str, ending: str) -> str:
    pod = pod_of(manifests, component)
    for volume in pod.spec["volumes"]:
        for source in volume.get("projected", {}).get("sources", [volume]):
            if "configMap" in source:
                data = named(manifests, "ConfigMap", source["configMap"]["name"])["data"]
                for key, text in data.items():
                    if key.endswith(ending):
                        return text
    raise AssertionError(f"{pod.owner} mounts no {ending}")
