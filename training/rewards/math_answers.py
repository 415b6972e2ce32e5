r"""Compares a completion's mathematical answer with the reference's, by math-verify (LaTeX and plain expressions).

The import is slow, and `grade_math` may never end on a hostile expression: worker_pool runs it with a deadline.
"""

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RIGHT, RewardVerdict, verdict_of

# The worker pool has the deadline, so math-verify's own (signals, main thread only) are off; it warns at each use.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|and|or|,\s*and|,\s*or)?[\s$]*")
_MARKED = re.compile(r"####[ \t]*(.+)")  # GSM8K's final answer
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}|\n|(?<!\\)\$|\\\(|\\\[")
_WORDS = re.compile(r"[A-Za-z' -]{1,60}")
_INSIGNIFICANT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}|\\[,;:!]|\$|(?<!\d)\s+|\s+(?!\d)|\.$")


def grade_math(completion: str, reference: str) -> RewardVerdict:
    r"""1 if the answers are equal, 0 if not or if the completion has none; None if the reference has none.

    The answer of a text is its last \boxed{} (or a sequence: "\boxed{1} and \boxed{2}"), else the text after its last
    `####`, else the whole text if it is only a formula or a few words ("\frac{1}{2}", "no solution"), else the last
    formula or number in it. Text before a closing </think> is ignored.
    """
    completion = completion.rpartition("</think>")[2]
    expected, given = marked_answer(reference), marked_answer(completion)
    if expected and given and _normalised(expected) == _normalised(given):
        return RIGHT
    parsed = _parsed(expected, reference)
    if not parsed:
        return NO_REFERENCE
    # The reference must come first: verify() is not symmetric for `x = 3` and `3`.
    answer = _parsed(given, completion)
    return verdict_of(verify(parsed, answer, timeout_seconds=None)) if answer else NOT_READABLE


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as such, or the whole text if it is nothing else; None if it must be extracted."""
    boxes = [(match.start(), *_box_content(text, match.end())) for match in _BOX.finditer(text)]
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


def _box_content(text: str, begin: int) -> tuple[int, str]:
    """The end of the box whose content begins at `begin`, and that content; 0 if it is not closed."""
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


def _normalised(answer: str) -> str:
    r"""The answer without spaces (but `2 1/2` is not `21/2`), dollars, \text and the case of a word."""
    bare = _INSIGNIFICANT.sub(lambda match: match[1] or "", answer.strip())
    return bare.casefold() if len(bare) > 2 and bare.isalpha() else bare


# Warm up before a deadline runs: the first uses build the parser's tables and import parts of sympy, about a second.
for _warm in (("0.5", r"\frac{1}{3}"), (r"\sqrt{3}+x", "(1, x)"), (r"\{1, y\}", r"\{1, x\}"), ("x+1", "x^2")):
    grade_math(*_warm)
