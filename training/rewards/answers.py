r"""Finds the answer that a text marks as its own: <answer>, \boxed{}, ####, "the answer is ..."."""

import re
from collections.abc import Iterable, Iterator

MOST_STATEMENTS = 20  # of a text, from its end; and the longest one, so that no text takes long
STATEMENT_LENGTH = 500

_TAG = re.compile(r"<(answer|final_answer|final)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?=\S))")
_UNCLOSED_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{[^{}]*\Z")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or|\\\\|\\quad|\\text\{\s*(?:and|or)\s*\})?[\s$]*")
_BOXED_WORD = re.compile(r"[-+]?[\w./]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*(\S.*)")  # GSM8K's final answer
_VERBS = (
    r"is|are|was|be|becomes|equals|would be|should be|must be|will be|seems to be|appears to be|comes out to(?: be)?"
)
_ANSWER = r"answers?|réponse|respuesta|resposta|risposta|antwort|lösung|ответ"
_STEMS = ("answer", "réponse", "resp", "risposta", "antwort", "lösung", "ответ", "答", "正解", "정답", "답")
_STATEMENT = re.compile(
    rf"\b(?:{_ANSWER})(?:\s+(?:correcta|correta|correcte|corretta|finale?|option|choice))?\b[*_]*"
    r"(?:\s+(?:to|for|of|here|in|that)\b[^.\n:=]{0,80}?)?"
    rf"(?:\s+(?:{_VERBS}|est|es|é|è|ist|lautet)\b(?!\s*(?:n['’]t|not|no)\b)|\s*[:：=](?!=)|\s*(?:->|=>|→|⇒|\\to\b))"
    r"|(?:答案|答え|正解|答)\s*(?:应该)?(?:是|为|為|は|[:：])|(?:정답|답)\s*(?:은|는|:)",
    re.IGNORECASE,
)
_SKIP = re.compile(
    r"(?:\s|[*_:：>#]|-(?=\s*\n)|(?:therefore|thus|then|now|also|la|el|le|die|der|das)\s)+", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=[\s*_\"')\]}]|$)|[。！？]")
_MATHEMATICS = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\$[^$\n]*[^$\s\\\n]\$(?!\d)", re.DOTALL)
_NEXT_QUESTION = re.compile(r"\n[ \t]*(?:question|q|problem|human|user)\s*\d*\s*:", re.IGNORECASE)
_LIST_OF_ONE = re.compile(r"""\[\s*(['"])(.*)\1\s*\]""", re.DOTALL)


def answer_part(text: str) -> str:
    """The content of the last <answer>, else the text up to where a model invents the next question of its prompt."""
    tags = [match[2] for match in _TAG.finditer(text)]
    if tags:
        return str(tags[-1]).strip()
    if _NEXT_QUESTION.search(text):
        marks = [mark.search(text) for mark in (_HASHES, _BOX, _STATEMENT)]
        first = min((mark.end() for mark in marks if mark), default=len(text))
        question = _NEXT_QUESTION.search(text, first)
        return text[: question.start()].strip() if question else text.strip()
    return text.strip()


def reference_part(reference: str) -> str:
    """A reference without the list around it (`['34']`) that some data sets have."""
    match = _LIST_OF_ONE.fullmatch(reference.strip())
    return match[2] if match and f"{match[1]}," not in match[2] else reference.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}, or of a sequence of boxes ("\boxed{1} and \boxed{2}"), comma-separated."""
    boxes = [(match.start(), *content) for match, content in _contents(text)] if "box" in text else []
    if boxes and _UNCLOSED_BOX.search(text, boxes[-1][1]):
        return ""  # the text broke off in its last box: an earlier one is not its answer
    # A box that holds another is left out: \boxed{\text{It is } \boxed{7}}.
    starts = [*(start for start, *_ in boxes[1:]), len(text)]
    boxes = [box for box, following in zip(boxes, starts, strict=False) if following >= box[1]]
    if not boxes:
        return None
    start, _, answer = boxes.pop()
    answers = [answer]
    while boxes and _BETWEEN_BOXES.fullmatch(text[boxes[-1][1] : start]):
        start, _, before = boxes.pop()
        answers.append(before)
    return ", ".join(dict.fromkeys(each.strip() for each in reversed(answers)))


def hashed(text: str) -> str | None:
    """The line after the last `####`."""
    lines = _HASHES.findall(text)
    return str(lines[-1]).strip() if lines else None


def statements(text: str) -> Iterator[str]:
    """What follows each "the answer is", "Answer:" and the like to the end of its sentence, the last first."""
    found = list(_STATEMENT.finditer(text)) if mentions(text, _STEMS) else []
    for match in reversed(found[-MOST_STATEMENTS:]):
        skipped = _SKIP.match(text, match.end())
        start = skipped.end() if skipped else match.end()
        limit = min(len(text), start + STATEMENT_LENGTH)
        formula = _MATHEMATICS.match(text, start, limit)
        end = _SENTENCE_END.search(text, formula.end() if formula else start, limit)
        stated = text[start : end.start() if end else limit].strip()
        if stated:
            yield stated


def mentions(text: str, words: Iterable[str]) -> bool:
    """Whether a text contains one of some words, in either case: much faster than the expressions that look at them."""
    small = text.lower()
    return any(word in small for word in words)


def formulas(text: str) -> list[tuple[int, int]]:
    """Where a text's formulas in dollars, \\( \\) or \\[ \\] begin and end. A dollar before an amount is none."""
    return [match.span() for match in _MATHEMATICS.finditer(text)]


def _contents(text: str) -> Iterator[tuple[re.Match[str], tuple[int, str]]]:
    r"""Each closed box: its end and its content. A box without braces holds one word: `\boxed 7`."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    for match in _BOX.finditer(text):
        if match.end() in closing and match[0].endswith("{"):
            end = closing[match.end()]
            yield match, (end + 1, text[match.end() : end])
        elif match[0][-1].isspace() and (word := _BOXED_WORD.match(text, match.end())):
            yield match, (word.end(), word[0].rstrip("."))
