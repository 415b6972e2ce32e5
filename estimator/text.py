"""How text becomes input, for fitting and serving alike. No torch.

read() takes from a request what the checkpoint reads of it: the last user turn and what came before, or the whole
conversation as the policy's own chat template writes it. prepare() makes ids of that: text is cut by characters before
it is tokenised, so 4 MB cost no more than a screenful; then its tokens are cut to head and tail.
Shapes: T tokens, S surface features.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

TEMPLATE = "[CLS] {prompt} [SEP] {context} [SEP]"  # without context the last two are left out
CHAT = "[CLS] {chat} [SEP]"  # the messages, written by TextConfig.chat
POOLINGS = ("mean", "cls")
CHARS_PER_TOKEN = 8  # kept on each side: prose has 4 to 5, so the seam is far from any token kept
CONTEXT_MESSAGES = 8  # older turns can't fit beside a prompt
TURN_CHARS = 4  # what a chat template writes around a turn, at least: so many empty turns are no more than long ones


@dataclass(frozen=True, slots=True)
class TextConfig:
    """How a checkpoint reads text; stands in its manifest."""

    template: str = TEMPLATE
    pooling: str = "cls"
    max_tokens: int = 128
    chat: str = ""  # with the template CHAT: the policy's chat template, Jinja as Hugging Face tokenizers have it

    def __post_init__(self) -> None:
        if self.template not in (TEMPLATE, CHAT):
            raise ValueError(f"text template {self.template!r} is unknown; this version knows {TEMPLATE!r}, {CHAT!r}")
        if self.chat and self.template == TEMPLATE:
            raise ValueError(f"a chat template is read with the text template {CHAT!r} alone, not with {TEMPLATE!r}")
        if self.template == CHAT:
            if not self.chat:
                raise ValueError(f"the text template {CHAT!r} needs the policy's chat template in `chat`")
            _compiled(self.chat)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        if not 8 <= self.max_tokens <= 8192:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must lie between 8 and 8192")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt ready to be scored: ids of T <= max_tokens tokens with specials, and S surface features."""

    ids: tuple[int, ...]
    truncated: bool
    surface: tuple[float, ...]


def text_of_content(content: object) -> str:
    """The text of a chat message's content: a string, or an array of parts of which only the text ones count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(part for part in parts if isinstance(part, str))


def prompt_of_messages(messages: Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """(the last user turn, the user and assistant text before it, newest last).

    System, developer and tool text is left out: it is the same for every query of an application, and a long tool
    result says nothing of how hard the user's question is.
    """
    turns = [
        (message.get("role"), text)
        for message in messages
        if isinstance(message, Mapping) and message.get("role") in ("user", "assistant")
        for text in (text_of_content(message.get("content")),)
        if text
    ]
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    if last is None:
        return "", ""
    return turns[last][1], "\n".join(text for _, text in turns[max(0, last - CONTEXT_MESSAGES) : last])


def extract_text(config: TextConfig, asked: str | Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """What a checkpoint reads of a request: (prompt, context), for prepare().

    Args:
        asked: a prompt, taken as it is, or a conversation's messages. A chat template sees each message's role and
            text, without what lies too far from both ends for prepare() to keep; tools and tool calls it does not see.
            Where it takes no such conversation (roles that don't alternate, say), the bare turns stand in.
    """
    if isinstance(asked, str):
        return asked, ""
    if not config.chat:
        return prompt_of_messages(asked)
    turns = _both_ends(asked, CHARS_PER_TOKEN * config.max_tokens)
    try:
        return render_chat(config.chat, turns), ""
    except (jinja2.TemplateError, TypeError, ValueError):  # what a template raises, or provokes by odd messages
        return "\n".join(turn["content"] for turn in turns), ""


def render_chat(chat: str, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
    """Messages as a policy reads them: transformers' apply_chat_template(tokenize=False), without transformers.

    `chat` runs in Jinja's sandbox, but nothing stops one that loops for long: load checkpoints that you trust.
    Raises jinja2.TemplateError where the template refuses the messages, and whatever their odd types provoke in it.
    """
    return _compiled(chat).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
    )


def with_special_tokens(chat: str, tokens: Mapping[str, object]) -> str:
    """A tokenizer's chat template with its special tokens in it, so that it says all by itself.

    Args:
        tokens: `tokenizer.special_tokens_map`; of it what `chat` mentions: bos_token, eos_token.
    """
    known = [(name, token) for name, token in tokens.items() if isinstance(token, str) and name in chat]
    return "".join(f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n" for name, token in known) + chat


def _both_ends(messages: Sequence[Mapping[str, object]], side: int) -> list[dict[str, str]]:
    """Role and text of the turns that the first and last `side` characters of a rendered conversation can come from."""
    head = _turns(messages, side)
    rest = messages[len(head) :]
    tail = _turns(reversed(rest), side)
    if (len(rest) - len(tail)) % 2:  # roles still alternate when an even number is left out
        tail += _turns(rest[-len(tail) - 1 :][:1], side)
    return [*head, *reversed(tail)]


def _turns(messages: Iterable[Mapping[str, object]], side: int) -> list[dict[str, str]]:
    """Role and text of messages, up to the one that makes `side` characters full; a long text keeps its two ends."""
    turns: list[dict[str, str]] = []
    left = side
    for message in messages:
        role, text = message.get("role"), text_of_content(message.get("content"))
        turns.append({"role": role[:side] if isinstance(role, str) else "", "content": _cut(text, side)})
        left -= len(text) + TURN_CHARS
        if left <= 0:
            break
    return turns


def _cut(text: str, side: int) -> str:
    return text if len(text) <= 2 * side else f"{text[:side]} {text[-side:]}"


class Generation(Extension):
    """`{% generation %}` marks what is learnt in training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=16)
def _compiled(chat: str) -> jinja2.Template:
    """The environment is transformers'. Raises ValueError for what is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return environment.from_string(chat)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def load_tokenizer(serialized: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; its own padding and truncation go: prepare() cuts.

    "[SEP]" in a prompt is read as those five characters: only prepare() sets special tokens.
    """
    if "model" not in json.loads(serialized):  # tokenizers itself would raise a bare Exception
        raise ValueError("its tokenizer.json is no tokenizer")
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def clean(text: str) -> str:
    """The text with "?" for lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def prepare(tokenizer: Tokenizer, config: TextConfig, text: str, context: str = "") -> Prepared:
    """Text -> ids and surface features, by the manifest's template. Cost is bounded by max_tokens, not by len(text).

    The prompt comes first; context fills what room is left, its newest tokens kept. `truncated` speaks of the prompt
    alone.
    """
    room = config.max_tokens - 2
    side = CHARS_PER_TOKEN * config.max_tokens
    kept = clean(_cut(text, side))
    first, *_, last = tokenizer.encode("").ids  # [CLS] and [SEP], whatever this tokenizer calls them
    ids = tokenizer.encode(kept, add_special_tokens=False).ids
    truncated = len(ids) > room or len(kept) < len(text)
    if len(ids) > room:
        ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
    prepared = [first, *ids, last]
    room = config.max_tokens - len(prepared) - 1
    if context and room > 0:
        earlier = tokenizer.encode(clean(context[-side:]), add_special_tokens=False).ids
        prepared += [*earlier[-room:], last]
    return Prepared(tuple(prepared), truncated, surface_features(kept, len(text)))


SURFACE = (
    "chars", "words", "digits", "digit_share", "lines", "options", "answer_cue", "backslashes", "dollars",
    "operators", "code_signs", "questions", "commas", "upper_share", "other_scripts", "chars_per_word", "fences",
    "negations",
)  # fmt: skip
OPTION = re.compile(r"(?m)^[ \t]*\(?[A-J1-9][.):] ")
ANSWER_CUE = re.compile(r"(?i)\banswer\s*:|\boptions\s*:|\bchoices\s*:")
NEGATION = re.compile(r"(?i)\b(?:not|except|never|least|cannot|false|incorrect)\b")


def _classes() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Class of each Latin-1 character, for one bincount instead of a scan a feature."""
    table = np.zeros(256, np.uint8)
    for number, characters in enumerate(("0123456789", "\n", "\\", "$", "+-*/=^<>%", "{}[]();_#", "?", ",", " \t"), 1):
        table[[ord(c) for c in characters]] = number
    table[[ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = 10
    table[128:] = 11
    return table


CLASSES = _classes()


def surface_features(text: str, length: int | None = None) -> tuple[float, ...]:
    """What a glance tells, in the order of SURFACE, not yet standardised. `length` in characters, if text was cut."""
    total = len(text) if length is None else length
    # a character outside Latin-1 becomes byte 255 and counts as another script
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    count = np.bincount(CLASSES[np.minimum(codes, 255)], minlength=12).tolist()
    chars, words = max(len(text), 1), count[9] + count[2] + 1
    return (
        math.log1p(total),
        math.log1p(words * total / chars),
        math.log1p(count[1]),
        count[1] / chars,
        math.log1p(count[2]),
        float(min(len(OPTION.findall(text)), 6)),
        float(ANSWER_CUE.search(text) is not None),
        math.log1p(count[3]),
        math.log1p(count[4]),
        math.log1p(count[5]),
        math.log1p(count[6]),
        math.log1p(count[7]),
        math.log1p(count[8]),
        count[10] / chars,
        count[11] / chars,
        min(chars / words, 30.0),
        float("```" in text),
        math.log1p(len(NEGATION.findall(text))),
    )
