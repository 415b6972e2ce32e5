"""A real PostgreSQL server of Debian's package `postgresql`, in a directory of its own, for the session.

It runs as another user where the tests run as root, since PostgreSQL refuses root. Where it isn't installed the tests
that need it are skipped; with DEPO_NEEDS_POSTGRES=1, as in .ci/run, they fail.
"""

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
START_SECONDS = 60


class Postgres:
    """One server. `stop` and `start` take it away and bring it back at the same address, with its data."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries, self._directory = binaries, directory
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            self._user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(directory, entry.pw_uid, entry.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._run("initdb", "-D", "data", "-U", "depo", "-A", "trust", "--locale=C.UTF-8", "--no-sync")

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self._directory,
            "fsync": "off",  # the machine isn't what dies here
        }
        command = [str(self._binaries / "postgres"), "-D", "data"]
        command += [f"-c{name}={value}" for name, value in options.items()]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(command, cwd=self._directory, stdout=log, stderr=log, **self._user)
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > until or self._process.poll() is not None:
                    pytest.fail(f"PostgreSQL doesn't start: {(self._directory / 'log').read_text()[-2000:]}")
                time.sleep(0.05)

    def stop(self) -> None:
        """Cuts every connection off, as a server does that is restarted."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://depo:secret@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The address of a new empty database."""
        name = f"records{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        subprocess.run(command, cwd=self._directory, check=True, capture_output=True, **self._user)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    if not BINARIES:
        reason = "Debian's package postgresql isn't installed"
        pytest.fail(reason) if os.environ.get("DEPO_NEEDS_POSTGRES") == "1" else pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="depo-postgres-", dir="/tmp"))  # where another user may go
    try:
        server = Postgres(BINARIES[-1].parent, directory)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: Postgres) -> Iterator[Postgres]:
    """The server, running again after a test that stopped it."""
    yield postgres_server
    if postgres_server._process is None:
        postgres_server.start()


@pytest.fixture(params=["sqlite", "postgresql"])
def records_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty records database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()
