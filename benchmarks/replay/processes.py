"""The real programs, depo-gateway and depo-train refresh --follow, and the checkpoints that they start from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.replay.questions import GENERAL, GENERAL_MODELS, POOLS
from depo_gateway.estimator import checkpoint, export
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.fitting.calibration import calibrate

ROOT = Path(__file__).parents[2]
SERVING = re.compile(r"serving (http://[\d.]+:\d+)/v1, metrics at (http://[\d.]+:\d+)/")
START_SECONDS, STOP_SECONDS = 60.0, 20.0
DEADLINE_MS = 5000  # for the estimator: backends, gateway, learner and clients share a core here
COSTS = {"small": 1.0, "large": 5.0}


@dataclass(frozen=True, slots=True)
class Place:
    """A run's directory."""

    root: Path

    @property
    def records(self) -> str:
        return f"sqlite:///{self.root / 'records.db'}"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def trained_to(self) -> int:
        """The highest label that the last refresh read; the file is written last."""
        file = self.checkpoints / "learner.json"
        return int(json.loads(file.read_text())["seq"]) if file.exists() else 0

    def refusals(self) -> list[dict[str, Any]]:
        file = self.checkpoints / "refusals.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def gateway_config(place: Place, urls: Mapping[str, str], large_share: float) -> dict[str, Any]:
    return {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": pools(urls),
        # so that questions that are asked again are decided again
        "routing": {"target": {"large_share": large_share}, "explore": 0.02, "sticky": False},
        "estimator": {"path": str(place.checkpoints), "deadline_ms": DEADLINE_MS},
        "records": {"url": place.records, "prompts": "full"},
    }


def learner_config(place: Place, urls: Mapping[str, str], every_labels: int) -> dict[str, Any]:
    return {
        "records": {"url": place.records},
        "pools": pools(urls),
        "shadow": {"share": 1.0, "max_concurrent": 8},
        "judge": {"kind": "exact"},
        "listen": {"port": 0},
        "refresh": {
            "every_labels": every_labels,
            "every_minutes": 600,
            "keep": 100,
            # here hours of one key's traffic pass in seconds, and exam questions come in similar series
            "learn": {"traffic": {"burst_seconds": 1}},
        },
    }


def pools(urls: Mapping[str, str]) -> dict[str, Any]:
    return {
        pool: {"model": f"org/{pool}", "cost": COSTS[pool], "backends": [{"url": url}]} for pool, url in urls.items()
    }


@contextlib.contextmanager
def gateway(place: Place, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Its address, and its admin address. Raises ValueError if it does not start."""
    file, log = place.root / "gateway.yaml", place.root / "gateway.log"
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    with process(log, "-m", "depo_gateway.gateway", "serve", "--config", str(file)) as started:
        until = time.monotonic() + START_SECONDS
        while (found := SERVING.search(log.read_text())) is None:
            if started.poll() is not None or time.monotonic() > until:
                raise ValueError(f"the gateway did not start: {last_line(log)}")
            time.sleep(0.05)
        yield found[1], found[2]


@contextlib.contextmanager
def learner(place: Place, config: Mapping[str, Any], base: Path, cold: bool) -> Iterator[subprocess.Popen[bytes]]:
    file, log = place.root / "learner.yaml", place.root / "learner.log"
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    arguments = [
        "--base",
        str(base),
        "--out",
        str(place.checkpoints),
        "--config",
        str(file),
        *(["--cold"] if cold else []),
    ]
    with process(log, "-m", "depo_gateway.training", "refresh", "--follow", *arguments) as started:
        yield started


@contextlib.contextmanager
def process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process on one thread, its output appended to `log`, terminated at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, env=environment, cwd=log.parent
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "its log is empty"


def untrained(place: Path) -> Path:
    """A checkpoint that scores every prompt alike: a cold start serves it until there are labels."""
    if not (place / checkpoint.MANIFEST).is_file():
        torch.manual_seed(0)
        model, tokenizer = create_model(ModelConfig(POOLS, TextConfig()))
        model.embedding_scale.zero_()
        nothing, unknown = np.zeros((2, *model.config.shape)), np.full((2, len(POOLS)), np.nan)
        calibrated = calibrate(nothing, nothing, dict.fromkeys(model.config.heads, unknown), np.ones(2), POOLS)
        export.export_checkpoint(place, model, tokenizer, calibrated, {})
    return place


def general(place: Path, data: Path) -> Path:
    """A checkpoint fitted on GSM8K and MATH, because the shipped one was fitted on the MMLU questions asked here."""
    if not (place / checkpoint.MANIFEST).is_file():
        tables = [str(data / "outcomes" / name) for name in GENERAL]
        command = ["fit", "--outcomes", *tables, "--pools", *GENERAL_MODELS, "--balance", "0.5", "--out", str(place)]
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.parent / f"{place.name}.log"
        with process(log, "-m", "depo_gateway.training", *command) as started:
            if started.wait():
                raise ValueError(f"the general start could not be fitted: {last_line(log)}")
    return place


def publish_base(place: Place, base: Path) -> None:
    """Makes the checkpoints directory, with the base as the served checkpoint."""
    place.checkpoints.mkdir(parents=True)
    shutil.copytree(base, place.checkpoints / "base")
    checkpoint.publish(place.checkpoints / "base")
