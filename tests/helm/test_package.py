"""The chart as it is shipped: packed, inside another chart, and within what Kubernetes stores of a release."""

import base64
import gzip
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.helm import chart
from tests.helm.cases import CASES
from tests.helm.chart import CHART, helm

SECRET_BYTES = 1024 * 1024  # the most that a Secret may hold, in which Helm keeps each revision
CONFIG_MAP_BYTES = 256 * 1024  # what `kubectl apply` can write down of an object in its annotation


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("package")
    done = helm("package", CHART, "--destination", place)
    assert done.returncode == 0, done.stderr
    (found,) = place.glob("*.tgz")
    return found


@pytest.mark.parametrize("name", ["defaults", "production", "cpu"])
def test_a_package_renders_as_the_directory_does(package: Path, name: str) -> None:
    packed = chart.run("template", CASES[name], chart=package)
    assert packed.stdout == chart.run("template", CASES[name]).stdout


def test_a_package_holds_the_chart_and_nothing_else(package: Path) -> None:
    with tarfile.open(package) as archive:
        names = {name.removeprefix("depo-gateway/") for name in archive.getnames()}
    assert {"Chart.yaml", "values.schema.json", "README.md", "values-production.yaml", "rules/alerts.yaml"} <= names
    strange = {name for name in names if Path(name).suffix not in {".yaml", ".tpl", ".txt", ".json", ".md", ".py"}}
    assert strange == {".helmignore"}


def test_it_works_inside_another_chart(tmp_path: Path, package: Path) -> None:
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / package.name).symlink_to(package)
    own = {"apiVersion": "v2", "name": "platform", "version": "1.0.0"}
    own["dependencies"] = [{"name": "depo-gateway", "version": "*", "repository": ""}]
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(own))
    values = {"global": {"region": "eu"}, "depo-gateway": {"gateway": {"service": {"port": 8080}}}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm("template", "depo", tmp_path, "--namespace=models")
    assert done.returncode == 0, done.stderr
    manifests = chart.parsed(done.stdout)
    assert chart.named(manifests, "Service", "depo-depo-gateway")["spec"]["ports"][0]["port"] == 8080
    assert chart.file_of(manifests, "gateway", "gateway.yaml") == chart.file_of(
        chart.rendered(CASES["no-operators"]), "gateway", "gateway.yaml"
    )
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"depo-gateway": {"gatway": {}}}))
    assert "Additional property gatway is not allowed" in helm("template", "depo", tmp_path).stderr


def test_a_release_fits_into_its_secret(package: Path) -> None:
    with tarfile.open(package) as archive:
        files = {item.name: archive.extractfile(item) for item in archive.getmembers() if item.isfile()}
        texts = {name: base64.b64encode(file.read()).decode() for name, file in files.items() if file is not None}
    for name in ("production", "every-setting"):
        manifest = chart.run("template", CASES[name]).stdout
        stored = base64.b64encode(gzip.compress(json.dumps({"chart": texts, "manifest": manifest}).encode()))
        assert len(stored) * 4 / 3 < SECRET_BYTES / 2, "Helm base64-encodes it twice; half for what users add"
        for item in chart.rendered(CASES[name]):
            assert len(json.dumps(item)) < CONFIG_MAP_BYTES, chart.name_of(item)
