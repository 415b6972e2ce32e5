"""The depo-gateway command, mostly as a user runs it: in a process of its own."""

import json
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway import __version__
from depo_gateway.gateway import __main__, config
from tests.estimator.poisoned import KINDS, poisoned

COMMAND = [sys.executable, "-m", "depo_gateway.gateway"]


def run(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The same in this process, which is quicker: (exit status, stdout, stderr)."""
    try:
        status = __main__.main(arguments)
    except SystemExit as left:
        status = int(left.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def write(path: Path, checkpoint: Path, **sections: Any) -> Path:
    pools = {name: {"model": name, "backends": [{"url": f"http://127.0.0.1:9/{name}"}]} for name in ("small", "large")}
    ports = {"listen": {"port": 0}, "admin": {"port": 0}}
    raw = {"version": 1, **ports, "pools": pools, "estimator": {"path": str(checkpoint)}, **sections}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


LEVELS = [(), ("serve",), ("demo",), ("check",), ("keys",), ("keys", "new"), ("seed",)]


@pytest.mark.parametrize("level", LEVELS)
def test_help_and_version_on_every_level(capsys: pytest.CaptureFixture[str], level: tuple[str, ...]) -> None:
    status, out, err = called(capsys, *level, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(" ".join(("usage: depo-gateway", *level)))
    assert called(capsys, *level, "--version") == (0, f"depo-gateway {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("serve",),
        ("serve", "--config"),
        ("serve", "--conf", "x"),
        ("serve", "--config", "x", "--verbose"),
        ("check",),
        ("check", "a", "b"),
        ("keys",),
        ("keys", "new"),
        ("keys", "old", "x"),
        ("demo", "--queries", "many"),
        ("keys", "new", ""),
        ("keys", "new", 'a"b'),
        ("keys", "new", "a\tb"),
        ("seed",),
        ("seed", "checkpoints"),
        ("seed", "checkpoints", "--pools"),
        ("check", "/nowhere/gateway.yaml"),
        ("serve", "--config", "/nowhere/gateway.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, out, err = called(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("depo-gateway")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_demo_without_its_extra_says_what_to_install() -> None:
    main = "from depo_gateway.gateway.__main__ import main; sys.exit(main(['demo']))"
    program = f"import sys; sys.modules['aiohttp'] = None; {main}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "depo-gateway: the demo needs aiohttp: pip install 'depo-gateway[demo]'\n"


def test_check_prints_the_config_without_secrets(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND_KEY", "sk-backend-secret")
    digest, admin = config.key_digest("one"), config.key_digest("two")
    path = write(
        tmp_path / "gateway.yaml",
        tiny_checkpoint,
        auth={"keys": [{"name": "team-a", "sha256": digest, "requests_per_minute": 60, "large_share": 0.5}]},
        admin={"key_sha256": admin},
        routing={"target": {"large_share": 0.3}},
    )
    raw = yaml.safe_load(path.read_text())
    raw["pools"]["small"]["backends"][0]["api_key_env"] = "BACKEND_KEY"
    raw["estimator"]["candidate"] = str(tiny_checkpoint)
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    status, out, err = called(capsys, "check", str(path))
    assert (status, err) == (0, "")
    shown = yaml.safe_load(out)
    assert shown["pools"]["small"]["backends"][0]["api_key_env"] == "BACKEND_KEY"
    assert shown["timeouts"]["first_token_s"] == 60.0
    key = shown["auth"]["keys"][0]
    assert (key["name"], key["requests_per_minute"], key["large_share"]) == ("team-a", 60.0, 0.5)
    assert shown["routing"]["target"]["large_share"] == 0.3
    assert shown["estimator"]["candidate"] == str(tiny_checkpoint)
    for secret in ("sk-backend-secret", digest, admin):
        assert secret not in out


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"routing": {"threshhold": 1}}, "unknown key 'routing.threshhold'; did you mean 'threshold'?"),
        ({"estimator": {"path": "nowhere"}}, "is no checkpoint"),
        ({"routing": {"target": {"quality": 0.98}}}, "routing.target.quality can't be kept with the estimator"),
        (
            {"pools": {name: {"model": name, "backends": [{"url": "http://x"}]} for name in ("tiny", "huge")}},
            "scores the pools small, large, the config has tiny, huge",
        ),
        ({"records": {"url": "sqlite:////nowhere/records.db"}}, "the directory /nowhere does not exist"),
    ],
)
def test_check_finds_what_serve_would_refuse(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "gateway.yaml", tiny_checkpoint, **sections)
    checked = called(capsys, "check", str(path))
    assert (checked[0], checked[1]) == (2, "")
    assert words in checked[2]
    assert checked[2].count("\n") == 1
    served = run("serve", "--config", str(path))
    assert (served.returncode, served.stdout, served.stderr) == checked


def test_check_loads_the_candidate_too(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"path": str(tiny_checkpoint), "candidate": str(tmp_path / "nowhere")}
    status, out, err = called(capsys, "check", str(write(tmp_path / "gateway.yaml", tiny_checkpoint, estimator=both)))
    assert (status, out) == (2, "")
    assert f"estimator.candidate: {tmp_path / 'nowhere'} is no checkpoint" in err


@pytest.mark.parametrize("kind", ["weights NaN bf16", "encoder NaN", "curve"])
def test_check_refuses_weights_and_calibrations_that_are_not_finite(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    bad = poisoned(tiny_checkpoint, tmp_path / "bad", *KINDS[kind][:2])
    for section, words in (
        ({"path": str(bad)}, f"depo-gateway: checkpoint {bad} can't be used: "),
        ({"path": str(tiny_checkpoint), "candidate": str(bad)}, f"estimator.candidate: checkpoint {bad} can't be used"),
    ):
        path = write(tmp_path / "gateway.yaml", tiny_checkpoint, estimator=section)
        status, out, err = called(capsys, "check", str(path))
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_a_new_key_works_in_a_config_and_in_a_keys_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capsys, "keys", "new", "team é: #1")
    assert (status, err) == (0, "")
    key = re.search(r"sk-depo-[\w-]{40,}", out)
    assert key is not None
    line = out.splitlines()[-1]
    (tmp_path / "keys.yaml").write_text(line)
    (tmp_path / "gateway.yaml").write_text(
        "version: 1\npools:\n  a: {model: a, backends: [{url: http://a}]}\n  b: {model: b, backends: [{url: http://b}]}\n"
        f"auth:\n  keys_file: keys.yaml\n  keys:\n  {line.replace('team', 'other')}\n"
    )
    with pytest.raises(ValueError, match="repeats the name or the digest"):  # the same digest in both places
        config.load_config(tmp_path / "gateway.yaml")
    (tmp_path / "keys.yaml").write_text(called(capsys, "keys", "new", "second")[1].splitlines()[-1])
    auth = config.load_config(tmp_path / "gateway.yaml").auth
    assert auth is not None
    assert [item.name for item in auth.keys] == ["other é: #1", "second"]
    assert auth.keys[0].sha256 == config.key_digest(key.group())
    assert called(capsys, "keys", "new", "x")[1] != called(capsys, "keys", "new", "x")[1]


def test_a_port_that_is_taken_is_a_mistake(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = write(tmp_path / "gateway.yaml", tiny_checkpoint, listen={"port": port})
        ended = run("serve", "--config", str(path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"can't listen on 127.0.0.1:{port}: Address already in use" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_output_that_nobody_reads_is_a_failure_without_a_traceback(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "gateway.yaml", tiny_checkpoint)
    with subprocess.Popen(
        [*COMMAND, "check", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        assert (running.wait(timeout=60), running.stderr.read()) == (1, "")


def test_serve_runs_until_a_signal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "gateway.yaml", tiny_checkpoint)
    with subprocess.Popen([*COMMAND, "serve", "--config", str(path)], stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            for line in running.stderr:
                if " WARNING depo_gateway.gateway.pools: backend " not in line:  # nothing listens at those addresses
                    break
            found = re.fullmatch(
                r"serving (http://[\d.:]+)/v1, metrics at (http://[\d.:]+)/metrics, status page at \2/admin/\n", line
            )
            assert found is not None, line
            with urllib.request.urlopen(found[1] + "/livez", timeout=10) as answer:
                assert json.load(answer) == {"status": "alive"}
            running.terminate()
            assert running.wait(timeout=20) == 0
        finally:
            running.kill()  # after a failure: `with` would wait for ever
        assert "Traceback" not in running.stderr.read()
