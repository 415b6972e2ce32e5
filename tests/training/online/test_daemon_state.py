"""The daemon's state on disk."""

from pathlib import Path

from depo_gateway.training.online.daemon_state import STATE_FILE, DaemonState, read_state, write_state


def test_the_state_is_read_back_and_a_broken_one_is_the_default(tmp_path: Path) -> None:
    assert read_state(tmp_path) == DaemonState()
    write_state(tmp_path, DaemonState(17, 3.5))
    assert read_state(tmp_path) == DaemonState(17, 3.5)
    (tmp_path / STATE_FILE).write_text('{"seq": ')
    assert read_state(tmp_path) == DaemonState()
