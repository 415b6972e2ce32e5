"""The name of a request's task (`routing.group`): where it is read from. Pure.

A checkpoint may have weights of named tasks (`fit --groups`), which it adds for a prompt of that name. The name comes
from the client, so it is bounded, goes on the record and into no metric's label.
"""

import hashlib
import re
from collections.abc import Mapping

from depo_gateway.estimator.text import text_of_content
from depo_gateway.gateway.openai.query import Query

LONGEST = 128  # characters; of a longer name a digest stands for it
DIGITS = 16  # of a digest, in hex
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
SECRET_HEADERS = frozenset(("authorization", "proxy-authorization", "cookie", "x-api-key"))


def check_source(source: str) -> None:
    """Raises ValueError: one sentence, `routing.group.from` names no place that can be read."""
    where, _, name = source.partition(":")
    if source in ("key", "system") or (where == "metadata" and name and name == name.strip()):
        return
    if where != "header" or not HEADER_NAME.fullmatch(name):
        raise ValueError(f"routing.group.from is {source!r}; write key, header:NAME, metadata:NAME or system")
    if name.lower() in SECRET_HEADERS:
        raise ValueError(
            f"routing.group.from is {source!r}, a header that holds secrets, and the group goes on the record; name "
            "another header, or write key"
        )


def group_of(source: str | None, key: str, headers: Mapping[bytes, bytes], query: Query) -> str:
    """The name of a request's task by `routing.group.from`; "" where it has none, or none that can be used.

    Args:
        key: the API key's name.
    """
    if source is None:
        return ""
    where, _, name = source.partition(":")
    if where == "key":
        return _usable(key)
    if where == "header":
        return _usable(headers.get(name.lower().encode(), b"").decode("utf-8", "replace"))
    if where == "metadata":
        metadata = query.fields.get("metadata")
        return _usable(metadata.get(name) if isinstance(metadata, dict) else None)
    return _group_of_system_text(query)


def _group_of_system_text(query: Query) -> str:
    """A digest of the text of the system and developer messages: the same for all requests of an application."""
    roles = ("system", "developer")
    texts = [text_of_content(item.get("content")) for item in query.messages if item.get("role") in roles]
    text = "\n".join(filter(None, texts))
    return f"system-{_digest(text)}" if text else ""


def _usable(value: object) -> str:
    """The name without surrounding blanks; "" for what is no printable text."""
    name = value.strip() if isinstance(value, str) else ""
    if not name.isprintable() or "\N{REPLACEMENT CHARACTER}" in name:
        return ""
    return name if len(name) <= LONGEST else f"long-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
