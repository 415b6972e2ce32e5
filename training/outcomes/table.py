"""Outcome tables: JSON lines of prompts with each model's outcome -> Examples."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.heads import ORIGINAL, head_names
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import prompt_of_messages
from depo_gateway.training.outcomes.completions import MOST_CUT_OFF, CompletionCounts, check_counts
from depo_gateway.training.outcomes.table_file import COMPLETIONS


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an outcome table."""

    question: str
    context: str
    correct: Mapping[str, float]
    token_confidence: Mapping[str, float]
    group: str
    source: str
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # labels of further heads, by head
    completions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # counts by outcome, by model


@dataclass(frozen=True, slots=True)
class Pools:
    """Pools cheapest first, each with the models whose outcomes are used as its."""

    names: tuple[str, ...]
    models: tuple[tuple[str, ...], ...]


def parse_pools(specifications: Sequence[str]) -> Pools:
    """["small=MODEL", "large=MODEL,MODEL"] -> Pools."""
    names, models = [], []
    for specification in specifications:
        name, equals, listed = specification.partition("=")
        members = tuple(part for part in (part.strip() for part in listed.split(",")) if part)
        if not equals or not name or not members:
            raise ValueError(f"pool {specification!r} is not of the form name=MODEL or name=MODEL,MODEL")
        if name in names:
            raise ValueError(f"pool {name!r} is given twice")
        if name == "auto" or name.startswith("auto-"):
            raise ValueError(f"a pool can't be called {name!r}: the gateway reserves that name for routing")
        names.append(name)
        models.append(members)
    return Pools(tuple(names), tuple(models))


def read_table(path: Path) -> Iterator[Row]:
    """Rows of one file. Raises ValueError naming file and line of the first bad one."""
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}:{number}", path.stem)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None


def _row(line: str, place: str, stem: str) -> Row:
    try:
        raw = json.loads(line)
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: a row is an object with question and correct")
    if isinstance(raw.get("question"), str):
        question, context = raw["question"], ""
    elif isinstance(raw.get("messages"), list):
        question, context = prompt_of_messages(raw["messages"])
    else:
        raise ValueError(f"{place}: a row needs question (text) or messages (a list)")
    if not question.strip():
        raise ValueError(f"{place}: the question is empty")
    correct = _labels(raw.get("correct"), place, "correct")
    completions = raw.get(COMPLETIONS, {})
    try:
        check_counts(completions)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not correct and not completions:  # a row with counts alone: no completion of the prompt has a label
        raise ValueError(f"{place}: correct must name at least one model")
    token_confidence = _labels(raw.get("token_confidence", {}), place, "token_confidence")
    group, source = (_name(raw.get(name), place, name) for name in ("group", "source"))
    others = {head: _labels(raw[head], place, head) for head in head_names() if head not in ORIGINAL and head in raw}
    return Row(_clean(question), _clean(context), correct, token_confidence, group, source or stem, others, completions)


def _clean(text: str) -> str:
    """Without lone surrogates, which would crash the tokenizer."""
    return text.encode("utf-8", "replace").decode()


def _name(raw: Any, place: str, field: str) -> str:
    """A group's or source's name; "" where there is none."""
    if raw is None:
        return ""
    if not isinstance(raw, str | int | float):
        raise ValueError(f"{place}: {field} must be a text or a number")
    return _clean(str(raw))


def _labels(raw: Any, place: str, name: str) -> dict[str, float]:
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: {name} must be an object, model -> number between 0 and 1")
    labels = {}
    for model, value in raw.items():
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN is not, either
            shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
            raise ValueError(f"{place}: {name} of {model!r} is {shown}, not a number between 0 and 1")
        labels[model] = float(value)
    return labels


def read_tables(paths: Sequence[Path]) -> list[Row]:
    """All files' rows, in order. Raises ValueError if there are none."""
    rows = [row for path in paths for row in read_table(path)]
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}")
    return rows


def cut_off_models(rows: Sequence[Row], pools: Pools) -> str:
    """Which pools' models had more than MOST_CUT_OFF of their completions cut off, in words; "" if none, as far as
    the rows tell. Labels leave such completions out, and they are mostly of hard prompts.
    """
    found = []
    for name, models in zip(pools.names, pools.models, strict=True):
        for model in models:
            counts = CompletionCounts()
            for row in rows:
                counts.add(row.completions.get(model, {}))
            if counts.cut_off > MOST_CUT_OFF:
                found.append(f"{counts.cut_off:.0%} of the completions of {model} (pool {name})")
    return " and ".join(found)


def cut_off_warning(found: str) -> str:
    """The sentence on the models that cut_off_models found."""
    return f"{found} were cut off and have no label: results are biased"


def check_cut_off(rows: Sequence[Row], pools: Pools, command: str, allowed: bool) -> None:
    """Raises ValueError where cut_off_models names any; if that is allowed, says on stderr what follows."""
    found = cut_off_models(rows, pools)
    if found and allowed:
        sys.stderr.write(f"depo-train {command}: {cut_off_warning(found)}\n")
    elif found:
        raise ValueError(
            f"{found} were cut off before their end, and the labels leave them out, most of them of hard prompts:"
            f" collect again with a higher --max-tokens, or {command} with --allow-cut-off"
        )


def question_key(question: str) -> str:
    """Equal for questions that differ only in case and spacing; they stay on one side of a split."""
    return " ".join(question.lower().split())


def examples_of(rows: Sequence[Row], pools: Pools, balance: float = 0.0) -> list[Example]:
    """One Example a distinct question: rows of the same question are merged, a model's label their mean, a pool's label
    the mean over its models that have one.

    Questions without a label for any pool are left out. Each question of a source of n questions weighs n ** -balance:
    with 0 every question counts alike, with 1 every source; the mean weight is 1. Raises ValueError for a model that no
    row names.
    """
    known = {model for row in rows for model in row.correct}
    for model in (model for models in pools.models for model in models):
        if model not in known:
            raise ValueError(f"no row has an outcome of {model!r}; the table knows {_some(sorted(known))}")
    groups_of_source: dict[str, set[str]] = {}
    for row in rows:
        groups_of_source.setdefault(row.source, set()).add(row.group)
    merged: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        merged.setdefault((question_key(row.question), row.context), []).append(row)
    examples, sources = [], []
    for same in merged.values():
        quality = _by_pool([row.correct for row in same], pools)
        if all(value is None for value in quality.values()):
            continue
        tokens = _by_pool([row.token_confidence for row in same], pools)
        heads = dict.fromkeys(head for row in same for head in row.others)
        others = {head: _by_pool([row.others.get(head, {}) for row in same], pools) for head in heads}
        # a source's only group says nothing beyond the source: its questions need not stay together
        grouped = len(groups_of_source[same[0].source]) > 1 and same[0].group
        group = f"{same[0].source}/{same[0].group}" if grouped else ""
        sources.append(same[0].source)
        examples.append(Example(same[0].question, quality, tokens, 1.0, group, same[0].context, others, same[0].group))
    if not examples:
        raise ValueError(f"no row has an outcome of any model of the pools {', '.join(pools.names)}")
    sizes = Counter(sources)
    weights = [sizes[source] ** -balance for source in sources]
    mean = sum(weights) / len(weights)
    return [replace(example, weight=weight / mean) for example, weight in zip(examples, weights, strict=True)]


def _by_pool(labels: Sequence[Mapping[str, float]], pools: Pools) -> dict[str, float | None]:
    """The mean label of each pool over the rows of one question; None where its models have none."""
    return {name: _mean(models, labels) for name, models in zip(pools.names, pools.models, strict=True)}


def _mean(models: Sequence[str], labels: Sequence[Mapping[str, float]]) -> float | None:
    means = []
    for model in models:
        values = [label[model] for label in labels if model in label]
        if values:
            means.append(sum(values) / len(values))
    return sum(means) / len(means) if means else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def folds_of(groups: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """A fold number for each example (N,): groups are shuffled, then each goes to the fold with the fewest examples."""
    names, sizes = np.unique(np.array(groups, dtype=object).astype(str), return_counts=True)
    if len(names) < count:
        raise ValueError(f"{len(names)} groups can't make {count} folds; give more rows or fewer --folds")
    order = np.random.default_rng(seed).permutation(len(names))
    filled = np.zeros(count, np.int64)
    fold_of_group = {}
    for index in order[np.argsort(-sizes[order], kind="stable")]:
        fold = int(filled.argmin())
        fold_of_group[str(names[index])] = fold
        filled[fold] += sizes[index]
    return np.array([fold_of_group[group] for group in groups], np.int64)
