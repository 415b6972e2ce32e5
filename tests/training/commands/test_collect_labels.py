"""What collect gives no label, what it counts as wrong, and what it and fit say of it: scripted OpenAI servers."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from depo_gateway import gateway
from depo_gateway.training.__main__ import main
from depo_gateway.training.commands import fit
from depo_gateway.training.judging import openai_client
from depo_gateway.training.outcomes.collection_summary import CollectionSummary
from depo_gateway.training.outcomes.sampling_client import Backend
from depo_gateway.training.outcomes.table import cut_off_models, parse_pools, read_tables
from tests.training.openai_server import Reply, always, command, completion, server, table


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+0=", "answer": "7"}) + "\n" for i in range(10)))
    return path


def choices(*ends: tuple[str | None, str | None], **message: Any) -> dict[str, Any]:
    """A chat's answer of (content, finish_reason) pairs."""
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
            for text, reason in ends
        ]
    }


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def both(path: Path, out: Path, small: Reply, *words: object) -> int:
    """Runs collect with a small server that replies so and a large one that is always right."""
    with server(small) as one, server(always("7"), ("b",)) as two:
        urls = (f"s={one.url}", f"l={two.url}")
        return command("--prompts", path, "--backends", *urls, "--out", out, "--k", 4, *words)


def test_cut_off_completions_have_no_label_and_unreadable_ones_are_wrong(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {
        "0+0=": choices(("7", "stop"), ("so 7", "length"), ("8", "stop"), ("I don't know", "stop")),
        "1+0=": choices(*[("7 and on", "length")] * 4),
        "2+0=": choices(("7", "stop"), ("7", "abort"), ("", "stop"), (None, "stop")),
    }

    def small(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, replies.get(asked(body)) or choices(*[("7", "stop")] * body.get("n", 1))

    out = tmp_path / "out.jsonl"
    assert both(prompts, out, small) == 0
    rows = table(out)
    assert rows["0+0="]["correct"] == {"model-a": pytest.approx(1 / 3), "b": 1}
    assert rows["0+0="]["completions"]["model-a"] == {"graded": 2, "unreadable": 1, "cut_off": 1}
    assert rows["1+0="]["correct"] == {"b": 1}  # all cut off: the row stays, with the counts
    assert rows["1+0="]["completions"]["model-a"] == {"cut_off": 4}
    assert rows["2+0="]["correct"]["model-a"] == pytest.approx(1 / 3)
    assert rows["2+0="]["completions"]["model-a"] == {"graded": 1, "unreadable": 2, "aborted": 1}
    summary = (
        "s: of 40 completions 31 graded, 3 finished without a readable result (counted as wrong), 5 cut off,"
        " 1 broken off by the server\n"
    )
    assert summary in capsys.readouterr().out
    assert both(prompts, out, small) == 0  # everything is there
    assert summary in capsys.readouterr().out


def test_prompts_whose_completions_were_all_cut_off_stay_counted_and_are_not_asked_again(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        reason = "length" if asked(body) in ("3+0=", "4+0=") else "stop"
        return 200, choices(*[("7", reason)] * body.get("n", 1))

    out = tmp_path / "out.jsonl"
    with server(cut) as one, server(cut, ("b",)) as two:
        urls = (f"s={one.url}", f"l={two.url}")
        words = ("--prompts", prompts, "--backends", *urls, "--out", out, "--k", 2)
        for _ in range(2):
            one.bodies.clear()
            assert command(*words) == 0
            said = capsys.readouterr()
            assert "2 prompts have no label of any pool; their rows hold the counts alone\n" in said.out
            assert "s: 20% of the completions were cut off at --max-tokens 512; --max-tokens 1024 would do" in said.err
            assert "next:" not in said.out
        assert len(one.bodies) == 1  # the probe
    assert table(out)["3+0="]["correct"] == {}
    assert len(read_tables([out])) == 10


def test_fit_refuses_a_table_with_many_cut_off_completions_unless_told(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, choices(("7", "stop"), ("7", "length"), ("7", "stop"), ("7", "stop"))

    out = tmp_path / "out.jsonl"
    assert both(prompts, out, cut) == 0
    assert "depo-train fit refuses this table unless --allow-cut-off" in capsys.readouterr().err
    pools = parse_pools(["small=model-a", "large=b"])
    rows = read_tables([out])
    assert cut_off_models(rows, pools) == "25% of the completions of model-a (pool small)"
    assert cut_off_models(rows, parse_pools(["large=b"])) == ""

    def fitted(*words: str) -> None:
        parser = argparse.ArgumentParser()
        fit.add_arguments(parser)
        given = ["--outcomes", str(out), "--pools", "small=model-a", "large=b", "--out", str(tmp_path / "checkpoint")]
        fit.run(parser.parse_args([*given, *words]))

    message = r"25% of the completions of model-a \(pool small\) were cut off .* or fit with --allow-cut-off$"
    with pytest.raises(ValueError, match=message):
        fitted()
    capsys.readouterr()
    fitted("--allow-cut-off")
    said = "depo-train fit: 25% of the completions of model-a (pool small) were cut off and have no label: results are"
    assert said in capsys.readouterr().err


def test_calibrate_refuses_it_too_and_evaluate_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table_path = tmp_path / "t.jsonl"
    rows = [
        {
            "question": f"{'hard' if index % 2 else 'easy'} question number {index}",
            "correct": {"a": 1 - index % 2, "b": 1},
            "completions": {"a": {"graded": 3, "cut_off": 1}, "b": {"graded": 4}},
        }
        for index in range(60)
    ]
    table_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--checkpoint", tiny_checkpoint, "--outcomes", table_path, "--pools", "small=a", "large=b"]
    assert main(["calibrate", *map(str, words), "--out", str(tmp_path / "c1")]) == 2
    assert "or calibrate with --allow-cut-off" in capsys.readouterr().err
    said = "25% of the completions of a (pool small) were cut off and have no label: results are biased"
    assert main(["calibrate", *map(str, words), "--out", str(tmp_path / "c2"), "--allow-cut-off"]) == 0
    assert said in capsys.readouterr().err
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "e")]) == 0
    assert said in capsys.readouterr().err
    assert f"{said}.**" in (tmp_path / "e" / "report.md").read_text()


def test_a_tenth_cut_off_is_still_fitted_and_old_tables_tell_nothing(tmp_path: Path) -> None:
    path, pools = tmp_path / "t.jsonl", parse_pools(["s=a"])
    row = {"question": "x", "correct": {"a": 1}, "completions": {"a": {"graded": 9, "cut_off": 1, "tokens": [3]}}}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"question": "y", "correct": {"a": 0.5}}) + "\n")
    assert cut_off_models(read_tables([path]), pools) == ""
    path.write_text(json.dumps({**row, "completions": {"a": {"graded": 8, "cut_off": 1}}}) + "\n")
    assert cut_off_models(read_tables([path]), pools) != ""


@pytest.mark.parametrize(
    "counts", [{"a": 3}, {"a": {"graded": -1}}, {"a": {"graded": True}}, [], {"a": {"tokens": 1.5}}]
)
def test_malformed_counts_name_their_line(tmp_path: Path, counts: object) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"question": "x", "correct": {"a": 1}, "completions": counts}) + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:1: completions must be an object"):
        read_tables([path])


def test_the_max_tokens_that_would_do_is_estimated_from_the_lengths(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths 100, 200, ... 600 under a limit of 512: the last is cut off."""

    def small(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        lengths = [100, 200, 300, 400, 500, 600][: body.get("n", 1)]
        answer = completion(["7"] * len(lengths))
        for choice, length in zip(answer["choices"], lengths, strict=True):
            choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}] * min(length, 512)}
            choice["finish_reason"] = "length" if length > 512 else "stop"
        return 200, answer

    assert both(prompts, tmp_path / "out.jsonl", small, "--k", 6) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s: 17%")]
    wanted = int(line.split("--max-tokens ")[2].split()[0])
    assert 640 <= wanted <= 2048
    assert "an estimate, by a log-normal distribution fitted to the lengths of the 50 that finished" in line


def test_references_that_the_verifier_cannot_use_are_refused_with_their_lines(tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    answers = ["7", "see below", "8", "", "9"]
    path.write_text("".join(json.dumps({"question": f"{i}", "answer": a}) + "\n\n" for i, a in enumerate(answers)))
    with server(always("7")) as one:
        words = ("--prompts", path, "--backends", f"s={one.url}", "--out", out)
        message = r"the verifier number can't use the answers of 2 of 5 prompts \(line 3, 'see below': .*; line 7, ''"
        with pytest.raises(ValueError, match=message):
            command(*words)
        assert one.bodies == []  # before anything is asked
        with pytest.raises(ValueError, match=r"the verifier exact can't use the answers of 1 of 5 prompts \(line 7"):
            command(*words, "--verifier", "exact")
    assert not out.exists()


THINKING = [  # content, other fields of the message, finish_reason -> correct, outcome
    ("7", {"reasoning": "8? No, 7."}, "stop", 1.0, "graded"),
    ("7", {"reasoning_content": "8? No, 7."}, "stop", 1.0, "graded"),
    ("<think>8? No.</think>\n7", {}, "stop", 1.0, "graded"),
    ("8? No.</think>\n7", {}, "stop", 1.0, "graded"),  # the chat template opened it
    (None, {"reasoning": "It is 7, or"}, "length", None, "cut_off"),
    ("<think>It is 7", {}, "length", None, "cut_off"),
    ("It is 7", {}, "length", None, "cut_off"),  # the chat template opened it
    ("<think>It is 7", {}, None, None, "cut_off"),  # a server that gives no reason
    (None, {"reasoning": "It is 7."}, "stop", 0.0, "unreadable"),  # finished, and a client gets no answer
    ("<think>It is 7", {}, "stop", 0.0, "unreadable"),
]


@pytest.mark.parametrize(("content", "fields", "reason", "correct", "outcome"), THINKING)
def test_only_what_follows_the_reasoning_is_graded(
    prompts: Path,
    tmp_path: Path,
    content: str | None,
    fields: dict[str, str],
    reason: str | None,
    correct: float | None,
    outcome: str,
) -> None:
    def thinks(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, choices(*[(content, reason)] * body.get("n", 1), **fields)

    out = tmp_path / "out.jsonl"
    assert both(prompts, out, thinks) == (1 if correct is None else 0)
    row = table(out)["3+0="]
    assert row["correct"].get("model-a") == correct
    assert row["completions"]["model-a"] == {outcome: 4}


def test_extra_fields_go_into_each_request_and_into_the_settings(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    extra = '{"chat_template_kwargs": {"enable_thinking": false}, "top_p": 0.9}'
    with server(always("7")) as one, server(always("7"), ("b",)) as two:
        words = ("--prompts", prompts, "--backends", f"s={one.url}", f"l={two.url}", "--out", out)
        assert command(*words, "--extra-body", f"s={extra}") == 0
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in one.bodies)
        assert not any("chat_template_kwargs" in body for body in two.bodies)
        with pytest.raises(ValueError, match=r"was collected with extra_body \{'model-a': .*\}, not none"):
            command(*words)
        assert command(*words, "--extra-body", f"s={extra}") == 0
        for value, message in (
            ("{", "--extra-body s: not JSON"),
            ("[]", "--extra-body s: must be a JSON object"),
            ('{"n": 3, "max_tokens": 9}', "--extra-body s: max_tokens, n can't be set here"),
        ):
            with pytest.raises(ValueError, match=message):
                command(*words, "--extra-body", f"s={value}")


def test_token_confidence_is_that_of_finished_completions(prompts: Path, tmp_path: Path) -> None:
    def small(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        answer = completion(["7"] * body.get("n", 1))
        answer["choices"][0] |= completion(["7"], -3.0, finish_reason="length")["choices"][0]
        return 200, answer

    out = tmp_path / "out.jsonl"
    assert both(prompts, out, small) == 0
    assert table(out)["3+0="]["token_confidence"] == {"model-a": 0.6065, "b": 0.6065}


@pytest.fixture(scope="module")
def demo_servers() -> Iterator[dict[str, str]]:
    """llama.cpp on the two language models that are shipped with the demo."""
    pytest.importorskip("xllamacpp")
    data = Path(gateway.__file__).parent / "demo" / "data"
    with ExitStack() as stack:
        urls = {}
        for name in ("small", "large"):
            words = ["--model", str(data / name / "model.gguf"), "--port", "0"]
            program = [sys.executable, "-m", "depo_gateway.gateway.demo.llama_server", *words]
            running = stack.enter_context(subprocess.Popen(program, stdout=subprocess.PIPE, text=True))
            stack.callback(running.terminate)
            assert running.stdout is not None
            urls[name] = running.stdout.readline().split()[-1]
        yield urls


def test_real_models_without_room_are_cut_off_and_what_is_suggested_suffices(
    demo_servers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = (Path(gateway.__file__).parent / "demo" / "data" / "queries.jsonl").read_text().splitlines()[:24]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(queries) + "\n")
    words = ["--prompts", prompts, "--backends", *(f"{name}={url}" for name, url in demo_servers.items()), "--k", 4]
    assert command(*words, "--out", tmp_path / "short.jsonl", "--max-tokens", 36) == 0
    said = capsys.readouterr()
    assert "no label of any pool; their rows hold the counts alone" in said.out
    wanted = re.findall(r"collect again with --max-tokens (\d+) and another --out", said.err)
    assert command(*words, "--out", tmp_path / "long.jsonl", "--max-tokens", wanted[0]) == 0
    assert "cut-off" not in capsys.readouterr().err
    short, long = (CollectionSummary() for _ in range(2))
    for path, summary in (("short.jsonl", short), ("long.jsonl", long)):
        for row in table(tmp_path / path).values():
            summary.add(row)
    assert short.completions["small"].cut_off > 0.1 > long.completions["small"].cut_off
    assert max(long.completions["small"].lengths) > 36 >= max(short.completions["small"].lengths)


def test_the_progress_line_shows_what_is_not_simply_graded() -> None:
    summary = CollectionSummary()
    backends = [Backend("small", "http://s", "org/s", {}), Backend("large", "http://l", "org/l", {})]
    assert summary.progress(backends) == {"small": "-", "large": "-"}
    counts = {"org/s": {"graded": 5, "unreadable": 1, "cut_off": 1, "timeout": 1}, "org/l": {"graded": 8}}
    summary.add({"question": "x", "correct": {"org/s": 0.5, "org/l": 1.0}, "completions": counts})
    assert summary.progress(backends) == {"small": "0.50 (1 unreadable, 1 cut off, 1 no label)", "large": "1.00"}


def test_every_completion_is_saved_with_its_label(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mixed(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, choices(("7", "stop"), ("It grows", "length"), ("8", "stop"), ("none", "stop"))

    saved = tmp_path / "saved.jsonl"
    assert both(prompts, tmp_path / "out.jsonl", mixed, "--save-completions", saved) == 0
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    first = [line for line in lines if line["question"] == lines[0]["question"] and line["model"] == "model-a"]
    assert [(line["completion"], line["outcome"], line["score"]) for line in first] == [
        ("7", "graded", 1.0),
        ("It grows", "cut_off", None),
        ("8", "graded", 0.0),
        ("none", "unreadable", 0.0),
    ]
    assert {line["answer"] for line in lines} == {"7"}
    assert len(lines) == 2 * 4 * len(table(tmp_path / "out.jsonl"))
    for path, words in ((tmp_path / "out.jsonl", "is the file of --out"), (tmp_path / "no" / "f", "No such file")):
        with pytest.raises(ValueError, match=words):
            both(prompts, tmp_path / "out.jsonl", mixed, "--save-completions", path)
