"""The process: two listening sockets, background tasks, reloads, and a shutdown that finishes what is running."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import uvicorn

from depo_gateway import __version__
from depo_gateway.gateway import app, checkpoint_watcher, config, endpoints, pools, scoring
from depo_gateway.gateway.checkpoint_watcher import CheckpointWatcher, replace_live
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.control import Control
from depo_gateway.gateway.http_protocol import uvicorn_config
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.model_names import served_names
from depo_gateway.gateway.openai.apis import APIS, Apis
from depo_gateway.gateway.records import Recorder, identity
from depo_gateway.gateway.state import Gateway, Live
from depo_gateway.gateway.upstream import Upstream

KEEP_ALIVE_SECONDS = 75  # longer than load balancers' idle timeouts, so that they are the ones that close
SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; this module has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ValueError: names the setting and what is wrong with the address.
    """
    opened = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(2048)
    except OSError as error:
        if opened is not None:
            opened.close()
        raise ValueError(
            f"can't listen on {host}:{port}: {error.strerror}; choose another address for {setting} or free this one"
        ) from None
    opened.setblocking(False)
    return opened


async def serve(
    settings: Config,
    path: Path | None = None,
    ready: Callable[[str, str], None] | None = None,
    stop: asyncio.Event | None = None,
    apis: Apis = APIS,
) -> None:
    """Serves until SIGTERM or SIGINT (or `stop`), and then until the running requests end, drain_s at most.

    Args:
        path: the file that `settings` came from; /admin/reload reads it again.
        ready: called with both addresses once the gateway takes requests.
        apis: the endpoints that serve models, by path.

    Raises:
        ValueError: the user's mistake, in one sentence.
    """
    stop = stop or asyncio.Event()
    sockets, gateway = await _build(settings, apis)
    watcher = CheckpointWatcher(gateway)
    await watcher.first_standing()
    await watcher.first_candidate()
    tasks = _Tasks(gateway, watcher)
    servers = _servers(gateway, None if path is None else _Reload(path, gateway, watcher, tasks))
    serving = [asyncio.create_task(server.serve([item])) for server, item in zip(servers, sockets, strict=True)]
    try:
        with _stopped_by_signals(stop):
            await pools.check_all(gateway.live.pools, gateway.upstream)
            await tasks.restart()
            if ready is not None:
                ready(*(_address(item) for item in sockets))
            await stop.wait()
        await _drain(gateway)
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        await tasks.stop()
        await _close(gateway)


async def _build(settings: Config, apis: Apis) -> tuple[list[socket.socket], Gateway]:
    """The listening sockets (public, admin) and the gateway behind them. Raises ValueError for the user's mistake."""
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
        opened.pop_all()  # from here on the servers and _close close them
    control = Control()
    control.follow(settings, live.scorer.runtime)
    gateway = Gateway(
        live,
        metrics,
        Upstream(settings.timeouts.connect_s),
        pools.RetryBudget(settings.retries.budget, settings.retries.per_second),
        control,
        recorder=recorder,
        apis=apis,
        shares=_usual_shares(live, control),
    )
    gateway.idle.set()
    return sockets, gateway


def _servers(gateway: Gateway, reload: endpoints.Reload | None) -> list[_Server]:
    """uvicorn's servers of the public and of the admin address."""
    public = app.create_app(gateway, endpoints.create_public(gateway))
    admin = endpoints.create_admin(gateway, reload)
    header_bytes = gateway.live.config.limits.header_bytes
    return [_Server(uvicorn_config(item, header_bytes, KEEP_ALIVE_SECONDS)) for item in (public, admin)]


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT set `stop`. After it, a signal ends the process at once."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


class _Reload:
    """Reads the config file again and applies it to the running gateway."""

    def __init__(self, path: Path, gateway: Gateway, watcher: CheckpointWatcher, tasks: "_Tasks") -> None:
        self._path, self._gateway, self._watcher, self._tasks = path, gateway, watcher, tasks
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        """The version of the estimator then in service. Raises ValueError or OSError; the old config then stays."""
        async with self._lock:  # of two reloads the later file applies, and neither closes the other's recorder
            settings = await asyncio.to_thread(config.load_config, self._path)
            self._check_addresses(settings)
            live, recorder = await self._open(settings)
            await self._apply(live, recorder)
        log.info("the config %s is applied", self._path)
        return self._gateway.live.scorer.version

    def _check_addresses(self, settings: Config) -> None:
        for name in ("listen", "admin"):
            here, there = getattr(self._gateway.live.config, name), getattr(settings, name)
            if (here.host, here.port) != (there.host, there.port):
                raise ValueError(f"{name}'s address can't change while the gateway runs; restart it")

    async def _open(self, settings: Config) -> tuple[Live, Recorder | None]:
        """What the config needs that can fail, before anything is replaced."""
        gateway = self._gateway
        live = await _live(settings, gateway.metrics)
        try:
            recorder = await asyncio.to_thread(_recorder, settings, gateway.metrics, gateway.recorder)
        except (ValueError, OSError):
            live.scorer.close()
            raise
        await pools.check_all(live.pools, gateway.upstream)
        return live, recorder

    async def _apply(self, live: Live, recorder: Recorder | None) -> None:
        gateway, settings, before = self._gateway, live.config, self._gateway.live.config
        replace_live(gateway, live)
        if _share_settings(settings) != _share_settings(before):  # decisions that follow would correct them slowly
            gateway.shares = _usual_shares(live, gateway.control) or gateway.shares
        await self._watcher.first_standing()
        gateway.upstream.set_connect_seconds(settings.timeouts.connect_s)
        gateway.retry_budget = pools.RetryBudget(settings.retries.budget, settings.retries.per_second)
        old, gateway.recorder = gateway.recorder, recorder
        if old is not None and old is not recorder:
            await asyncio.to_thread(old.close)
        await self._tasks.restart()
        await self._watcher.first_candidate()


class _Tasks:
    """The health checks and the checkpoint watcher of the config in force."""

    def __init__(self, gateway: Gateway, watcher: CheckpointWatcher) -> None:
        self._gateway = gateway
        self._watcher = watcher
        self._running: list[asyncio.Task[None]] = []

    async def restart(self) -> None:
        await self.stop()
        gateway = self._gateway
        self._running = [asyncio.create_task(pools.watch_health(gateway.live.pools, gateway.upstream))]
        if gateway.live.config.estimator.watch:
            self._running.append(asyncio.create_task(self._watcher.run()))

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running = []


def _recorder(settings: Config, metrics: Metrics, running: Recorder | None = None) -> Recorder | None:
    """The recorder of a config's records section: the running one if the section is the same; None without one.

    Raises:
        ValueError: the database's address or driver can't be used.
    """
    if settings.records is None:
        return None
    if running is not None and running.identity == identity(settings.records):
        return running
    return Recorder(settings.records, metrics)


async def _live(settings: Config, metrics: Metrics) -> Live:
    scorer = await checkpoint_watcher.open_scorer(settings, metrics)
    keys = {key.sha256: key.name for key in settings.auth.keys} if settings.auth else {}
    names, opened = served_names(settings.pools), pools.open_pools(settings, metrics)
    return Live(settings, opened, keys, names, scorer, config.routing_settings(settings))


def _usual_shares(live: Live, control: Control) -> dict[str, float]:
    """Each pool's share at the threshold in force, by the checkpoint's curve; {} where it can't tell."""
    rule = live.config.routing.rule
    return scoring.usual_shares(live.scorer.runtime, tuple(live.config.pools), rule, control.threshold)


def _share_settings(settings: Config) -> tuple[object, ...]:
    """What the pools' usual shares depend on, beside the traffic."""
    routing = settings.routing
    return routing.rule, routing.threshold, routing.target, tuple(settings.pools)


async def _drain(gateway: Gateway) -> None:
    """Lets running requests finish while /readyz fails; new ones are still served, on connections that then close."""
    gateway.draining = True
    log.info("stopping: %d requests are still running", gateway.active)
    try:
        async with asyncio.timeout(gateway.live.config.timeouts.drain_s):
            await gateway.idle.wait()
    except TimeoutError:
        log.warning("%d requests were still running after timeouts.drain_s and are cut off", gateway.active)


async def _close(gateway: Gateway) -> None:
    """Closes what the gateway holds, after its last request, and waits for all worker threads."""
    await gateway.upstream.close()
    if gateway.recorder is not None:
        await asyncio.to_thread(gateway.recorder.close)
    candidate = (gateway.control.candidate,) if gateway.control.candidate else ()
    working = (*gateway.retired, gateway.live.scorer, *candidate)
    for worker in working:
        worker.close()
    for worker in working:
        await asyncio.to_thread(worker.join)


def _address(item: socket.socket) -> str:
    host, port = item.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
