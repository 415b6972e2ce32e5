"""How text becomes input, for fitting and serving alike. No torch.

extract_text() takes from a request the text that the checkpoint reads: the last user turn and the turns before it, or
the whole conversation, rendered by the policy's chat template. prepare() makes ids of it: the text is cut by characters
before it is tokenised, so 4 MB cost no more than a page; then its tokens are cut to head and tail.
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

TEMPLATE = "[CLS] {prompt} [SEP] {context} [SEP]"  # without context it ends at the first [SEP]
CHAT = "[CLS] {chat} [SEP]"  # the messages, rendered by TextConfig.chat
POOLINGS = ("mean", "cls")
CHARS_PER_TOKEN = 8  # retained on each side: prose has 4 to 5, so the cut is far from any token used
CONTEXT_MESSAGES = 8  # older turns don't fit beside a prompt
TURN_CHARS = 4  # the least that a chat template adds to a turn: it bounds the number of empty turns


@dataclass(frozen=True, slots=True)
class TextConfig:
    """How a checkpoint reads text, as its manifest says."""

    template: str = TEMPLATE
    pooling: str = "cls"
    max_tokens: int = 128
    chat: str = ""  # with the template CHAT: the policy's chat template, in the Jinja of Hugging Face tokenizers

    def __post_init__(self) -> None:
        if self.template not in (TEMPLATE, CHAT):
            raise ValueError(f"text template {self.template!r} is unknown; this version knows {TEMPLATE!r}, {CHAT!r}")
        if self.chat and self.template == TEMPLATE:
            raise ValueError(f"a chat template needs the text template {CHAT!r}, not {TEMPLATE!r}")
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
    """A prompt ready to be scored: ids of T <= max_tokens tokens with specials, and S surface features.

    `group` names its task, if known: a checkpoint may have weights for it. "": unknown.
    """

    ids: tuple[int, ...]
    truncated: bool
    surface: tuple[float, ...]
    group: str = ""


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
    result does not tell how hard the user's question is.
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


def extract_text(config: TextConfig, request: str | Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """The text of a request that a checkpoint reads: (prompt, context), for prepare().

    Args:
        request: a prompt, taken as it is, or a conversation's messages. A chat template gets each message's role and
            text, except what is too far from both ends for prepare() to use; it gets no tools or tool calls. If it
            refuses the conversation (because roles don't alternate, say), the bare turns are used.
    """
    if isinstance(request, str):
        return request, ""
    if not config.chat:
        return prompt_of_messages(request)
    turns = _both_ends(request, CHARS_PER_TOKEN * config.max_tokens)
    try:
        return render_chat(config.chat, turns), ""
    except (jinja2.TemplateError, TypeError, ValueError):  # raised by a template, or caused by malformed messages
        return "\n".join(turn["content"] for turn in turns), ""


def render_chat(chat: str, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
    """Messages as a policy reads them: transformers' apply_chat_template(tokenize=False), without transformers.

    `chat` runs in Jinja's sandbox, which does not bound its running time: only load checkpoints that you trust.
    Raises jinja2.TemplateError if the template refuses the messages, and whatever malformed ones cause in it.
    """
    return _compiled(chat).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
    )


def with_special_tokens(chat: str, tokens: Mapping[str, object]) -> str:
    """A self-contained chat template: the tokenizer's, with its special tokens set inside.

    Args:
        tokens: `tokenizer.special_tokens_map`; those that `chat` mentions are set, as bos_token and eos_token.
    """
    known = [(name, token) for name, token in tokens.items() if isinstance(token, str) and name in chat]
    return "".join(f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n" for name, token in known) + chat


def _both_ends(messages: Sequence[Mapping[str, object]], side: int) -> list[dict[str, str]]:
    """Role and text of the turns that can reach the first or last `side` characters of a rendered conversation."""
    head = _turns(messages, side)
    rest = messages[len(head) :]
    tail = _turns(reversed(rest), side)
    if (len(rest) - len(tail)) % 2:  # leave out an even number, so that roles still alternate
        tail += _turns(rest[-len(tail) - 1 :][:1], side)
    return [*head, *reversed(tail)]


def _turns(messages: Iterable[Mapping[str, object]], side: int) -> list[dict[str, str]]:
    """Role and text of messages until `side` characters are reached; a long text keeps its two ends."""
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
    """`{% generation %}` marks what training learns; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=16)
def _compiled(chat: str) -> jinja2.Template:
    """A template in transformers' Jinja environment. Raises ValueError for invalid Jinja."""
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
    """A tokenizer from the text of a tokenizer.json, without its own padding and truncation, since prepare() cuts.

    "[SEP]" in a prompt is read as five characters: only prepare() sets special tokens.
    """
    if "model" not in json.loads(serialized):  # tokenizers would raise a bare Exception
        raise ValueError("its tokenizer.json is not a tokenizer")
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def clean(text: str) -> str:
    """The text with "?" for lone surrogates, which tokenizers reject."""
    return text.encode("utf-8", "replace").decode()


def prepare(tokenizer: Tokenizer, config: TextConfig, text: str, context: str = "", group: str = "") -> Prepared:
    """Text -> ids and surface features, by the manifest's template. Cost is bounded by max_tokens, not by len(text).

    The prompt comes first; the newest tokens of the context fill the remaining room. `truncated` refers to the prompt
    only.
    """
    room = config.max_tokens - 2
    side = CHARS_PER_TOKEN * config.max_tokens
    shortened = clean(_cut(text, side))
    first, *_, last = tokenizer.encode("").ids  # [CLS] and [SEP], whatever this tokenizer calls them
    ids = tokenizer.encode(shortened, add_special_tokens=False).ids
    truncated = len(ids) > room or len(shortened) < len(text)
    if len(ids) > room:
        ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
    prepared = [first, *ids, last]
    room = config.max_tokens - len(prepared) - 1
    if context and room > 0:
        earlier = tokenizer.encode(clean(context[-side:]), add_special_tokens=False).ids
        prepared += [*earlier[-room:], last]
    return Prepared(tuple(prepared), truncated, surface_features(shortened, len(text)), group)


SURFACE = (
    "chars", "words", "digits", "digit_share", "lines", "options", "answer_cue", "backslashes", "dollars",
    "operators", "code_signs", "questions", "commas", "upper_share", "other_scripts", "chars_per_word", "fences",
    "negations",
)  # fmt: skip
OPTION = re.compile(r"(?m)^[ \t]*\(?[A-J1-9][.):] ")
ANSWER_CUE = re.compile(r"(?i)\banswer\s*:|\boptions\s*:|\bchoices\s*:")
NEGATION = re.compile(r"(?i)\b(?:not|except|never|least|cannot|false|incorrect)\b")


def _classes() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The class of each Latin-1 character, so that one bincount replaces a scan per feature."""
    table = np.zeros(256, np.uint8)
    for number, characters in enumerate(("0123456789", "\n", "\\", "$", "+-*/=^<>%", "{}[]();_#", "?", ",", " \t"), 1):
        table[[ord(c) for c in characters]] = number
    table[[ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = 10
    table[128:] = 11
    return table


CLASSES = _classes()


def surface_features(text: str, length: int | None = None) -> tuple[float, ...]:
    """Counts and shares of characters, in the order of SURFACE, not standardised. `length`: before `text` was cut."""
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
