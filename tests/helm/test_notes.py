"""What `helm install` prints: `helm template` leaves it out, so a copy of the chart renders it as an object."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, helm


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chart") / "helm"
    shutil.copytree(CHART, place)
    notes = (place / "templates" / "NOTES.txt").read_text()
    (place / "templates" / "notes.yaml").write_text(
        '{{- define "notes" -}}' + notes + '{{- end }}\nnotes: {{ include "notes" . | toJson }}\n'
    )
    return place


def notes(chart: Path, tmp_path: Path, values: dict[str, Any], release: str = "depo") -> str:
    (tmp_path / "values.yaml").write_text(json.dumps(values))
    about = ("--namespace=models", f"--values={tmp_path / 'values.yaml'}", "--show-only=templates/notes.yaml")
    done = helm("template", release, chart, *about)
    assert done.returncode == 0, done.stderr
    printed: str = yaml.safe_load(done.stdout)["notes"]
    return printed


def test_the_curl_line_is_one(copy: Path, tmp_path: Path) -> None:
    printed = notes(copy, tmp_path, {})
    assert "port-forward svc/depo-depo-gateway 8000:80 &" in printed
    begin = printed.index("curl -i localhost")
    line = printed[begin : printed.index("'\n", begin) + 1]
    words = subprocess.run(
        ["sh", "-c", f'curl() {{ printf "%s\\n" "$@"; }}; {line}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[:2] == ["-i", "localhost:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "auto"
    assert not any("Authorization" in word for word in words)


def test_warns_of_an_open_gateway_and_of_stored_prompts(copy: Path, tmp_path: Path) -> None:
    printed = notes(copy, tmp_path, {})
    assert "WARNING: no keys are configured" in printed
    assert "auth.existingSecret=depo-keys" in printed
    assert "PRIVACY: prompts and answers are stored for 30 days in the volume depo-depo-gateway-records" in printed
    assert "config.records.prompts=none,learner.enabled=false" in printed


def test_warns_only_where_it_applies(copy: Path, tmp_path: Path) -> None:
    values = {"auth": {"existingSecret": "keys"}, "config": {"records": None}, "learner": {"enabled": False}}
    printed = notes(copy, tmp_path, values)
    assert "WARNING" not in printed
    assert "PRIVACY" not in printed
    assert '-H "Authorization: Bearer $KEY"' in printed
    printed = notes(copy, tmp_path, {"config": {"records": {"retention_days": 7}}})
    assert "stored for 7 days" in printed


def test_the_test_is_offered_where_it_can_pass(copy: Path, tmp_path: Path) -> None:
    assert "/v1\n\nTest it:\n\n  helm -n models test depo --logs\n\n" in notes(copy, tmp_path, {})
    keys: dict[str, Any] = {"auth": {"existingSecret": "keys"}}
    printed = notes(copy, tmp_path, keys)
    assert "test depo --logs" not in printed
    assert "--set test.apiKey.existingSecret=depo-test" in printed
    assert '--from-literal=api-key="$KEY"' in printed
    printed = notes(copy, tmp_path, keys | {"test": {"apiKey": {"existingSecret": "a"}}})
    assert "test depo --logs" in printed
    assert "depo-test" not in printed
    assert "helm test" not in notes(copy, tmp_path, keys | {"test": {"enabled": False}})


def test_commands_stand_on_lines_of_their_own(copy: Path, tmp_path: Path) -> None:
    lines = notes(copy, tmp_path, {"auth": {"existingSecret": "keys"}}).splitlines()
    commands = [line for line in lines if "kubectl " in line]
    assert "  kubectl -n models port-forward svc/depo-depo-gateway-admin 9000" in commands
    for command in commands:
        assert command.startswith("  kubectl -n models "), command
        assert not command.endswith((",", ".", ":")), command


def test_the_volumes_that_stay_are_named(copy: Path, tmp_path: Path) -> None:
    records, checkpoints = "depo-depo-gateway-records", "depo-depo-gateway-checkpoints"
    postgresql = {"kind": "postgresql", "postgresql": {"existingSecret": "db"}}
    image: dict[str, Any] = {"checkpoints": {"kind": "image"}, "learner": {"enabled": False}}
    for values, named in (
        ({}, f"{records} and {checkpoints}: delete these claims"),
        ({"records": postgresql}, f"{checkpoints}: delete this claim"),
        (image, f"{records}: delete this claim"),
        ({"checkpoints": {"existingClaim": "mine"}}, f"{records} and mine: delete"),
    ):
        assert f"`helm uninstall` leaves {named}" in notes(copy, tmp_path, values)
    assert "helm uninstall" not in notes(copy, tmp_path, image | {"records": postgresql})


def test_the_ingress_is_where_to_ask(copy: Path, tmp_path: Path) -> None:
    ingress = {"enabled": True, "host": "llm.example.com", "tls": [{"secretName": "tls", "hosts": ["llm.example.com"]}]}
    for path in ("/", "/v1"):
        printed = notes(copy, tmp_path, {"ingress": ingress | {"path": path}})
        assert "curl -i https://llm.example.com/v1/chat/completions" in printed
    printed = notes(copy, tmp_path, {"ingress": ingress})
    assert "curl -i https://llm.example.com/v1/chat/completions" in printed
    assert "8000:80" not in printed


def test_names_are_those_of_the_release(copy: Path, tmp_path: Path) -> None:
    printed = notes(copy, tmp_path, {"gateway": {"service": {"port": 8080}}}, release="my-depo-gateway")
    assert "rollout status deploy/my-depo-gateway " in printed
    assert "http://my-depo-gateway.models:8080/v1" in printed
    assert "svc/my-depo-gateway-admin 9000" in printed
