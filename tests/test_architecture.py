"""Arrows point one way, gateway -> estimator <- training; no cycles; serving needs no torch."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"gateway": {"estimator"}, "estimator": set(), "training": {"estimator"}}
FORBIDDEN = {
    "estimator": {"fastapi", "starlette", "uvicorn", "aiohttp", "trl", "vllm"},
    "gateway": {"torch", "transformers", "trl", "vllm"},
}
SERVING_ESTIMATOR = ("runtime", "text", "wide", "calibration", "checkpoint", "records", "settings", "standing", "store")
HEAVY = {"torch", "transformers", "onnx", "matplotlib"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it; `from a import b` counts as a.b where that is a module."""
    known = modules()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
    return names


def test_packages_import_in_one_direction() -> None:
    for name, path in modules().items():
        package = name.split(".")[0]
        for imported in imports(path):
            top = imported.split(".")[0]
            assert top not in FORBIDDEN.get(package, set()), f"{name} imports {imported}"
            if top in PACKAGES and top != package:
                assert top in PACKAGES[package], f"{name} imports {imported}"


def test_there_are_no_import_cycles() -> None:
    known = modules()
    graph = {name: {item for item in imports(path) if item in known and item != name} for name, path in known.items()}
    for name, needed in graph.items():  # a package's __init__ holds a version only; it joins no cycle
        graph[name] = {item for item in needed if item not in PACKAGES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_demo_alone_needs_aiohttp() -> None:
    """The base install, and so the serving image, has none."""
    for name, path in modules().items():
        if name.startswith(("gateway", "estimator")) and name != "gateway.demo":
            assert "aiohttp" not in {item.split(".")[0] for item in imports(path)}, name


@pytest.mark.parametrize("command", ["import gateway.__main__, gateway.server, gateway.demo"])
def test_serving_imports_nothing_heavy(command: str) -> None:
    script = f"{command}; import sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & set(loaded.stdout.split())


def test_the_serving_half_of_the_estimator_imports_no_torch() -> None:
    for name in SERVING_ESTIMATOR:
        assert not HEAVY & {item.split(".")[0] for item in imports(ROOT / "estimator" / f"{name}.py")}, name


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == set(PACKAGES)
