"""pyproject.toml and constraints.txt: CI runs the newest release of what has an upper bound; the Pythons we name."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
]
BOUNDS = dict(found.groups() for each in REQUIREMENTS if (found := re.match(r"([\w-]+)\S*,<([\d.]+)", each)))
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.mark.parametrize("name", ["accelerate", "onnxruntime", "transformers", "trl", "uvicorn"])
def test_an_upper_bound_is_the_release_after_the_one_that_ci_runs(name: str) -> None:
    bound = [int(part) for part in BOUNDS[name].split(".")]
    tested = [int(part) for part in PINNED[name].split(".")[: len(bound)]]
    assert bound == [*tested[:-1], tested[-1] + 1], f"{name}: run `make lock`, then move the bound"


def test_ci_upgrades_what_serving_bounds() -> None:
    serving = {re.match(r"[\w-]+", each)[0] for each in PROJECT["dependencies"] if ",<" in each}  # type: ignore[index]
    (upgraded,) = re.findall(r"^bounded=\((.+)\)$", (ROOT / ".ci/newest").read_text(), re.MULTILINE)
    assert set(upgraded.split()) == serving


def test_the_newest_python_that_is_named_is_the_one_that_ci_runs() -> None:
    named = [item.rpartition(" ")[2] for item in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", item)]
    assert named == [f"3.{minor}" for minor in range(11, 11 + len(named))]
    assert f"\npython={named[-1]} " in (ROOT / ".ci/newest").read_text()
    assert PROJECT["requires-python"] == f">={named[0]}"
