"""Imports point one way, gateway -> estimator <- training; no cycles; serving needs no torch."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"gateway": {"estimator"}, "estimator": set(), "training": {"estimator"}}
# Each sub-package of training imports only those before it; online and rl don't know each other.
ORDER = ("rewards", "judging", "outcomes", "evaluation", "fitting", "online", "rl", "commands")
FORBIDDEN = {
    "estimator": {"fastapi", "starlette", "uvicorn", "aiohttp", "trl", "vllm"},
    "gateway": {"torch", "transformers", "trl", "vllm"},
}
HEAVY = {"torch", "transformers", "onnx", "matplotlib"}
COMMAND_PROTOCOL = {"add_arguments", "main", "run"}
SERVING = ("gateway.__main__", "gateway.server", "gateway.demo.run")
LEARNER_SETTINGS = ("training.online.settings", "training.online.daemon", "training.commands.collect")


def modules() -> dict[str, Path]:
    """Every module of the product by its name below depo_gateway."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it, ours without `depo_gateway.`."""
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
                names.add(full if full.removeprefix("depo_gateway.") in known else node.module)
    return {name.removeprefix("depo_gateway.") for name in names}


def test_our_packages_are_imported_by_their_installed_names() -> None:
    """`import gateway` would find the folder in a checkout, a second copy of it, and nothing once installed."""
    pattern = re.compile(rf"^ *(?:import|from) (?:{'|'.join(PACKAGES)})\b", re.MULTILINE)
    for folder in (*PACKAGES, "benchmarks", "dashboards", "docker", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.findall(path.read_text()), path


def test_packages_import_in_one_direction() -> None:
    for name, path in modules().items():
        package = name.split(".")[0]
        for imported in imports(path):
            top = imported.split(".")[0]
            assert top not in FORBIDDEN.get(package, set()), f"{name} imports {imported}"
            if top in PACKAGES and top != package:
                assert top in PACKAGES[package], f"{name} imports {imported}"


def test_sub_packages_of_training_import_in_order() -> None:
    for name, path in modules().items():
        own = name.split(".")[1:2]
        for imported in imports(path):
            other = imported.split(".")[1:2]
            if name.startswith("training.") and imported.startswith("training.") and own != other and other != []:
                assert own != ["__main__"] or other == ["commands"], f"{name} imports {imported}"
                if own != ["__main__"]:
                    assert ORDER.index(other[0]) < ORDER.index(own[0]), f"{name} imports {imported}"
                assert (own, other) != (["rl"], ["online"]), f"{name} imports {imported}"


def test_nothing_imports_a_command() -> None:
    for name, path in modules().items():
        if name != "training.__main__":
            assert not [item for item in imports(path) if item.startswith("training.commands")], name


def test_every_folder_of_training_has_its_place_in_the_order() -> None:
    assert {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")} == set(ORDER)


def test_there_are_no_import_cycles() -> None:
    known = modules()
    graph = {name: {item for item in imports(path) if item in known and item != name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_public_names_are_unique_within_a_package() -> None:
    """Classes and functions; each command has its own `run`, `add_arguments` and `main`."""
    homes = defaultdict(set)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and not node.name.startswith("_") and node.name not in COMMAND_PROTOCOL:
                homes[name.split(".")[0], node.name].add(name)
    assert not {key: sorted(places) for key, places in homes.items() if len(places) > 1}


def test_error_classes_end_in_error() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                is_error = any(base.endswith(("Error", "Exception")) for base in bases)
                assert not is_error or node.name.endswith("Error"), f"{name}.{node.name}"


def test_the_demo_alone_needs_aiohttp() -> None:
    """The base install, and so the serving image, has none."""
    for name, path in modules().items():
        if name.startswith(("gateway", "estimator")) and name != "gateway.demo.run":
            assert "aiohttp" not in {item.split(".")[0] for item in imports(path)}, name


@pytest.mark.parametrize("names", [SERVING, LEARNER_SETTINGS], ids=["serving", "learner"])
def test_serving_and_the_learner_settings_import_nothing_heavy(names: tuple[str, ...]) -> None:
    script = "; ".join(f"import depo_gateway.{name}" for name in names) + "; import sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & set(loaded.stdout.split())


def test_the_packages_links_lead_to_the_folders() -> None:
    """depo_gateway/ holds no code but its own __init__: each part is a link to the folder at the top."""
    for package in PACKAGES:
        assert (ROOT / "depo_gateway" / package).resolve() == ROOT / package


def test_every_folder_of_code_is_a_package() -> None:
    """Else the wheel would leave it out."""
    for package in PACKAGES:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
