"""The prompts file of `depo-train collect`: JSON lines -> distinct Prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depo_gateway.training.outcomes.table_file import json_lines, prompt_key
from depo_gateway.training.rewards.verifiers import Grader

SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts file."""

    messages: tuple[Mapping[str, Any], ...]
    reference: str | None  # None only where a judge labels
    row: Mapping[str, Any]  # the fields that the outcome row repeats: question or messages, group, source
    line: int = 0

    @property
    def key(self) -> str:
        return prompt_key(self.row)


def read_prompts(path: Path, need_reference: bool = True) -> list[Prompt]:
    """The distinct prompts of a JSON-lines file, in order. ValueError names file and line."""
    prompts: dict[str, Prompt] = {}
    for number, record in json_lines(path):
        place = f"{path}, line {number}"
        has = [name for name in ("question", "messages") if name in record]
        if len(has) != 1:
            raise ValueError(f'{place}: needs either "question" or "messages"')
        content = record[has[0]]
        if has == ["question"] and not (isinstance(content, str) and content.strip()):
            raise ValueError(f'{place}: "question" must be a text')
        if has == ["messages"] and not (
            isinstance(content, list) and content and all(isinstance(turn, dict) and "role" in turn for turn in content)
        ):
            raise ValueError(f'{place}: "messages" must be a list of OpenAI messages')
        answer = record.get("answer")
        if (answer is not None or need_reference) and (
            not isinstance(answer, str | int | float) or isinstance(answer, bool)
        ):
            raise ValueError(
                f'{place}: needs "answer", the reference that completions are graded against; without references,'
                " have a judge grade (--judge)"
            )
        messages = content if has == ["messages"] else [{"role": "user", "content": content}]
        row: dict[str, Any] = {name: record[name] for name in (has[0], "group", "source") if name in record}
        prompt = Prompt(tuple(messages), None if answer is None else str(answer), row, number)
        prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return list(prompts.values())


def check_references(path: Path, prompts: Sequence[Prompt], grader: Grader) -> None:
    """Raises ValueError where the verifier can't use a prompt's reference; it names the first lines."""
    problems = grader.unusable([prompt.reference or "" for prompt in prompts])
    found = [(prompt, problem) for prompt, problem in zip(prompts, problems, strict=True) if problem is not None]
    if not found:
        return
    shown = "; ".join(
        f"line {prompt.line}, {_beginning(prompt.reference or '')}: {problem}"
        for prompt, problem in found[:SHOWN_PROBLEMS]
    )
    more = f"; and {len(found) - SHOWN_PROBLEMS} more" if len(found) > SHOWN_PROBLEMS else ""
    raise ValueError(
        f"{path}: the verifier {grader.name} can't use the answers of {len(found)} of {len(prompts)} prompts ({shown}"
        f"{more}); correct or remove these lines, or choose another --verifier"
    )


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
