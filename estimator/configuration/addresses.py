"""Checks of addresses and secrets in settings. Every mistake is a ValueError of one sentence."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

SQLITE = "sqlite:///"
DATABASES = (SQLITE, "postgresql://", "postgresql+psycopg://")


def check_secret(variable: str | None, where: str) -> None:
    """The environment variable holds a bare value. `where` names the setting; `variable` None: none is needed."""
    if variable is None:
        return
    value = os.environ.get(variable, "")
    if not value:
        raise ValueError(f"{where}: the environment variable {variable!r} is not set")
    if not value.isascii() or not value.isprintable() or value != value.strip():
        raise ValueError(
            f"{where}: {variable!r} holds a line break, surrounding blanks or non-ASCII characters; set the bare value"
        )


def check_http(url: str, where: str, query: bool = False) -> None:
    """An http or https address without a key in it; `query` allows `?…`."""
    if "@" in url:  # not shown, because it may hold a secret
        raise ValueError(f"{where} holds an '@'; give a key by api_key_env, not in the address")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment and parts.port != 0
        valid = valid and (query or not parts.query) and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{where} {url!r} is not an http or https address such as http://vllm-small:8000")


def placed_database(url: str, where: str, directory: Path) -> str:
    """SQLAlchemy's address of a database, an SQLite file's path made absolute from `directory`."""
    if url.partition("?")[0] in ("sqlite://", SQLITE, f"{SQLITE}:memory:"):
        raise ValueError(f"{where} {url} names no file; write sqlite:///FILE, because records must outlive the process")
    if not url.startswith(DATABASES):
        raise ValueError(f"{where} must be sqlite:///FILE or postgresql://HOST/DATABASE")
    if not url.startswith(SQLITE):
        return url
    return SQLITE + str(directory.absolute() / Path(url.removeprefix(SQLITE)).expanduser())
