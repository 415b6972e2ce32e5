"""The two Dockerfiles: linted, and they agree with the rest of the repository."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from depo_gateway import __version__
from tests import container
from tests.container import DOCKERFILES, ROOT, USER

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_hadolint_has_nothing_to_say(kind: str) -> None:
    program = Path(sys.executable).parent / "hadolint"
    linted = subprocess.run([program, DOCKERFILES[kind]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_a_dockerfile_says_what_the_rest_of_the_repository_says(kind: str) -> None:
    recipe = container.read(DOCKERFILES[kind])
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=docker\.io/library/python:(\d+\.\d+)\.\d+-slim-\w+$", recipe.text, re.M)
    assert f"Programming Language :: Python :: {base}" in PROJECT["classifiers"]
    assert set(re.findall(r"^FROM (\S+)", recipe.text, re.M)) == {"${PYTHON_IMAGE}"}
    chart = yaml.safe_load((ROOT / "helm/Chart.yaml").read_text())
    assert re.findall(r"^ARG VERSION=(.+)$", recipe.text, re.M) == [__version__] == [chart["appVersion"]]
    assert re.findall(r"^USER (.+)$", recipe.text, re.M) == [f"{USER}:{USER}"]  # by number: runAsNonRoot asks for it
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", recipe.text, re.M)
    assert json.loads(entry)[0] in PROJECT["scripts"]
    assert recipe.install[1] == kind
    directory, sbom = recipe.install[2:]  # what is installed is what the last stage takes, to the same places
    taken = re.findall(r"^COPY --from=build (\S+) (\S+)$", recipe.text, re.M)
    assert set(taken) == {(directory, directory), (str(Path(sbom).parent), str(Path(sbom).parent))}


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_the_context_holds_what_is_copied_and_no_more(kind: str) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert let_in == set(container.read(DOCKERFILES[kind]).copied)
