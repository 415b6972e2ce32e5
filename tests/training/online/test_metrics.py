"""The learner's /metrics and /livez."""

import urllib.error
import urllib.request

import pytest

from depo_gateway.training.online.metrics import STALE_SECONDS, Heartbeats, LearnerMetrics, MetricsServer


def test_livez_names_a_loop_without_a_heartbeat() -> None:
    now = [0.0]
    heartbeats = Heartbeats(lambda: now[0])
    heartbeats.beat("refresh")
    heartbeats.beat("shadow")
    with MetricsServer("127.0.0.1", 0, LearnerMetrics("1.2"), heartbeats) as server:
        address = f"http://127.0.0.1:{server.port}"

        def get(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(address + path, timeout=5) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        assert get("/livez") == (200, "ok\n")
        now[0] = STALE_SECONDS + 1
        heartbeats.beat("refresh")
        assert get("/livez") == (503, "no heartbeat from: shadow\n")
        assert 'learner_build_info{version="1.2"} 1.0' in get("/metrics")[1]
        assert get("/")[0] == 404
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{server.port}: Address already in use"):
            MetricsServer("127.0.0.1", server.port, LearnerMetrics("1"), heartbeats)
