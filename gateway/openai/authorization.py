"""The API key that a request carries."""

from collections.abc import Mapping

BEARER_HEADER = "Authorization: Bearer KEY"


def bearer_key(headers: Mapping[bytes, bytes]) -> str:
    """The key in `Authorization: Bearer KEY`; "" without one."""
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
