"""Two listening sockets, the tasks beside them, and an end that loses nothing."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import uvicorn

from estimator import standing
from gateway import __version__, app, config, pools, scoring, surface
from gateway.candidate import Candidate
from gateway.config import Config
from gateway.connection import uvicorn_config
from gateway.control import Control, calibrated_threshold, fixed_threshold
from gateway.metrics import Metrics
from gateway.records import Recorder, identity
from gateway.state import Gateway, Live, served_names
from gateway.upstream import Upstream

KEEP_ALIVE_SECONDS = 75  # longer than the load balancers in front, which then are the ones that close
WATCH_SECONDS = 2.0

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are this module's to handle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ValueError: names the setting and what is wrong with the address.
    """
    made = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
    except OSError as error:
        if made is not None:
            made.close()
        raise ValueError(
            f"can't listen on {host}:{port}: {error.strerror}; choose another address for {setting} or free this one"
        ) from None
    made.setblocking(False)
    return made


async def serve(
    settings: Config,
    path: Path | None = None,
    ready: Callable[[str, str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT (or `stop`) and then until the last answer's end, drain_s at most.

    Args:
        path: the file `settings` came from, which /admin/reload reads again.
        ready: is told both addresses once the gateway takes requests.

    Raises:
        ValueError: the user's mistake, in one sentence.
    """
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    metrics = Metrics(__version__)
    with contextlib.ExitStack() as opened:
        sockets = [
            opened.enter_context(bind(settings.listen.host, settings.listen.port, "listen")),
            opened.enter_context(bind(settings.admin.host, settings.admin.port, "admin")),
        ]
        recorder = await asyncio.to_thread(_recorder, settings, metrics)
        if recorder is not None:
            opened.callback(recorder.close, 0.0)
        live = await _live(settings, metrics)
        opened.pop_all()  # from here on the servers close them
    upstream = Upstream(settings.timeouts.connect_s)
    budget = pools.RetryBudget(settings.retries.budget, settings.retries.per_second)
    runtime, control = live.scorer.runtime, Control(metrics)
    control.follow(settings, runtime)
    shares = scoring.usual_shares(runtime, tuple(settings.pools), settings.routing.rule, control.threshold)
    gateway = Gateway(live, metrics, upstream, budget, control, recorder=recorder, shares=shares)
    gateway.idle.set()
    await _load_candidate(gateway)
    _show(gateway)
    tasks = _Tasks(gateway)
    one_reload = asyncio.Lock()

    async def reload() -> str:
        async with one_reload:  # of two, the later file stays, and no records section is closed that the other takes up
            return await apply()

    async def apply() -> str:
        assert path is not None
        fresh = await asyncio.to_thread(config.load, path)
        for name in ("listen", "admin"):
            here, there = getattr(gateway.live.config, name), getattr(fresh, name)
            if (here.host, here.port) != (there.host, there.port):
                raise ValueError(f"{name}'s address can't change while the gateway runs; restart it")
        live = await _live(fresh, metrics)
        try:
            recorder = await asyncio.to_thread(_recorder, fresh, metrics, gateway.recorder)
        except (ValueError, OSError):
            live.scorer.close()
            raise
        await pools.check_all(live.pools, upstream)
        _replace(gateway, live)
        upstream.set_connect_seconds(fresh.timeouts.connect_s)
        gateway.budget = pools.RetryBudget(fresh.retries.budget, fresh.retries.per_second)
        old, gateway.recorder = gateway.recorder, recorder
        if old is not None and old is not recorder:
            await asyncio.to_thread(old.close)
        await tasks.restart()
        await _load_candidate(gateway)
        log.info("the config %s is applied", path)
        return gateway.live.scorer.version

    public = app.create_app(gateway, surface.create_public(gateway))
    admin = surface.create_admin(gateway, reload if path else None)
    servers = [
        _Server(uvicorn_config(item, settings.limits.header_bytes, KEEP_ALIVE_SECONDS)) for item in (public, admin)
    ]
    serving = [asyncio.create_task(server.serve([made])) for server, made in zip(servers, sockets, strict=True)]
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await pools.check_all(gateway.live.pools, upstream)
        await tasks.restart()
        if ready is not None:
            ready(*(_address(item) for item in sockets))
        await stop.wait()
        for number in signals:  # a second signal ends the process at once
            loop.remove_signal_handler(number)
        await _drain(gateway)
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        await tasks.stop()
        await upstream.close()
        if gateway.recorder is not None:
            await asyncio.to_thread(gateway.recorder.close)
        candidate = (gateway.control.candidate,) if gateway.control.candidate else ()
        for scorer in (*gateway.retired, gateway.live.scorer, *candidate):
            scorer.close()
            await asyncio.to_thread(scorer.join)


class _Tasks:
    """The health checks and the checkpoint watcher of the config in force."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._running: list[asyncio.Task[None]] = []

    async def restart(self) -> None:
        await self.stop()
        gateway = self._gateway
        self._running = [asyncio.create_task(pools.watch_health(gateway.live.pools, gateway.upstream))]
        if gateway.live.config.estimator.watch:
            self._running.append(asyncio.create_task(_watch_checkpoints(gateway)))

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running = []


def _recorder(settings: Config, metrics: Metrics, running: Recorder | None = None) -> Recorder | None:
    """What a config's records section wants; the one that runs already, where it is the same section.

    Raises:
        ValueError: the database's address or driver can't be.
    """
    if settings.records is None:
        return None
    if running is not None and running.identity == identity(settings.records):
        return running
    return Recorder(settings.records, metrics)


async def _live(settings: Config, metrics: Metrics) -> Live:
    scorer = await _scorer(settings, metrics)
    keys = {key.sha256: key.name for key in settings.auth.keys} if settings.auth else {}
    return Live(settings, pools.open_pools(settings, metrics), keys, served_names(settings.pools), scorer)


async def _scorer(settings: Config, metrics: Metrics) -> scoring.Scorer:
    estimator = settings.estimator
    runtime, columns = await asyncio.to_thread(
        scoring.load, estimator.path, tuple(settings.pools), settings.routing.rule
    )
    fixed_threshold(settings, runtime)  # before it is in service: a ValueError where the target asks for more
    return scoring.Scorer(runtime, columns, estimator.deadline_ms / 1000, metrics)


def _replace(gateway: Gateway, live: Live) -> None:
    """Swaps between two requests; those under way finish with what they hold, so their scorer closes a little later."""
    old, gateway.live = gateway.live, live
    gateway.control.follow(live.config, live.scorer.runtime)
    _show(gateway)
    if old.scorer is not live.scorer:
        delay = old.config.timeouts.total_s if old.config.estimator.deadline_ms > 1000 else 5.0
        asyncio.get_running_loop().call_later(delay, old.scorer.close)
        gateway.retired = [*gateway.retired[-2:], old.scorer]


def _show(gateway: Gateway) -> None:
    live = gateway.live
    gateway.metrics.estimator_info.clear()
    gateway.metrics.estimator_info.labels(live.scorer.version).set(1)


async def _watch_checkpoints(gateway: Gateway) -> None:
    """Looks for a new version of the estimator and of the candidate, and for what labels say of the one in service."""
    refused = {"estimator": "", "candidate": "", "standing": ""}
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        for name, look in (("estimator", _look), ("candidate", _look_for_candidate), ("standing", _read_standing)):
            try:
                await look(gateway)
                refused[name] = ""
            except (ValueError, OSError) as error:
                if str(error) != refused[name]:  # told once
                    refused[name] = str(error)
                    log.error("the %s stays as it is: %s", name, error)
                    if name == "estimator":
                        gateway.metrics.estimator_loads.labels("refused").inc()
                    elif name == "candidate":
                        gateway.metrics.candidate_loads.labels("refused").inc()


async def _look(gateway: Gateway) -> None:
    """Loads a new checkpoint beside the old one and swaps. Raises ValueError or OSError for a bad one."""
    live = gateway.live
    path = live.config.estimator.path
    if path == "builtin" or not await asyncio.to_thread(scoring.changed, path, live.scorer.version):
        return
    scorer = await _scorer(live.config, gateway.metrics)
    if gateway.live is not live:  # a reload came first, and has what is current
        scorer.close()
        return
    _replace(gateway, replace(live, scorer=scorer))
    gateway.metrics.estimator_loads.labels("applied").inc()
    log.info("the estimator is now %s", scorer.version)


async def _look_for_candidate(gateway: Gateway) -> None:
    """The same for the candidate."""
    settings, old = gateway.live.config, gateway.control.candidate
    path = settings.estimator.candidate
    if path is None or (old is not None and not await asyncio.to_thread(scoring.changed, path, old.version)):
        return
    fresh = await _candidate(settings, path, gateway.metrics)
    if gateway.live.config is not settings:
        fresh.close()
        return
    _replace_candidate(gateway, fresh)
    gateway.metrics.candidate_loads.labels("applied").inc()
    log.info("the candidate is now %s", fresh.version)


async def _load_candidate(gateway: Gateway) -> None:
    """The candidate of a config just taken. One that can't be loaded is counted, and the gateway serves without."""
    _replace_candidate(gateway, None)
    try:
        await _look_for_candidate(gateway)
    except (ValueError, OSError) as error:
        log.error("there is no candidate: %s", error)
        gateway.metrics.candidate_loads.labels("refused").inc()


async def _candidate(settings: Config, path: str, metrics: Metrics) -> Candidate:
    rule = settings.routing.rule
    runtime, columns = await asyncio.to_thread(scoring.load, path, tuple(settings.pools), rule)
    return Candidate(runtime, columns, rule, calibrated_threshold(settings, runtime), metrics)


def _replace_candidate(gateway: Gateway, fresh: Candidate | None) -> None:
    old, gateway.control.candidate = gateway.control.candidate, fresh
    if old is not None:
        old.close()
        gateway.retired = [*gateway.retired[-2:], old]
    gateway.metrics.candidate_info.clear()
    if fresh is not None:
        gateway.metrics.candidate_info.labels(fresh.version).set(1)


async def _read_standing(gateway: Gateway) -> None:
    home = standing.home(gateway.live.config.estimator.path)
    if home is not None:
        gateway.control.judge(await asyncio.to_thread(standing.read, home))


async def _drain(gateway: Gateway) -> None:
    """/readyz says no from now on; what runs may finish, and what still comes is served on a connection that closes."""
    gateway.draining = True
    log.info("stopping: %d requests are still running", gateway.active)
    try:
        async with asyncio.timeout(gateway.live.config.timeouts.drain_s):
            await gateway.idle.wait()
    except TimeoutError:
        log.warning("%d requests were still running after timeouts.drain_s and are cut off", gateway.active)


def _address(item: socket.socket) -> str:
    host, port = item.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
