"""Two listening sockets, the tasks beside them, and an end that loses nothing."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from pathlib import Path

import uvicorn

from depo_gateway import __version__
from depo_gateway.gateway import app, checkpoint_watcher, config, endpoints, pools, scoring
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.control import Control
from depo_gateway.gateway.http_protocol import uvicorn_config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.records import Recorder, identity
from depo_gateway.gateway.state import Gateway, Live, served_names
from depo_gateway.gateway.upstream import Upstream

KEEP_ALIVE_SECONDS = 75  # longer than the load balancers in front, which then are the ones that close

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
    watching = checkpoint_watcher.CheckpointWatcher(gateway)
    await watching.first_standing()
    await watching.first_candidate()
    checkpoint_watcher.show(gateway)
    tasks = _Tasks(gateway, watching)
    one_reload = asyncio.Lock()

    async def reload() -> str:
        async with one_reload:  # of two, the later file stays, and no records section is closed that the other takes up
            return await apply()

    async def apply() -> str:
        assert path is not None
        fresh = await asyncio.to_thread(config.load_config, path)
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
        checkpoint_watcher.replace_live(gateway, live)
        await watching.first_standing()
        upstream.set_connect_seconds(fresh.timeouts.connect_s)
        gateway.budget = pools.RetryBudget(fresh.retries.budget, fresh.retries.per_second)
        old, gateway.recorder = gateway.recorder, recorder
        if old is not None and old is not recorder:
            await asyncio.to_thread(old.close)
        await tasks.restart()
        await watching.first_candidate()
        log.info("the config %s is applied", path)
        return gateway.live.scorer.version

    public = app.create_app(gateway, endpoints.create_public(gateway))
    admin = endpoints.create_admin(gateway, reload if path else None)
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
        working = (*gateway.retired, gateway.live.scorer, *candidate)
        for scorer in working:
            scorer.close()
        for scorer in working:
            await asyncio.to_thread(scorer.join)


class _Tasks:
    """The health checks and the checkpoint watcher of the config in force."""

    def __init__(self, gateway: Gateway, watching: checkpoint_watcher.CheckpointWatcher) -> None:
        self._gateway = gateway
        self._watching = watching
        self._running: list[asyncio.Task[None]] = []

    async def restart(self) -> None:
        await self.stop()
        gateway = self._gateway
        self._running = [asyncio.create_task(pools.watch_health(gateway.live.pools, gateway.upstream))]
        if gateway.live.config.estimator.watch:
            self._running.append(asyncio.create_task(self._watching.run()))

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
    scorer = await checkpoint_watcher.open_scorer(settings, metrics)
    keys = {key.sha256: key.name for key in settings.auth.keys} if settings.auth else {}
    return Live(settings, pools.open_pools(settings, metrics), keys, served_names(settings.pools), scorer)


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
