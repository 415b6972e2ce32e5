"""collect --judge: labels without references, by a scripted judging model or webhook on loopback."""

import gc
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.training.judging import openai_client
from depo_gateway.training.outcomes.table import examples_of, parse_pools, read_tables
from tests.training.openai_server import Reply, always, command, completion, server

GOOD, POOR = "It is 42, because six times seven is.", "Dunno."


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Chat traffic without references."""
    path = tmp_path / "chats.jsonl"
    turns = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"ask {i}"}] for i in range(12)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["question"] if "question" in row else row["messages"][-1]["content"]: row for row in rows}


def quoted(text: str, place: str) -> str:
    found = re.search(rf"\[begin {place} (\w+)\]\n(.*?)\n\[end {place} \1\]", text, re.DOTALL)
    assert found is not None
    return found[2]


def umpire(grade: Callable[[str, int], float]) -> Reply:
    """A judging model that grades each answer by grade(text, its position)."""

    def reply(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        text = body["messages"][0]["content"]
        first, second = (grade(quoted(text, f"{place} answer"), at) for at, place in enumerate(("first", "second")))
        answer = completion([json.dumps({"first": first, "second": second})], finish_reason="stop")
        return 200, answer | {"usage": {"prompt_tokens": 300, "completion_tokens": 20}}

    return reply


def refuses(status: int, body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
    return status, {}


def judged(chats: Path, out: Path, judge: str, *words: object, small: Reply | None = None) -> int:
    with server(small or always(POOR)) as one, server(always(GOOD), ("b",)) as two:
        urls = (f"small={one.url}", f"large={two.url}")
        return command("--prompts", chats, "--backends", *urls, "--out", out, "--judge", judge, *words)


def test_a_model_labels_chats_without_references(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rubric = tmp_path / "out.jsonl", tmp_path / "rubric.txt"
    rubric.write_text("Grade {kindness} alone.")
    with server(umpire(lambda text, place: 9 if "42" in text else 2), ("org/umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}/v1", "--judge-rubric", rubric) == 0
        assert len(judge.bodies) == 24  # one completion a pool, both orders
        text = judge.bodies[0]["messages"][0]["content"]
        assert "Grade {kindness} alone." in text
        assert "Correctness comes first" not in text
        assert quoted(text, "request").startswith("system: Be kind.\n\nuser: ask ")
        assert {body["model"] for body in judge.bodies} == {"org/umpire"}
    row = rows_of(out)["ask 3"]
    assert row["correct"] == {"model-a": 0.2, "b": 0.9}
    assert row["completions"] == {name: {"graded": 1, "tokens": [3]} for name in ("model-a", "b")}
    said = capsys.readouterr()
    assert "judge: 24 calls and 7680 tokens in this run\n" in said.out
    assert "12 comparisons in both orders; the winner changed with the order in 0% [0, 24] of them\n" in said.out
    assert "the answer in first position won 50% [25, 75] of the verdicts with a winner (unbiased: 50%)" in said.out
    assert "stronger judge" not in said.out
    assert f"{out}: mean quality model-a 0.200 of 12, b 0.900 of 12" in said.out
    assert f"next: depo-train fit --outcomes {out} --pools small=model-a large=b" in said.out
    examples = examples_of(read_tables([out]), parse_pools(["small=model-a", "large=b"]))
    assert examples[0].quality == {"small": 0.2, "large": 0.9}


def test_a_judge_that_prefers_the_first_answer_is_shown_to_do_so(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with server(umpire(lambda text, place: 8 - 6 * place), ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}") == 0
    assert all(row["correct"] == {"model-a": 0.5, "b": 0.5} for row in rows_of(out).values())
    said = capsys.readouterr().out
    assert "the winner changed with the order in 100% [76, 100] of them\n" in said
    assert "the answer in first position won 100% [76, 100] of the verdicts with a winner (unbiased: 50%)" in said
    assert "its grade was +6.0 [+6.0, +6.0] higher of 10\n" in said
    assert "use a stronger judge, or a clearer rubric" in said


def test_a_webhook_labels_and_gets_references_where_there_are_some(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_KEY", "sesame")
    chats.write_text(chats.read_text() + json.dumps({"question": "6*7=", "answer": 42}) + "\n")

    def hook(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        if "ask 5" in str(body["messages"]):
            return 422, {}
        return 200, {"small": 0.25, "large": None if "ask 4" in str(body["messages"]) else 1}

    out = tmp_path / "out.jsonl"
    with server(hook) as service:
        url = f"webhook={service.url}/judge?team=a"
        assert judged(chats, out, url, "--k", 2, "--concurrency", 1, "--judge-api-key-env", "HOOK_KEY") == 0
        assert service.keys == {"Bearer sesame"}
        assert len(service.bodies) == 26
        asked = [body for body in service.bodies if body["reference"] is not None]
        assert [body["messages"] for body in asked] == 2 * [[{"role": "user", "content": "6*7="}]]
        assert {body["reference"] for body in asked} == {"42"}
        assert asked[0]["answers"] == {"small": POOR, "large": GOOD}
        assert len({body["request_id"] for body in service.bodies}) == 26
    rows = rows_of(out)
    assert rows["6*7="]["correct"] == {"model-a": 0.25, "b": 1}
    assert rows["ask 4"]["correct"] == {"model-a": 0.25}
    assert rows["ask 4"]["completions"]["b"] == {"no_verdict": 2, "tokens": [3, 3]}
    assert rows["ask 5"]["correct"] == {}
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["verifier"] == f"judge {service.url}/judge"  # without the query
    assert "small: of 26 completions 24 graded, 2 without a verdict of the judge\n" in capsys.readouterr().out


def test_reasoning_and_cut_off_answers_are_not_shown_to_the_judge(chats: Path, tmp_path: Path) -> None:
    def thinks(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        reason = "length" if "ask 3" in str(body["messages"]) else "stop"
        return 200, completion([f"<think>secret</think>\n{POOR}"] * body.get("n", 1), finish_reason=reason)

    def hook(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        return 200, dict.fromkeys(body["answers"], 0.5)

    out = tmp_path / "out.jsonl"
    with server(hook) as service:
        assert judged(chats, out, f"webhook={service.url}", small=thinks) == 0
        assert {body["answers"].get("small") for body in service.bodies} == {POOR, None}
    assert rows_of(out)["ask 3"]["correct"] == {"b": 0.5}


@pytest.mark.parametrize(("cap", "rows"), [(("--judge-cap-calls", 10), 5), (("--judge-cap-tokens", 9000), None)])
def test_a_spent_cap_ends_it_cleanly_and_the_same_command_continues(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cap: tuple[str, int], rows: int | None
) -> None:
    out = tmp_path / "out.jsonl"
    with server(umpire(lambda text, place: 9 if "42" in text else 2), ("umpire",)) as judge:
        words = (*cap, "--concurrency", 2)
        assert judged(chats, out, f"model={judge.url}", *words) == 0
        done = len(rows_of(out))
        assert done == rows if rows else 0 < done < 12
        assert len(judge.bodies) == 2 * done  # nothing is asked that can't be written
        if cap[0] == "--judge-cap-tokens":
            assert 320 * len(judge.bodies) <= 9000
        said = capsys.readouterr().out
        assert f"{out} has {done} of 12 prompts, and the same command continues with a new cap\n" in said
        assert "the judge's cap is used up (" in said
        for _ in range(12):
            assert judged(chats, out, f"model={judge.url}", *words) == 0
        assert len(rows_of(out)) == 12
        assert len(judge.bodies) == 24
        assert "cap is used up" not in capsys.readouterr().out.splitlines()[-1]


def test_unreadable_verdicts_give_no_label_and_are_counted(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = umpire(lambda text, place: 9 if "42" in text else 2)

    def vague(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        unclear = "ask 3\n" in body["messages"][0]["content"] or "ask 4\n" in body["messages"][0]["content"]
        return (200, completion(["The first one."])) if unclear else right(body, calls)

    out = tmp_path / "out.jsonl"
    with server(vague, ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}", "--concurrency", 1) == 0
    assert rows_of(out)["ask 3"]["correct"] == {}
    said = capsys.readouterr().out
    assert "small: of 12 completions 10 graded, 2 without a verdict of the judge\n" in said
    assert "2 prompts have no label of any pool" in said


def test_a_judge_that_fails_at_one_prompt_leaves_it_for_the_next_run(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, broken = umpire(lambda text, place: 9 if "42" in text else 2), True

    def shaky(body: dict[str, Any], calls: int) -> tuple[int, dict[str, Any]]:
        if broken and "ask 3\n" in body["messages"][0]["content"]:
            return 500, {}
        return right(body, calls)

    out = tmp_path / "out.jsonl"
    with server(shaky, ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}", "--concurrency", 1) == 0
        assert len(rows_of(out)) == 11
        said = capsys.readouterr().out
        assert "judge: no verdict on 1 prompts, which have no row; the same command asks for them again" in said
        broken = False
        assert judged(chats, out, f"model={judge.url}") == 0
    assert rows_of(out)["ask 3"]["correct"] == {"model-a": 0.2, "b": 0.9}


def test_a_judge_that_can_not_judge_is_not_paid_for_all_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    chats.write_text("".join(json.dumps({"question": f"ask {i}"}) + "\n" for i in range(200)))
    with server(always("The first one."), ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}", "--concurrency", 2) == 1
        assert len(judge.bodies) < 60
        said = capsys.readouterr().err
        assert said.startswith("the judge had no verdict on 20 prompts: a model must reply with the JSON object")
    with server(umpire(lambda text, place: 9 if "42" in text else 2), ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}") == 0  # nothing of before is in the way
    assert len(rows_of(out)) == 200


def test_a_judge_that_is_down_ends_it_with_one_line(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    assert judged(chats, out, "model=http://127.0.0.1:9") == 1
    assert "judge: no OpenAI server at http://127.0.0.1:9" in capsys.readouterr().err
    for kind, status in (("model", 500), ("webhook", 401)):
        with server(partial(refuses, status), ("umpire",)) as judge:
            assert judged(chats, out, f"{kind}={judge.url}") == 1
        said = capsys.readouterr().err
        gc.collect()
        assert not [entry for entry in caplog.records if entry.name == "asyncio"]  # "exception was never retrieved"
        assert said.startswith("the judge does not answer: ")
        assert f" answers {status}" in said
        assert said.endswith(f"; {out} is kept, and the same command continues it\n")
        assert said.count("\n") == 1


def test_a_judge_that_gives_all_answers_0_ends_in_1(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(umpire(lambda text, place: 0), ("umpire",)) as judge:
        assert judged(chats, tmp_path / "out.jsonl", f"model={judge.url}") == 1
    assert "the judge gave every answer 0, so there is nothing to fit" in capsys.readouterr().err


def test_a_table_is_not_continued_with_another_judge_or_rubric(chats: Path, tmp_path: Path) -> None:
    out, rubric = tmp_path / "out.jsonl", tmp_path / "rubric.txt"
    rubric.write_text("Grade kindness.")
    with server(umpire(lambda text, place: 5), ("umpire",)) as judge:
        assert judged(chats, out, f"model={judge.url}") == 0
        with pytest.raises(ValueError, match=r"with verifier judge umpire, not judge umpire, rubric \w{12}:"):
            judged(chats, out, f"model={judge.url}", "--judge-rubric", rubric)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--judge", "gpt"), "'gpt' is not model=URL or webhook=URL"),
        (("--judge", "math=http://x"), "is not model=URL or webhook=URL"),
        (("--judge", "model=x"), "--judge 'x' is not an http or https address"),
        (("--judge", "model=http://x", "--verifier", "exact"), "--judge and --verifier exclude each other"),
        (("--judge", "model=http://x", "--judge-cap-calls", 0), "--judge-cap-calls must be at least 1"),
        (("--judge", "webhook=http://x", "--judge-cap-tokens", 9), "--judge-cap-tokens is for --judge model=URL"),
        (("--judge", "webhook=http://x", "--judge-rubric", "f"), "--judge-rubric is for --judge model=URL"),
        (
            ("--judge", "webhook=http://x", "--judge-api-key-env", "NO_KEY"),
            "--judge-api-key-env: .*'NO_KEY' is not set",
        ),
        (("--judge-rubric", "f"), "--judge-rubric needs --judge KIND=URL"),
        ((), 'needs "answer"'),
    ],
)
def test_mistakes_are_one_sentence(chats: Path, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command("--prompts", chats, "--backends", "s=http://127.0.0.1:9", "--out", tmp_path / "out.jsonl", *words)
