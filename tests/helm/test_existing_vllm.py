"""Before vLLM that runs already: what the preset and the manual tell its owner to write."""

import re

import yaml

from tests.helm import chart
from tests.helm.chart import CHART, ROOT, Values

PRESET = "existing-vllm"


def test_the_preset_shows_how_to_say_what_the_servers_take() -> None:
    text = (CHART / f"values-{PRESET}.yaml").read_text()
    for word in ("--max-model-len", "--enable-auto-tool-choice", "image"):
        assert word in text
    part = text.split("\n\n")[1]
    shown = yaml.safe_load(re.sub("^# ", "", part, flags=re.MULTILINE))
    assert set(shown) == {"config"}
    pools = chart.file_of(chart.rendered(Values(shown, (PRESET,))), "gateway", "gateway.yaml")["pools"]
    for name, pool in shown["config"]["pools"].items():
        assert set(pool) == {"context_tokens", "accepts"}
        assert {key: pools[name][key] for key in pool} == pool
        assert pool != chart.file_of(chart.rendered(Values()), "gateway", "gateway.yaml")["pools"][name]


def test_the_labels_in_the_manual_are_those_of_the_pods_that_ask() -> None:
    manual = (ROOT / "docs/operations/kubernetes.md").read_text()
    (said,) = re.findall(r"A policy of yours before vLLM in another namespace.+?\n\n", manual, re.DOTALL)
    keys = re.findall(r"`(app\.kubernetes\.io/\w+)`", said)
    components = set(re.findall(r"`(\w+)`", said))
    manifests = chart.rendered(Values(presets=(PRESET,)))
    pods = [pod for pod in chart.pods(manifests) if pod.component != "test"]
    assert components == {pod.component for pod in pods}
    for pod in pods:
        assert {key: pod.labels[key] for key in keys} == {
            "app.kubernetes.io/instance": "depo",
            "app.kubernetes.io/component": pod.component,
        }
