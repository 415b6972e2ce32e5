"""Volumes outlive the values that made them: a claim that is there stays in the release, whatever is set later.

Without that `helm rollback` stops at "no PersistentVolumeClaim with the name ... found" (helm/helm#8228), and so does
an `upgrade --atomic` that fails. The chart asks the cluster; here a copy of it asks a file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.cases import MANY
from tests.helm.chart import CHART, Manifest, helm, of_kind

ASKS = 'lookup "v1" "PersistentVolumeClaim" .Release.Namespace ""'


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chart") / "helm"
    shutil.copytree(CHART, place)
    storage = place / "templates" / "storage.yaml"
    text = storage.read_text()
    assert text.count(ASKS) == 1
    storage.write_text(text.replace(ASKS, '.Files.Get "claims.yaml" | fromYaml'))
    return place


def claims(chart: Path, values: dict[str, Any], there: list[Manifest]) -> dict[str, Manifest]:
    """The claims that a revision with these values has, where `there` are in the namespace."""
    (chart / "claims.yaml").write_text(yaml.safe_dump({"kind": "PersistentVolumeClaimList", "items": there}))
    (chart / "own.yaml").write_text(json.dumps(values))
    done = helm("template", "depo", chart, "--namespace=models", f"--values={chart / 'own.yaml'}")
    assert done.returncode == 0, done.stderr
    found = of_kind([item for item in yaml.safe_load_all(done.stdout) if item], "PersistentVolumeClaim")
    names = [item["metadata"]["name"] for item in found]
    assert len(set(names)) == len(names)
    return {item["metadata"]["name"]: item for item in found}


def as_made(claim: Manifest, **metadata: Any) -> Manifest:
    """A claim as the cluster reports it, once Helm made it and a volume was bound."""
    spec = {"storageClassName": "standard"} | claim["spec"] | {"volumeName": "pvc-1", "volumeMode": "Filesystem"}
    owner = {"meta.helm.sh/release-name": "depo", "meta.helm.sh/release-namespace": "models"}
    annotations = claim["metadata"].get("annotations", {}) | owner
    return {"metadata": claim["metadata"] | {"annotations": annotations, "uid": "1"} | metadata, "spec": spec}


def test_what_was_made_stays(copy: Path) -> None:
    first = claims(copy, {}, [])
    assert set(first) == {
        f"depo-depo-gateway-{name}" for name in ("checkpoints", "records", "weights-small", "weights-large")
    }
    moved = {"backendDefaults": {"weights": {"accessMode": "ReadWriteMany"}}, **MANY}
    second = claims(copy, moved, [as_made(item) for item in first.values()])
    assert set(first) < set(second)
    assert {name.removesuffix("-shared") for name in second} == set(first)
    assert {name: second[name] for name in first} == first


def test_a_class_of_ones_own_stays_as_it_was_written(copy: Path) -> None:
    """Helm takes away a field that one revision has and the next has not, and nobody can change a claim's."""
    first = claims(copy, {"checkpoints": {"storageClass": "fast"}}, [])
    second = claims(copy, MANY, [as_made(item) for item in first.values()])
    assert first["depo-depo-gateway-checkpoints"]["spec"]["storageClassName"] == "fast"
    assert {name: second[name] for name in first} == first


def test_a_pool_that_went_leaves_its_weights(copy: Path) -> None:
    first = claims(copy, {}, [])
    gone = {
        "config": {"pools": {"small": None, "tiny": {"cost": 0.5}}},
        "backends": {"small": None, "tiny": {"model": "org/tiny"}},
    }
    second = claims(copy, gone, [as_made(item) for item in first.values()])
    assert set(second) - set(first) == {"depo-depo-gateway-weights-tiny"}
    assert second["depo-depo-gateway-weights-small"]["metadata"]["labels"]["depo-gateway/pool"] == "small"


def test_claims_of_others_and_those_that_are_going_are_left_alone(copy: Path) -> None:
    claim = claims(copy, {}, [])["depo-depo-gateway-records"]
    there = [
        as_made(claim, name="ours"),
        as_made(claim, name="another-release", annotations={"meta.helm.sh/release-name": "another"}),
        as_made(claim, name="not-helm", annotations=None),
        as_made(claim, name="by-hand", labels={"app.kubernetes.io/managed-by": "Helm"}),
        as_made(claim, name="bare", labels=None),
        as_made(claim, name="alias", labels=claim["metadata"]["labels"] | {"app.kubernetes.io/name": "alias"}),
        as_made(claim, name="going", deletionTimestamp="2026-01-01T00:00:00Z"),
    ]
    names = {item["metadata"]["name"] for item in there}
    assert names & set(claims(copy, {}, there)) == {"ours"}


def test_what_is_still_wanted_is_as_the_values_say(copy: Path) -> None:
    first = claims(copy, {}, [])
    second = claims(copy, {"checkpoints": {"size": "9Gi"}}, [as_made(item) for item in first.values()])
    assert set(second) == set(first)
    assert second["depo-depo-gateway-checkpoints"]["spec"]["resources"]["requests"]["storage"] == "9Gi"
    assert "storageClassName" not in second["depo-depo-gateway-checkpoints"]["spec"]


@pytest.mark.parametrize(
    ("there", "phase", "wanted", "written"),
    [
        ("20Gi", "Bound", "30Gi", "30Gi"),
        ("20Gi", "Bound", "20480Mi", "20480Mi"),
        ("20Gi", "Bound", "2Gi", "20Gi"),
        ("1Ti", "Bound", "500Gi", "1Ti"),
        ("21474836480", "Bound", "20G", "21474836480"),
        ("2Gi", "Pending", "20Gi", "2Gi"),
    ],
)
def test_a_volume_never_shrinks_nor_grows_before_it_is_bound(
    copy: Path, there: str, phase: str, wanted: str, written: str
) -> None:
    """The API server refuses both, and with them the whole upgrade: from the defaults to values-cpu.yaml, say."""
    claim = as_made(claims(copy, {}, [])["depo-depo-gateway-checkpoints"]) | {"status": {"phase": phase}}
    claim["spec"]["resources"] = {"requests": {"storage": there}}
    found = claims(copy, {"checkpoints": {"size": wanted}}, [claim])["depo-depo-gateway-checkpoints"]
    assert str(found["spec"]["resources"]["requests"]["storage"]) == written
