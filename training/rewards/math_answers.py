r"""Whether a completion's mathematical answer equals the reference's, by math-verify (LaTeX and plain expressions).

Slow to import, and `grade` can run forever on a hostile expression: verify.py runs it in a worker with a deadline.
"""

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# We stand for the deadline, so its own (signals, main thread only) are off; it warns of that at each use.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|and|or|,\s*and|,\s*or)?[\s$]*")
_MARKED = re.compile(r"####[ \t]*(.+)")  # GSM8K's final answer
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}|\n|(?<!\\)\$|\\\(|\\\[")
_WORDS = re.compile(r"[A-Za-z' -]{1,60}")
_LOOSE = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}|\\[,;:!]|\$|(?<!\d)\s+|\s+(?!\d)|\.$")


def grade(completion: str, reference: str) -> float | None:
    r"""1 if the answers are equal, 0 if not or if the completion has none; None if the reference has none.

    The answer of a text is its last \boxed{} (or run of them: "\boxed{1} and \boxed{2}"), else what follows its last
    `####`, else all of it where it is a formula or a few words alone ("\frac{1}{2}", "no solution"), else the last
    formula or number in it.
    What stands before a closing </think> is no answer.
    """
    completion = completion.rpartition("</think>")[2]
    gold, said = final(reference), final(completion)
    if gold and said and _loose(gold) == _loose(said):
        return 1.0
    golds = _parsed(gold, reference)
    if not golds:
        return None
    # Gold first: of `x = 3` and `3` the order decides.
    return float(verify(golds, _parsed(said, completion), timeout_seconds=None))


def final(text: str) -> str | None:
    """The answer that a text marks as its own, or the text where that is all; None where it must be looked for."""
    boxes = [(match.start(), *_closed(text, match.end())) for match in _BOX.finditer(text)]
    boxes = [(start, end, content) for start, end, content in boxes if end]
    if boxes:
        start, _, answer = boxes.pop()
        while boxes and boxes[-1][1] <= start and _BETWEEN_BOXES.fullmatch(text[boxes[-1][1] : start]):
            start, _, before = boxes.pop()
            answer = f"{before}, {answer}"
        return answer.strip()
    marked = _MARKED.findall(text)
    if marked:
        return str(marked[-1]).strip()
    alone = text.strip()
    return alone if alone and (_WORDS.fullmatch(alone) or not _PROSE.search(alone)) else None


def _closed(text: str, begin: int) -> tuple[int, str]:
    """The end of the box whose content begins there, and that content; 0 where it does not close."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end(), text[begin : match.start()]
    return 0, ""


def _parsed(answer: str | None, text: str) -> list[object]:
    whole = rf"\boxed{{{answer}}}" if answer else text
    parsed: list[object] = parse(whole, extraction_config=_EXTRACTION, parsing_timeout=None)
    return parsed


def _loose(answer: str) -> str:
    r"""The answer without what changes nothing: spaces (but `2 1/2` is not `21/2`), dollars, \text; a word's case."""
    bare = _LOOSE.sub(lambda match: match[1] or "", answer.strip())
    return bare.casefold() if len(bare) > 2 and bare.isalpha() else bare


# The first uses build the parser's tables and import parts of sympy, a second in all: now, before a deadline runs.
for _warm in (("0.5", r"\frac{1}{3}"), (r"\sqrt{3}+x", "(1, x)"), (r"\{1, y\}", r"\{1, x\}"), ("x+1", "x^2")):
    grade(*_warm)
