"""The methods by name, with their settings.

A name may contain settings, as in `depo-plus@candidates=3,lr=2e-4`, to try them on the tuning seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from benchmarks.depo.estimated import SMALL, Depo, DepoMethodConfig
from benchmarks.depo.grpo import GrpoConfig
from benchmarks.depo.methods import (
    CLIP_HIGHER,
    Method,
    OracleMethod,
    PolarisMethod,
    expected_to_suffice,
    selector_of,
)
from depo_gateway.estimator.learner import LearnerConfig
from depo_gateway.training.rl.selection_config import SelectionConfig

WARMUP = 0.1  # of the steps, as in the paper: 100 of 1,000
TITLES = {
    "grpo": "GRPO",
    "dapo": "DAPO",
    "dapo-parts": "DAPO without dynamic sampling",
    "polaris": "Polaris",
    "greso": "GRESO",
    "mopps": "MoPPS",
    "depo": "DEPO",
    "depo-noranking": "DEPO - ranking",
    "depo-noranking-nodistillation": "DEPO - ranking - distillation",
    "depo-dapo": "DEPO with DAPO's parts",
    "depo-plus": "DEPO plus",
    "oracle": "oracle",
}
# The policy's learning rate was the best one for GRPO of 3e-5, 5e-5 and 1e-4 on the tuning seeds. With dynamic sampling
# the same number of completions makes a third of the steps; DAPO was slightly better at twice that rate, and worse at
# four times.
FEWER_STEPS = {"dapo": 1e-4, "greso": 1e-4}
FAITHFUL, PLUS = SelectionConfig.faithful(), SelectionConfig.plus()
DEPO = {
    "depo": DepoMethodConfig(FAITHFUL),
    "depo-noranking": DepoMethodConfig(FAITHFUL, replace(SMALL, ranking_weight=0.0)),
    "depo-noranking-nodistillation": DepoMethodConfig(
        FAITHFUL, replace(SMALL, ranking_weight=0.0, distillation_weight=0.0)
    ),
    "depo-dapo": DepoMethodConfig(FAITHFUL, clip_high=CLIP_HIGHER),
    "depo-plus": DepoMethodConfig(PLUS),
}


def method_of(name: str, prompts: Sequence[str], seed: int, steps: int, group_size: int) -> tuple[Method, GrpoConfig]:
    """A method and how its policy learns. `steps`: those of GRPO. Raises ValueError for an unknown name."""
    kind, settings = parse(name)
    policy = replace(GrpoConfig(), learning_rate=FEWER_STEPS.get(kind, GrpoConfig().learning_rate))
    if "lr" in settings:
        policy = replace(policy, learning_rate=float(settings.pop("lr")))
    size = len(prompts)
    method: Method
    if kind in DEPO:
        method = Depo(prompts, depo_of(DEPO[kind], settings, steps, group_size), seed)
    elif kind == "grpo":
        method = Method(selector_of(size, seed, group_size, "off"), **settings)
    elif kind in ("dapo", "dapo-parts"):
        method = Method(
            selector_of(size, seed, group_size, "off"),
            **{"dynamic": kind == "dapo", "clip_high": CLIP_HIGHER, **settings},
        )
    elif kind == "polaris":
        method = PolarisMethod(size, seed, group_size, steps, **settings)
    elif kind == "greso":
        method = Method(
            selector_of(size, seed, group_size, "greso", **settings), True, CLIP_HIGHER, expected_to_suffice
        )
    elif kind == "mopps":
        method = Method(selector_of(size, seed, group_size, "mopps", **settings))
    else:
        method = OracleMethod(size, seed, group_size, **settings)
    return method, replace(policy, clip_high=method.clip_high)


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """`depo-plus@candidates=3` -> ("depo-plus", {"candidates": 3})."""
    kind, _, tail = name.partition("@")
    if kind not in TITLES:
        raise ValueError(f"the method {kind!r} is unknown; use one of {', '.join(TITLES)}")
    settings: dict[str, Any] = {}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"the setting {part!r} of {kind} has no value; write key=value")
        settings[key] = {"true": True, "false": False}.get(value) if value in ("true", "false") else number(value)
    return kind, settings


def number(text: str) -> float | int | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def depo_of(config: DepoMethodConfig, settings: dict[str, Any], steps: int, group_size: int) -> DepoMethodConfig:
    """A DEPO method's configuration for a run of this length, with the settings of its name."""
    selection, learner = replace(config.selection, group_size=group_size), config.learner
    selection = replace(selection, warmup_steps=max(1, round(WARMUP * steps)))
    known = {name: {field.name for field in fields(part)} for name, part in (("s", selection), ("l", learner))}
    for key, value in settings.items():
        if key in known["s"]:
            selection = replace(selection, **{key: value})
        elif key in known["l"]:
            learner = replace(learner, **{key: value})
        elif key == "estimator_lr":
            learner = replace(learner, trunk_learning_rate=value, encoder_learning_rate=value)
        elif key in ("clip_high", "dynamic"):
            config = replace(config, **{key: value})
        else:
            raise ValueError(f"the setting {key!r} is unknown to DEPO")
    assert isinstance(learner, LearnerConfig)
    return replace(config, selection=selection, learner=learner)
