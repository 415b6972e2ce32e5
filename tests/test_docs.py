"""The documentation names what exists, and all of it."""

import argparse
import ast
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator.configuration import yaml_tree
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.openai.apis import APIS
from depo_gateway.training.commands import collect
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.rl.metrics import RunMetrics

ROOT = Path(__file__).parent.parent
OPERATIONS = {path.stem: path.read_text() for path in (ROOT / "docs/operations").glob("*.md")}
PLACES = (
    *("gateway", "estimator", "training", "depo_gateway", "benchmarks", "dashboards"),
    *("tests", "helm", "docs", "docker", "examples"),
)
FOUND = [*ROOT.glob("*.md"), *(path for place in PLACES for path in (ROOT / place).rglob("*.md"))]
DOCUMENTS = sorted(path for path in FOUND if "node_modules" not in path.parts)  # installed by a test of the chart


def test_the_loop_of_depo_md_runs() -> None:
    (section,) = re.findall(r"^## In a loop of your own$(.*?)^## ", (ROOT / "docs/depo.md").read_text(), re.M | re.S)
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    exec(compile(block, "docs/depo.md", "exec"), {})


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def settings(kind: Any = config.Config, prefix: str = "") -> Iterator[str]:
    """Every key of the config tree, as the documentation writes it."""
    for name, hint in typing.get_type_hints(kind).items():
        key, inner = prefix + yaml_tree.key_of(name), hint
        if typing.get_origin(hint) is Mapping:
            key, inner = f"{key}.NAME", typing.get_args(hint)[1]
        elif typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)[0]
            key += "[]" if dataclasses.is_dataclass(inner) else ""
        elif options := [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]:
            inner = options[0]
        if dataclasses.is_dataclass(inner):
            yield from settings(inner, key + ".")
        else:
            yield key


def metrics() -> dict[str, set[str]]:
    """Every metric's name, as Prometheus shows it, and its labels."""
    names = {}
    registries = [Metrics("0").registry, LearnerMetrics("0").registry, RunMetrics("0").registry]
    for metric in [metric for registry in registries for metric in registry._collector_to_names]:
        name = metric._name + ("_total" if metric._type == "counter" else "")
        names[name] = set(metric._labelnames)
    return names


def table_of(page: str) -> str:
    """The table of all settings on a page."""
    return OPERATIONS[page].split("## All settings")[1].split("\n## ")[0]


def test_every_setting_is_documented() -> None:
    known = list(settings())
    assert {"version", "pools.NAME.backends[].api_key_env", "auth.keys[].sha256", "timeouts.drain_s"} <= set(known)
    table = table_of("settings")
    missing = [key for key in known if f"`{key}`" not in table]
    assert not missing


def test_no_setting_is_documented_that_does_not_exist() -> None:
    table = table_of("settings")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert named - set(settings()) == {"pools.NAME"}


def test_every_setting_of_the_learner_is_documented_and_no_other() -> None:
    known = set(settings(learner_settings.LearnerSettings))
    assert {"shadow.share", "pools.NAME.backends[].url", "refresh.learn.gate.least", "listen.port"} <= known
    table = table_of("learner")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`([^`]+)`", row)} == known


def test_every_flag_of_collect_is_documented_and_no_other() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    collect.add_arguments(parser)
    table = OPERATIONS["collect"].split("## All flags")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(--[a-z-]+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(flag for action in parser._actions for flag in action.option_strings)


def test_every_metric_is_documented_with_its_labels() -> None:
    for name, labels in metrics().items():
        found = re.search(rf"^\| `{name}(?:\{{([a-z_,]+)\}})?` \|", OPERATIONS["metrics"], re.MULTILINE)
        assert found is not None, name
        assert set((found[1] or "").split(",")) - {""} == labels, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_metric_named_exists(path: Path) -> None:
    shown = re.findall(r"\b(?:Counter|Gauge|Histogram)\(\n?\+? *\"(\w+)\"", path.read_text())  # by a recipe
    known = {*metrics(), *shown}
    for name in re.findall(r"\b(?:gateway|learner|training)_[a-z_]+[a-z]\b(?!\.(?:py|bin))", path.read_text()):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or base in known, name


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that a renderer gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_relative_links_and_their_anchors_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def defines(module: Path, name: str) -> bool:
    """Does a module define a dotted name: a function, a class, a constant, a method?"""
    found: list[ast.stmt] = ast.parse(module.read_text()).body
    for part in name.split("."):
        targets = {
            target.id: node
            for node in found
            for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
            if isinstance(target, ast.Name)
        }
        named = {getattr(node, "name", ""): node for node in found} | targets
        if part not in named:
            return False
        found = getattr(named[part], "body", [])
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_file_and_name_of_ours_exists(path: Path) -> None:
    """`training/rl/trainer.py`, `helm/rules/`, `estimator/losses.ranking`."""
    own = path.read_text().split("## Notes")[0]  # of other repositories
    for name in re.findall(rf"`((?:{'|'.join(PLACES)})/[\w/.-]*\w/?)`", own):
        if (ROOT / name).exists() or (ROOT / "tests" / name).exists():
            continue
        module, _, attribute = name.partition(".")
        assert (ROOT / f"{module}.py").exists(), name
        assert defines(ROOT / f"{module}.py", attribute), name


def test_the_architecture_has_a_line_for_every_folder_and_no_other() -> None:
    table = (ROOT / "docs/architecture.md").read_text().split("## The folders")[1].split("\n\n")[1]
    named = re.findall(r"^\| `([\w/]+)/` \|", table, re.MULTILINE)
    code = [ROOT / name for name in ("gateway", "estimator", "training", "benchmarks", "dashboards")]
    known = {relative(path.parent) for folder in code for path in folder.rglob("*.py")}
    assert set(named) == known - {"training"}  # nothing but the table of its commands
    assert len(named) == len(set(named))


def test_the_readme_has_a_line_for_every_folder_and_no_other() -> None:
    tree = re.search(r"^```\n(gateway/ .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert tree is not None
    named = re.findall(r"^(\w+)/ +\w", tree[1], re.MULTILINE)
    assert len(named) == len(tree[1].splitlines())
    assert set(named) == set(PLACES)


def test_the_glossary_has_thirty_terms_nine_for_day_one_and_all_in_use() -> None:
    parts = (ROOT / "docs/glossary.md").read_text().split("\n## ")[1:]
    terms = [re.findall(r"^- \*\*(.+?)\*\*: ", part, re.MULTILINE) for part in parts]
    assert parts[0].startswith("Day one")
    assert len(terms[0]) == 9
    assert sum(len(part) for part in terms) == len({term for part in terms for term in part}) == 30
    others = "".join(path.read_text().lower() for path in DOCUMENTS if path.name != "glossary.md")
    words = re.sub(r"[\s_]+", " ", others)
    assert not [term for part in terms for term in part if term.lower() not in words]


def test_every_error_code_is_documented() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    codes = set(re.findall(r"ApiError\(\s*\d{3},(?:[^()]|\([^()]*\))*?\"([a-z_]+)\"(?:,|\s*\))", sources))
    assert {"invalid_json", "timeout", "missing_api_key"} <= codes
    table = OPERATIONS["api"].split("## Error codes")[1].split("\n## ")[0]
    assert sorted(code for code in codes if f"`{code}`" not in table and code != "client_gone") == []


def test_the_example_of_a_learner_is_taken() -> None:
    found = learner_settings.load_settings(ROOT / "examples/learner.yaml")
    assert list(found.pools) == ["small", "large"]
    assert (found.shadow.share, found.judge.kind) == (0.1, "model")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("gateway*.yaml")), ids=lambda path: path.name)
def test_example_configs_are_taken(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    if "keys_file" in (raw.get("auth") or {}):
        raw["auth"] = "none"  # the keys are the reader's own
    assert len(config.parse_config(raw, path.parent).pools) >= 2


def test_the_path_of_every_endpoint_is_documented() -> None:
    assert [path for path in APIS if f"`{path}`" not in OPERATIONS["api"]] == []


def test_the_reasons_listed_are_those_of_the_table() -> None:
    listed = OPERATIONS["api"].split("## Response headers")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE) == [reason.value for reason in Reason]


def values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The chart's values, as helm/README.md names them: down to what is gateway.yaml's or a pod's own."""
    for name, value in tree.items():
        key = prefix + name
        if key in ("config", "learner.config") or name in (*POD_KEYS, "image", "resources", "strategy"):
            yield key
        elif isinstance(value, dict) and value and name not in ("labels", "annotations"):
            yield from values(value, key + ".")
        else:
            yield key


POD_KEYS = (
    *("podLabels", "podAnnotations", "nodeSelector", "tolerations", "affinity", "topologySpreadConstraints"),
    *("priorityClassName", "runtimeClassName", "podSecurityContext", "securityContext"),
    *("extraEnv", "extraEnvFrom", "extraVolumes", "extraVolumeMounts"),
)


def test_every_value_of_the_chart_is_documented_and_no_other() -> None:
    chart = yaml.safe_load((ROOT / "helm/values.yaml").read_text())
    text = (ROOT / "helm/README.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    entries = {re.sub(r"^backends\.\w+\.", "backends.POOL.", key) for key in values(chart)}
    known = {key for key in entries if key.rpartition(".")[2] not in POD_KEYS}
    known -= {key for key in known if key.startswith("backends.POOL.weights")}  # one default among backendDefaults
    assert named - {"backendDefaults"} == known
    assert all(f"`{key}`" in text for key in POD_KEYS)


def test_the_page_on_alerts_counts_them_and_names_those_that_page() -> None:
    groups = yaml.safe_load((ROOT / "helm/rules/alerts.yaml").read_text())["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    paging = {name for name, rule in rules.items() if rule["labels"]["severity"] == "page"}
    page = OPERATIONS["alerts"]
    assert f"has {len(rules)} alerts" in page
    assert set(re.findall(r"\[(Depo\w+)\]\(\.\./runbooks/\1\.md\)", page)) == paging
    assert set(re.findall(r"^\| \[(Depo\w+)\]", (ROOT / "docs/runbooks/README.md").read_text(), re.MULTILINE)) == set(
        rules
    )


def test_the_index_of_operations_links_every_page() -> None:
    named = re.findall(r"^\| \[(\w+)\.md\]", OPERATIONS["README"], re.MULTILINE)
    assert sorted(named) == sorted(set(OPERATIONS) - {"README"})
