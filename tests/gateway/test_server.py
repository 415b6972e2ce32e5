"""The listening sockets."""

import pytest

from gateway import server


def test_what_the_listener_says_when_an_address_is_taken() -> None:
    with server.bind("127.0.0.1", 0, "listen") as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{port}: Address already in use"):
            server.bind("127.0.0.1", port, "admin")
    with pytest.raises(ValueError, match=r"can't listen on nowhere\.invalid:80"):
        server.bind("nowhere.invalid", 80, "listen")
