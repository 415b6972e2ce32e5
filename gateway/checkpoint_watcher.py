"""Watches, beside the requests, for a new estimator or candidate, for what labels say of the one in service, and for
one that is held back."""

import asyncio
import logging
import os
from dataclasses import replace

from depo_gateway.estimator import checkpoint, held_publish, standing
from depo_gateway.gateway import scoring
from depo_gateway.gateway.candidate import Candidate
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.scoring import Scorer
from depo_gateway.gateway.state import Gateway, Live
from depo_gateway.gateway.thresholds import calibrated_threshold, fixed_threshold

WATCH_SECONDS = 2.0
Content = tuple[str, tuple[tuple[str, int, int], ...]]  # a checkpoint's directory; name, time and size of its files

log = logging.getLogger(__name__)


class CheckpointWatcher:
    """Checks every few seconds. A checkpoint that was refused is not loaded again until its content changes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._refused: dict[str, Content] = {}

    async def first_standing(self) -> None:
        """Applies what labels say of a new config's estimator, if the config has it watched."""
        if self._gateway.live.config.estimator.watch:
            try:
                await self._check_standing()
            except (ValueError, OSError) as error:
                log.error("the standing is not known: %s", error)

    async def first_candidate(self) -> None:
        """Loads a new config's candidate. If that fails it is counted, and the gateway serves without one."""
        self._refused = {}
        _replace_candidate(self._gateway, None)
        try:
            await self._check_candidate()
        except (ValueError, OSError) as error:
            log.error("there is no candidate: %s", error)
            self._gateway.metrics.candidate_loads.labels("refused").inc()

    async def run(self) -> None:
        """Never returns."""
        metrics = self._gateway.metrics
        loads = {"estimator": metrics.estimator_loads, "candidate": metrics.candidate_loads}
        checks = {
            "estimator": self._check_estimator, "candidate": self._check_candidate, "standing": self._check_standing,
            "held checkpoint": self._check_held,
        }  # fmt: skip
        logged = dict.fromkeys(checks, "")
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name, check in checks.items():
                try:
                    await check()
                    logged[name] = ""
                except (ValueError, OSError) as error:
                    if str(error) != logged[name]:  # once, not every few seconds
                        logged[name] = str(error)
                        log.error("the %s stays as it is: %s", name, error)
                        if name in loads:
                            loads[name].labels("refused").inc()

    async def _check_estimator(self) -> None:
        """Loads a new checkpoint beside the old one and swaps. Raises ValueError or OSError for a bad one."""
        gateway, live = self._gateway, self._gateway.live
        path = live.config.estimator.path
        if path == "builtin":
            return
        found = await asyncio.to_thread(_new_content, path, live.scorer.version)
        if found is None or found == self._refused.get("estimator"):
            return
        try:
            scorer = await open_scorer(live.config, gateway.metrics)
        except ValueError:
            self._refused["estimator"] = found
            raise
        if gateway.live is not live:  # a reload was faster, and has loaded what is current
            scorer.close()
            return
        replace_live(gateway, replace(live, scorer=scorer))
        gateway.metrics.estimator_loads.labels("applied").inc()
        log.info("the estimator is now %s", scorer.version)

    async def _check_candidate(self) -> None:
        """Loads a new checkpoint of the candidate and swaps. Raises ValueError or OSError for a bad one."""
        gateway = self._gateway
        settings, old = gateway.live.config, gateway.control.candidate
        path = settings.estimator.candidate
        if path is None:
            return
        found = await asyncio.to_thread(_new_content, path, "" if old is None else old.version)
        if found is None or found == self._refused.get("candidate"):
            return
        try:
            fresh = await open_candidate(settings, path, gateway.metrics)
        except ValueError:
            self._refused["candidate"] = found
            raise
        if gateway.live.config is not settings:
            fresh.close()
            return
        _replace_candidate(gateway, fresh)
        gateway.metrics.candidate_loads.labels("applied").inc()
        log.info("the candidate is now %s", fresh.version)

    async def _check_standing(self) -> None:
        directory = standing.checkpoints_directory(self._gateway.live.config.estimator.path)
        if directory is not None:
            self._gateway.control.apply_standing(await asyncio.to_thread(standing.read_standing, directory))

    async def _check_held(self) -> None:
        directory = standing.checkpoints_directory(self._gateway.live.config.estimator.path)
        held = None if directory is None else await asyncio.to_thread(held_publish.read_held, directory)
        if held is not None and (self._gateway.held is None or self._gateway.held.version != held.version):
            log.warning("%s", held.sentence)
        self._gateway.held = held


async def open_scorer(settings: Config, metrics: Metrics) -> Scorer:
    """The estimator that a config names. Raises ValueError if it can't serve."""
    estimator = settings.estimator
    runtime, columns = await asyncio.to_thread(
        scoring.load_runtime, estimator.path, tuple(settings.pools), settings.routing.rule
    )
    fixed_threshold(settings, runtime)  # raises ValueError for a target that it can't meet, before it is in service
    return Scorer(runtime, columns, estimator.deadline_ms / 1000, metrics)


async def open_candidate(settings: Config, path: str, metrics: Metrics) -> Candidate:
    """The candidate in `path`. Raises ValueError if it can't be one."""
    rule = settings.routing.rule
    runtime, columns = await asyncio.to_thread(scoring.load_runtime, path, tuple(settings.pools), rule)
    return Candidate(runtime, columns, rule, calibrated_threshold(settings, runtime), metrics)


def replace_live(gateway: Gateway, live: Live) -> None:
    """Swaps between two requests. Running ones finish with what they hold, so their scorer closes a little later."""
    old, gateway.live = gateway.live, live
    gateway.control.follow(live.config, live.scorer.runtime)
    if old.scorer is not live.scorer:
        delay = old.config.timeouts.total_s if old.config.estimator.deadline_ms > 1000 else 5.0
        asyncio.get_running_loop().call_later(delay, old.scorer.close)
        gateway.retire(old.scorer)


def _replace_candidate(gateway: Gateway, fresh: Candidate | None) -> None:
    old = gateway.control.replace_candidate(fresh)
    if old is not None:
        old.close()
        gateway.retire(old)


def _new_content(path: str, version: str) -> Content | None:
    """What `path` holds now; None while that is `version`."""
    if not scoring.has_changed(path, version):
        return None
    place = checkpoint.resolve(path)
    with os.scandir(place) as entries:
        files = [(entry.name, entry.stat()) for entry in entries]
    return str(place), tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in files))
