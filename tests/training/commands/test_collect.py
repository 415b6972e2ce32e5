"""collect against servers that play an OpenAI backend, well and badly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.training.commands import collect
from depo_gateway.training.judging import openai_client
from depo_gateway.training.outcomes import prompts as prompts_file
from depo_gateway.training.outcomes import sampling_client
from depo_gateway.training.rewards.verifiers import Grader
from tests.training.openai_server import always, command, completion, server, table


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": f"{i}+0=", "answer": "7", "source": "sums"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.001)


def test_an_outcome_table_of_pass_rates_and_token_confidences(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_right(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, completion(["7", "6"] * (body["n"] // 2))

    out = tmp_path / "out.jsonl"
    with server(half_right) as small, server(always("7"), ("org/big",)) as large:
        backends_words = ("--backends", f"small={small.url}", f"large={large.url}/v1/")
        assert command("--prompts", prompts, *backends_words, "--out", out, "--k", 4) == 0
    rows = table(out)
    assert len(rows) == 10
    assert rows["3+0="] == {
        "question": "3+0=",
        "source": "sums",
        "correct": {"model-a": 0.5, "org/big": 1.0},
        "token_confidence": {"model-a": 0.6065, "org/big": 0.6065},
        "completions": {model: {"graded": 4, "tokens": [3, 3, 3, 3]} for model in ("model-a", "org/big")},
    }
    asked = small.bodies[-1]
    assert (asked["n"], asked["temperature"], asked["logprobs"], asked["model"]) == (4, 1.0, True, "model-a")
    said = capsys.readouterr()
    assert f"depo-train fit --outcomes {out} --pools small=model-a large=org/big" in said.out
    assert "model-a 0.500 of 10" in said.out
    assert said.err == ""  # no progress bar where there is no terminal


def test_a_server_without_n_or_logprobs_is_asked_one_by_one(prompts: Path, tmp_path: Path) -> None:
    def plain(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        if "logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported"}}
        return 200, completion(["7"], logprob=None)  # one choice whatever n says

    out = tmp_path / "out.jsonl"
    with server(plain) as one, server(always("7"), ("b",)) as two:
        assert command("--prompts", prompts, "--backends", f"s={one.url}", f"l={two.url}", "--out", out, "--k", 3) == 0
    assert (
        sum("n" not in body and "logprobs" not in body and body["max_tokens"] > 1 for body in one.bodies) == 30 + 1
    )  # and the probe
    assert all(set(row["token_confidence"]) == {"b"} for row in table(out).values())


def test_a_second_run_asks_only_for_what_is_missing_and_cuts_off_a_torn_line(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with server(always("7")) as small, server(always("7"), ("b",)) as large:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", f"l={large.url}", "--out", out)
        assert command(*words) == 0
        lines = out.read_text().splitlines(keepends=True)
        out.write_text("".join(lines[:6]) + lines[6][:20])
        small.bodies.clear()
        assert command(*words) == 0
        assert len(small.bodies) == 1 + 4  # the probe and four prompts
        assert sorted(out.read_text().splitlines()) == sorted("".join(lines).splitlines())
        small.bodies.clear()
        assert command(*words) == 0
        assert len(small.bodies) == 1


def test_rows_of_version_0_1_are_kept_and_said_to_be_graded_otherwise(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"question": "3+0=", "correct": {"model-a": 0.25}}) + "\n")
    with server(always("7")) as small:
        assert command("--prompts", prompts, "--backends", f"small={small.url}", "--out", out, "--k", 1) == 0
    assert "1 rows were written by version 0.1, which graded some answers otherwise" in capsys.readouterr().err
    assert table(out)["3+0="]["correct"] == {"model-a": 0.25}


def test_busy_answers_and_hang_ups_are_tried_again(prompts: Path, tmp_path: Path) -> None:
    def shaky(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return [(429, {}), (503, {}), (0, {}), always("7")(body, calls)][calls % 4]

    out = tmp_path / "out.jsonl"
    with server(shaky) as small, server(always("7"), ("b",)) as large:
        words = ("--backends", f"s={small.url}", f"l={large.url}", "--out", out, "--concurrency", 1)
        assert command("--prompts", prompts, *words) == 0
    assert len(table(out)) == 10


def test_a_backend_that_dies_midway_ends_it_with_one_line_and_keeps_the_rows(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dying(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return always("7")(body, calls) if calls <= 6 else (500, {})

    out = tmp_path / "out.jsonl"
    with server(dying) as small, server(always("7"), ("b",)) as large:
        words = ("--backends", f"s={small.url}", f"l={large.url}", "--out", out, "--concurrency", 1)
        assert command("--prompts", prompts, *words) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"s: {small.url} answers 500, 6 times in a row; {out} is kept, and the same command continues it"
    )
    assert said.count("\n") == 1
    assert len(table(out)) == 5  # all but the probe


def test_a_prompt_that_one_server_refuses_has_no_label_there(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        if body["messages"][0]["content"] == "3+0=":
            return 400, {"error": {"message": "too\nlong"}}
        return always("7")(body, calls)

    out = tmp_path / "out.jsonl"
    with server(picky) as small, server(always("7"), ("b",)) as large:
        assert command("--prompts", prompts, "--backends", f"s={small.url}", f"l={large.url}", "--out", out) == 0
    rows = table(out)
    assert set(rows["3+0="]["correct"]) == {"b"}
    assert set(rows["4+0="]["correct"]) == {"model-a", "b"}
    assert "model-a refused 1 of 10 prompts, for instance: 400 too long" in capsys.readouterr().err


def test_a_prompt_that_always_fails_is_counted_as_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def choking(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        if body["messages"][0]["content"] in ("3+0=", "5+0="):
            return 500, {"error": {"message": "out of\nmemory"}}
        return (0, {}) if body["messages"][0]["content"] == "7+0=" else always("7")(body, calls)

    out = tmp_path / "out.jsonl"
    with server(choking) as small, server(always("7"), ("b",)) as large:
        words = ("--backends", f"s={small.url}", f"l={large.url}", "--out", out, "--concurrency", 1)
        assert command("--prompts", prompts, *words) == 0
    rows = table(out)
    assert len(rows) == 10
    assert [name for name, row in rows.items() if "model-a" not in row["correct"]] == ["3+0=", "5+0=", "7+0="]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model-a refused 3 of 10 prompts, for instance: s: http")
    assert line.endswith("answers 500 out of memory, 6 times in a row")


def test_a_server_that_refuses_every_prompt_ends_in_1(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        refused = body["messages"][0]["content"] != sampling_client.SIMPLEST[0]["content"]
        return (400, {"error": {"message": "no"}}) if refused else always("7")(body, calls)

    out = tmp_path / "out.jsonl"
    with server(full) as small, server(always("7"), ("b",)) as large:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", f"l={large.url}", "--out", out)
        for message in ("model-a refused every prompt: 400 no\n", ""):  # the second time there is nothing left to ask
            assert command(*words) == 1
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err == f"{message}{out} has no outcome of model-a: there is nothing to fit\n"


def test_the_probe_asks_for_as_many_tokens_as_the_prompts(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return (400, {"error": {"message": "too many"}}) if body["max_tokens"] > 99 else always("7")(body, calls)

    with server(short) as small:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", "--out", tmp_path / "out.jsonl")
        assert command(*words, "--max-tokens", 100) == 1
        assert "does not complete a chat: 400 too many" in capsys.readouterr().err
        assert command(*words, "--max-tokens", 99) == 0


@pytest.mark.parametrize("link", [False, True])
def test_the_prompts_file_is_not_written_over(prompts: Path, tmp_path: Path, link: bool) -> None:
    prompts.write_text(prompts.read_text().rstrip("\n"))
    before = prompts.read_bytes()
    out = tmp_path / "link.jsonl" if link else prompts
    if link:
        out.symlink_to(prompts)
    with server(always("7")) as small, pytest.raises(ValueError, match=r"is the prompts file; give --out another file"):
        command("--prompts", prompts, "--backends", f"s={small.url}", "--out", out)
    assert prompts.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--k", 2), "with k 8, not 2"),
        (("--temperature", 0.5), "with temperature 1.0, not 0.5"),
        (("--verifier", "exact"), "with verifier number, not exact"),
        (("--max-tokens", 9), "with max_tokens 512, not 9"),
    ],
)
def test_rows_drawn_in_another_way_are_not_mixed_in(
    prompts: Path, tmp_path: Path, words: tuple[object, ...], difference: str
) -> None:
    out = tmp_path / "out.jsonl"
    with server(always("7")) as small:
        first = ("--prompts", prompts, "--backends", f"s={small.url}", "--out", out)
        assert command(*first) == 0
        before = out.read_bytes()
        with pytest.raises(ValueError, match=f"was collected {difference}: give --out another file"):
            command(*first, *words)
        assert out.read_bytes() == before
        assert command(*first) == 0


def test_no_server_is_one_clear_line(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--prompts", prompts, "--backends", "s=http://127.0.0.1:9", "--out", tmp_path / "out.jsonl") == 1
    said = capsys.readouterr().err
    assert said.startswith("s: no OpenAI server at http://127.0.0.1:9 (")
    assert said.endswith(")\n")
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="--backends s=localhost:9: a URL begins with http"):
        command("--prompts", prompts, "--backends", "s=localhost:9", "--out", tmp_path / "out.jsonl")


def test_models_are_named_where_they_must_be(prompts: Path, tmp_path: Path) -> None:
    words = ("--prompts", prompts, "--out", tmp_path / "out.jsonl")
    with server(always("7"), ("a", "b")) as both, server(always("7"), ("a",)) as one:
        with pytest.raises(ValueError, match="serves a, b; choose by --model s=NAME"):
            command(*words, "--backends", f"s={both.url}")
        with pytest.raises(ValueError, match="serves a, b, not 'c'"):
            command(*words, "--backends", f"s={both.url}", "--model", "s=c")
        with pytest.raises(ValueError, match="--model names 't', but the pools are s"):
            command(*words, "--backends", f"s={both.url}", "--model", "t=c")
        with pytest.raises(ValueError, match="two backends call their model 'a'"):
            command(*words, "--backends", f"s={both.url}", f"l={one.url}", "--model", "s=a")
        assert command(*words, "--backends", f"s={both.url}", f"l={one.url}", "--model", "s=b") == 0
        with pytest.raises(ValueError, match=r"was collected from a, b, not from a:"):
            command(*words, "--backends", f"s={one.url}")


def test_an_api_key_comes_from_the_environment(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(always("7")) as small:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", "--out", tmp_path / "out.jsonl")
        with pytest.raises(ValueError, match="the environment has no COLLECT_TEST_KEY"):
            command(*words, "--api-key-env", "s=COLLECT_TEST_KEY")
        monkeypatch.setenv("COLLECT_TEST_KEY", "abc")
        assert command(*words, "--api-key-env", "s=COLLECT_TEST_KEY") == 0
    assert small.keys == {"Bearer abc"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a", "answer": "1"', "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        ('{"answer": "1"}', 'line 2: needs either "question" or "messages"'),
        ('{"question": "a", "messages": [], "answer": "1"}', 'line 2: needs either "question" or "messages"'),
        ('{"question": "", "answer": "1"}', 'line 2: "question" must be a text'),
        ('{"messages": ["hi"], "answer": "1"}', 'line 2: "messages" must be a list'),
        ('{"question": "a"}', r'line 2: needs "answer", .*; without references, have a judge grade \(--judge\)'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "x", "answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        prompts_file.read_prompts(path)


def test_prompts_are_read_once_each_whichever_form_they_have(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}], "answer": 3, "group": "g"}
    path.write_text('{"question": "x", "answer": 1}\n\n' + 2 * (json.dumps(chat) + "\n"))
    first, second = prompts_file.read_prompts(path)
    assert first.messages == ({"role": "user", "content": "x"},)
    assert (second.reference, second.row) == ("3", {"messages": chat["messages"], "group": "g"})


def test_requests_in_flight_stay_within_the_limit(tmp_path: Path, prompts: Path) -> None:
    flying, most = 0, 0
    lock = threading.Lock()

    def slow(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.01)
        with lock:
            flying -= 1
        return always("7")(body, calls)

    with server(slow) as small:
        words = ("--backends", f"s={small.url}", "--out", tmp_path / "out.jsonl", "--concurrency", 3)
        assert command("--prompts", prompts, *words) == 0
    assert most == 3


def test_ctrl_c_leaves_a_file_that_can_be_continued(prompts: Path, tmp_path: Path) -> None:
    def slow(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.2)
        return always("7")(body, calls)

    out = tmp_path / "out.jsonl"
    program = (
        "import argparse, sys; from depo_gateway.training.commands import collect; parser = argparse.ArgumentParser();"
        "collect.add_arguments(parser); sys.exit(collect.run(parser.parse_args()))"
    )
    with server(slow) as small:
        words = ["--prompts", str(prompts), "--backends", f"s={small.url}", "--out", str(out), "--concurrency", "1"]
        running = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        deadline = time.monotonic() + 30
        while not (out.exists() and out.read_text().count("\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=30)
        assert running.returncode == 1
        assert said.decode() == f"interrupted; {out} is kept, and the same command continues it\n"
        assert 2 <= len(table(out)) < 10
        assert command(*words) == 0
    assert len(table(out)) == 10


def test_nothing_here_imports_torch() -> None:
    program = "import sys, depo_gateway.training.commands.collect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_nothing_passed_at_any_pool_ends_in_1_with_the_remedy(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(always("8")) as one, server(always("9"), ("b",)) as two:
        urls = (f"s={one.url}", f"l={two.url}")
        words = ("--prompts", prompts, "--backends", *urls, "--out", tmp_path / "out.jsonl", "--k", 1)
        for _ in range(2):  # the second time all rows are there
            assert command(*words) == 1
            said = capsys.readouterr()
            assert "no answer passed at any pool, so there is nothing to fit: check that --verifier number" in said.err
            assert "next:" not in said.out


def test_mathematics_is_graded_in_worker_processes_and_a_timeout_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"question": f"{i}/2=", "answer": rf"\frac{{{i}}}{{2}}"} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    endless = r"\boxed{9^{9^{9^9}}}"

    def reply(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        last = {"1/2=": [endless], "3/2=": [endless] * 3}.get(body["messages"][0]["content"], [])
        return 200, completion([r"\boxed{0.5}", "1/2", "1"][: 3 - len(last)] + last)

    monkeypatch.setattr(collect, "Grader", partial(Grader, deadline_s=2.0))
    with server(reply) as small:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", "--out", out, "--k", 3)
        assert command(*words, "--verifier", "math") == 0
        with pytest.raises(ValueError, match="was collected with verifier math, not number"):
            command(*words)
    correct = {question: row["correct"].get("model-a") for question, row in table(out).items()}
    assert correct == {"0/2=": 0, "1/2=": 1, "2/2=": 1 / 3, "3/2=": None, "4/2=": 0, "5/2=": 0}  # of those graded
    assert table(out)["1/2="]["completions"] == {"model-a": {"graded": 2, "timeout": 1, "tokens": [3, 3, 3]}}
    said = capsys.readouterr()
    assert "s: of 18 completions 14 graded, 4 over the verifier's deadline\n" in said.out
    assert "1 prompts have no label of any pool; their rows hold the counts alone\n" in said.out
    assert "model-a 0.267 of 5" in said.out


def test_a_verifier_of_ones_own_grades_or_ends_it_with_one_line(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "def half(completion, reference): return float(completion == reference) / 2\n"
        "def grade(completion, reference): return 2.0\n"
        "def fails(completion, reference): return 1 / 0\n"
    )
    out = tmp_path / "out.jsonl"
    with server(always("7")) as small, server(always("8"), ("b",)) as large:
        words = ("--prompts", prompts, "--backends", f"s={small.url}", f"l={large.url}", "--out", out)
        for function, said in (
            ("fails", "raised ZeroDivisionError: division by zero, at the completion '"),
            ("grade", "gave 2; an outcome is between 0 and 1"),
        ):
            assert command(*words, "--verifier", f"{tmp_path}/own.py:{function}") == 1
            err = capsys.readouterr().err
            assert f"own.py:{function} {said}" in err
            assert err.count("\n") == 1
        with pytest.raises(ValueError, match=r"cannot import no_such_module"):
            command(*words, "--verifier", "no_such_module:f")
        out.unlink()
        assert command(*words, "--verifier", f"{tmp_path}/own.py:half") == 0
    assert all(row["correct"] == {"model-a": 0.5, "b": 0} for row in table(out).values())


def test_ctrl_c_while_grading_ends_at_once(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, pathlib, time\n"
        "def sleeps(completion, reference):\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    out = tmp_path / "out.jsonl"
    program = (
        "import argparse, sys; from depo_gateway.training.commands import collect;"
        "from depo_gateway.training.rewards import verifiers; parser = argparse.ArgumentParser();"
        "collect.Grader = lambda name: verifiers.Grader(name, deadline_s=600);"
        "collect.add_arguments(parser); sys.exit(collect.run(parser.parse_args()))"
    )
    with server(always("7")) as small:
        words = ["--prompts", str(prompts), "--backends", f"s={small.url}", "--out", str(out)]
        running = subprocess.Popen(
            [sys.executable, "-c", program, *words, "--verifier", f"{tmp_path}/own.py:sleeps"],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        try:
            _, said = running.communicate(timeout=30)
        finally:
            running.kill()
    assert running.returncode == 1
    assert said.decode() == f"interrupted; {out} is kept, and the same command continues it\n"
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
