"""What is looked for beside the requests: a new estimator or candidate, and what labels say of the one in service."""

import asyncio
import logging
import os
from dataclasses import replace

from depo_gateway.estimator import checkpoint, standing
from depo_gateway.gateway import scoring
from depo_gateway.gateway.candidate import Candidate
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.control import calibrated_threshold, fixed_threshold
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.scoring import Scorer
from depo_gateway.gateway.state import Gateway, Live

WATCH_SECONDS = 2.0
State = tuple[str, tuple[tuple[str, int, int], ...]]  # a checkpoint's place; name, time and size of its files

log = logging.getLogger(__name__)


class CheckpointWatcher:
    """Looks, and leaves alone what it has refused until something about it changes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._refused: dict[str, State] = {}

    async def first_standing(self) -> None:
        """What labels say of the estimator of a config just taken, where it is to be watched."""
        if self._gateway.live.config.estimator.watch:
            try:
                await self._read_standing()
            except (ValueError, OSError) as error:
                log.error("the standing is not known: %s", error)

    async def first_candidate(self) -> None:
        """The candidate of a config just taken. One that can't be loaded is counted, and the gateway serves without."""
        self._refused = {}
        _replace_candidate(self._gateway, None)
        try:
            await self._look_for_candidate()
        except (ValueError, OSError) as error:
            log.error("there is no candidate: %s", error)
            self._gateway.metrics.candidate_loads.labels("refused").inc()

    async def run(self) -> None:
        """For ever."""
        looks = {"estimator": self._look, "candidate": self._look_for_candidate, "standing": self._read_standing}
        told = dict.fromkeys(looks, "")
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name, look in looks.items():
                try:
                    await look()
                    told[name] = ""
                except (ValueError, OSError) as error:
                    if str(error) != told[name]:  # told once
                        told[name] = str(error)
                        log.error("the %s stays as it is: %s", name, error)
                        if name == "estimator":
                            self._gateway.metrics.estimator_loads.labels("refused").inc()
                        elif name == "candidate":
                            self._gateway.metrics.candidate_loads.labels("refused").inc()

    async def _look(self) -> None:
        """Loads a new checkpoint beside the old one and swaps. Raises ValueError or OSError for a bad one."""
        gateway, live = self._gateway, self._gateway.live
        path = live.config.estimator.path
        if path == "builtin":
            return
        found = await asyncio.to_thread(_state, path, live.scorer.version)
        if found is None or found == self._refused.get("estimator"):
            return
        try:
            scorer = await open_scorer(live.config, gateway.metrics)
        except ValueError:
            self._refused["estimator"] = found
            raise
        if gateway.live is not live:  # a reload came first, and has what is current
            scorer.close()
            return
        replace_live(gateway, replace(live, scorer=scorer))
        gateway.metrics.estimator_loads.labels("applied").inc()
        log.info("the estimator is now %s", scorer.version)

    async def _look_for_candidate(self) -> None:
        """The same for the candidate."""
        gateway = self._gateway
        settings, old = gateway.live.config, gateway.control.candidate
        path = settings.estimator.candidate
        if path is None:
            return
        found = await asyncio.to_thread(_state, path, "" if old is None else old.version)
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

    async def _read_standing(self) -> None:
        home = standing.checkpoints_directory(self._gateway.live.config.estimator.path)
        if home is not None:
            self._gateway.control.judge(await asyncio.to_thread(standing.read_standing, home))


async def open_scorer(settings: Config, metrics: Metrics) -> Scorer:
    """The estimator that a config names. Raises ValueError where it can't serve."""
    estimator = settings.estimator
    runtime, columns = await asyncio.to_thread(
        scoring.load_runtime, estimator.path, tuple(settings.pools), settings.routing.rule
    )
    fixed_threshold(settings, runtime)  # before it is in service: a ValueError where the target asks for more
    return Scorer(runtime, columns, estimator.deadline_ms / 1000, metrics)


async def open_candidate(settings: Config, path: str, metrics: Metrics) -> Candidate:
    """The candidate in `path`. Raises ValueError where it can't be one."""
    rule = settings.routing.rule
    runtime, columns = await asyncio.to_thread(scoring.load_runtime, path, tuple(settings.pools), rule)
    return Candidate(runtime, columns, rule, calibrated_threshold(settings, runtime), metrics)


def replace_live(gateway: Gateway, live: Live) -> None:
    """Swaps between two requests; those under way finish with what they hold, so their scorer closes a little later."""
    old, gateway.live = gateway.live, live
    gateway.control.follow(live.config, live.scorer.runtime)
    show(gateway)
    if old.scorer is not live.scorer:
        delay = old.config.timeouts.total_s if old.config.estimator.deadline_ms > 1000 else 5.0
        asyncio.get_running_loop().call_later(delay, old.scorer.close)
        gateway.retire(old.scorer)


def show(gateway: Gateway) -> None:
    """Tells the metrics which estimator is in service."""
    gateway.metrics.estimator_info.clear()
    gateway.metrics.estimator_info.labels(gateway.live.scorer.version).set(1)


def _replace_candidate(gateway: Gateway, fresh: Candidate | None) -> None:
    old, gateway.control.candidate = gateway.control.candidate, fresh
    if old is not None:
        old.close()
        gateway.retire(old)
    gateway.metrics.candidate_info.clear()
    if fresh is not None:
        gateway.metrics.candidate_info.labels(fresh.version).set(1)


def _state(path: str, version: str) -> State | None:
    """What `path` holds now; None where that is `version`."""
    if not scoring.has_changed(path, version):
        return None
    place = checkpoint.resolve(path)
    with os.scandir(place) as entries:
        files = [(entry.name, entry.stat()) for entry in entries]
    return str(place), tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in files))
