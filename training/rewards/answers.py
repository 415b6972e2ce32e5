r"""Finds the answer that a text marks as its own: <answer>, \boxed{}, ####, "the answer is ..."."""

import re
from collections.abc import Iterable, Iterator

_TAG = re.compile(r"<(answer|final_answer|final)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?=\S))")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or|\\\\|\\quad|\\text\{\s*(?:and|or)\s*\})?[\s$]*")
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
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|q|problem|human|user)\s*\d*\s*:", re.IGNORECASE)
_LIST_OF_ONE = re.compile(r"""\[\s*(['"])(.*)\1\s*\]""", re.DOTALL)


def answer_part(text: str) -> str:
    """The content of the last <answer>, else the text up to where a model invents the next question of its prompt."""
    tags = [match[2] for match in _TAG.finditer(text)]
    if tags:
        return str(tags[-1]).strip()
    for match in _NEXT_QUESTION.finditer(text):
        before = text[: match.start()]
        if _HASHES.search(before) or _BOX.search(before) or _STATEMENT.search(before):
            return before.strip()
    return text.strip()


def reference_part(reference: str) -> str:
    """A reference without the list around it (`['34']`) that some data sets have."""
    match = _LIST_OF_ONE.fullmatch(reference.strip())
    return match[2] if match and f"{match[1]}," not in match[2] else reference.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}, or of a sequence of boxes ("\boxed{1} and \boxed{2}"), comma-separated."""
    found = [(match.start(), *_content(text, match)) for match in _BOX.finditer(text)]
    boxes = [box for box in found if box[1]]
    boxes = [box for box in boxes if not any(other[0] < box[0] and box[1] <= other[1] for other in boxes)]
    if not boxes:
        return None
    start, _, answer = boxes.pop()
    inner = boxed(answer)
    answers = [answer if inner is None else inner]
    while boxes and boxes[-1][1] <= start and _BETWEEN_BOXES.fullmatch(text[boxes[-1][1] : start]):
        start, _, before = boxes.pop()
        answers.insert(0, before)
    return ", ".join(dict.fromkeys(each.strip() for each in answers))


def hashed(text: str) -> str | None:
    """The line after the last `####`."""
    lines = _HASHES.findall(text)
    return str(lines[-1]).strip() if lines else None


def statements(text: str) -> Iterator[str]:
    """What follows each "the answer is", "Answer:" and the like to the end of its sentence, the last first."""
    for match in reversed(list(_STATEMENT.finditer(text))) if mentions(text, _STEMS) else ():
        skipped = _SKIP.match(text, match.end())
        start = skipped.end() if skipped else match.end()
        formula = _MATHEMATICS.match(text, start)
        end = _SENTENCE_END.search(text, formula.end() if formula else start)
        stated = text[start : end.start() if end else len(text)].strip()
        if stated:
            yield stated


def mentions(text: str, words: Iterable[str]) -> bool:
    """Whether a text contains one of some words, in either case: much faster than the expressions that look at them."""
    small = text.lower()
    return any(word in small for word in words)


def formulas(text: str) -> list[tuple[int, int]]:
    """Where a text's formulas in dollars, \\( \\) or \\[ \\] begin and end. A dollar before an amount is none."""
    return [match.span() for match in _MATHEMATICS.finditer(text)]


def _content(text: str, match: re.Match[str]) -> tuple[int, str]:
    """The end of a box, and its content; 0 if it is not closed. A box without braces holds one word: `\\boxed 7`."""
    begin = match.end()
    if not match[0].endswith("{"):
        word = re.compile(r"[-+]?[\w./]+").match(text, begin)
        return (word.end(), word[0].rstrip(".")) if word and match[0][-1].isspace() else (0, "")
    depth = 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end(), text[begin : brace.start()]
    return 0, ""
