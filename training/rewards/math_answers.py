r"""Compares a completion's mathematical answer with the reference's, by math-verify (LaTeX and plain expressions).

What math-verify misreads is settled before it (math_notation). The import is slow, and `grade_math` may never end on a
hostile expression: worker_pool runs it with a deadline.
"""

import logging
import re
from collections import Counter

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from depo_gateway.training.rewards import math_notation
from depo_gateway.training.rewards.answers import answer_part, boxed, formulas, hashed, reference_part, statements
from depo_gateway.training.rewards.choice import letters_of, option_of
from depo_gateway.training.rewards.math_notation import bare_text, elements_of, literal_of, mathematical, word_of
from depo_gateway.training.rewards.number import numbers_in, plain_numbers
from depo_gateway.training.rewards.reasoning import final_text
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RIGHT, RewardVerdict, verdict_of

# The worker pool has the deadline, so math-verify's own (signals, main thread only) are off; it warns at each use.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
ROUNDED = 1e-6  # the relative difference at which a decimal still is the rounded value of an expression
EXACT = 1e-15  # of two expressions without decimals, evaluated to 40 digits

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}|\n|(?<!\\)\$|\\\(|\\\[")
_WORD_FIRST = re.compile(r"(?!(?:sin|cos|tan|log|ln|sqrt|pi|exp)\b)[A-Za-z]{2,}\s+[-\d$]")
_WORDS = re.compile(r"[A-Za-z' -]{1,60}")
_ASIDE = re.compile(
    r"\s+\((?=[A-Za-z]{2,}\s)|,?\s+\b(?:because|since|as|which|where|so|by|with)\b|,\s+(?:and|but|not|i)\b",
    re.IGNORECASE,
)
_OPTION = re.compile(r"[\s\\a-z{(]*[A-J][)}\s.]*")  # a reference that is a letter, as `(C)` or `\\text{C}`
_INTERVAL = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)


def grade_math(completion: str, reference: str) -> RewardVerdict:
    r"""1 if the answers are equal, 0 if not or if the completion has none; no reward if the reference has none.

    The answer of a text is its last \boxed{} (or a sequence: "\boxed{1} and \boxed{2}"), else the text after its last
    `####`, else after its last "the answer is", else the whole text if it is only a formula or a few words
    ("\frac{1}{2}", "no solution"), else the last formula or number in it.
    """
    reference = reference_part(reference)
    expected = answer_of(reference)
    if expected is None or not (_is_readable(expected) or _parsed(expected)):
        return NO_REFERENCE
    text = answer_part(final_text(completion) or "")
    given = answer_of(text)
    option = option_of(expected) if _OPTION.fullmatch(expected) else None
    if option is not None and (letters := letters_of(text, option)):
        return verdict_of(letters == option.letters or (given is not None and bare_text(given) == bare_text(expected)))
    if given is None:
        return NOT_READABLE
    if equal_answers(expected, given):
        return RIGHT
    stripped = math_notation.without_option(given)
    return verdict_of(stripped != given and equal_answers(expected, stripped))


def answer_of(text: str) -> str | None:
    """The answer that a text gives; None if it gives none."""
    marked = boxed(text)
    if marked is None:
        marked = hashed(text)
    if marked is not None:
        return marked.strip() or None
    for statement in statements(text):
        if stated := _stated(statement):
            return stated
    alone = text.strip().strip("*").strip()
    if not alone:
        return None
    if len(formulas(alone)) == 1 and formulas(alone)[0] == (0, len(alone)):
        return alone
    if _WORDS.fullmatch(alone) or literal_of(alone) or not (_PROSE.search(alone) or _WORD_FIRST.match(alone)):
        return alone
    return _last_of(alone)


def _stated(statement: str) -> str | None:
    """The answer with which a statement begins; None if it has neither formula, number nor word."""
    found = formulas(statement)
    if found and not re.search(r"\w", statement[: found[0][0]].replace("x =", "")):
        end = found[0][1]
        parts = [statement[slice(*found[0])]]
        for start, stop in found[1:]:
            if not re.fullmatch(r"\s*(?:,|and|or|,\s*(?:and|or))\s*", statement[end:start]):
                break
            parts.append(statement[start:stop])
            end = stop
        return ", ".join(mathematical(part) for part in parts)
    short = statement[: aside.start()] if (aside := _ASIDE.search(statement)) else statement
    short = re.sub(r"(?<!\\)\$(?=\d)|\*\*|^[\s:]+", "", short).strip().rstrip(".")
    if literal_of(short) or (not _PROSE.search(short) and re.search(r"[\d\\=+/]", short)):
        return short
    if re.search(r"\d", short):
        return _last_of(short)
    return short if short and _WORDS.fullmatch(short) and len(short.split()) <= 4 else None


def _last_of(text: str) -> str | None:
    """The last formula of a text, or its last number outside of formulas if it has none."""
    spans = [span for span in formulas(text) if re.match(r"[$\\(\[\s]*(?!\^|_)", text[slice(*span)])]
    spans = [span for span in spans if mathematical(text[slice(*span)])[:1] not in ("^", "_", "")]
    if spans:
        parts, (start, end) = [], spans.pop()
        parts.append(text[start:end])
        while spans and re.fullmatch(r"\s*(?:,|and|or|,\s*(?:and|or))\s*", text[spans[-1][1] : start]):
            start, end = spans.pop()
            parts.insert(0, text[start:end])
        return ", ".join(mathematical(part) for part in parts)
    plain = plain_numbers(text)
    found = list(numbers_in(plain))
    if not found:
        return None
    last = found[-1]
    sign = "-" if not isinstance(last.value, tuple) and last.value < 0 else ""
    return sign + plain[last.start : last.end]


def equal_answers(expected: str, given: str) -> bool:
    """Whether two answers are equal: as text, as numbers, in their parts, or as math-verify compares them."""
    one, other = bare_text(expected), bare_text(given)
    if one == other:
        return True
    for compare in (
        _compared_as_numbers,
        _compared_as_words,
        _compared_by_notation,
        _compared_as_sets,
        _compared_in_parts,
    ):
        verdict = compare(expected, given)
        if verdict is not None:
            return verdict
    return _compared_by_math_verify(expected, given)


def _compared_as_numbers(expected: str, given: str) -> bool | None:
    one, other = literal_of(expected), literal_of(given)
    return one.equals(other) if one is not None and other is not None else None


def _compared_as_words(expected: str, given: str) -> bool | None:
    one, other = word_of(expected), word_of(given)
    return one == other if one is not None and other is not None else None


def _compared_by_notation(expected: str, given: str) -> bool | None:
    """Digits in a base, times of the day, residues, equations with 0, and lists with dots."""
    one, other = math_notation.in_base(expected), math_notation.in_base(given)
    if one is not None or other is not None:
        digits = [each[0] if each else bare_text(text) for each, text in ((one, expected), (other, given))]
        return digits[0] == digits[1] and (one is None or other is None or one[1] == other[1])
    clock, other_clock = math_notation.clock_of(expected), math_notation.clock_of(given)
    if clock and other_clock and (clock[2] or other_clock[2]):
        return clock[:2] == other_clock[:2] and (clock[2] == other_clock[2] or not (clock[2] and other_clock[2]))
    if math_notation.is_equal_to_zero(expected) and "=" not in given:
        return False
    one_modulus, other_modulus = math_notation.modulus_of(expected), math_notation.modulus_of(given)
    if one_modulus is not None and other_modulus is not None and one_modulus != other_modulus:
        return False
    if math_notation.has_dots(expected) or math_notation.has_dots(given):
        return _same_sequence(elements_of(expected), elements_of(given))
    return None


def _same_sequence(expected: list[str], given: list[str]) -> bool:
    """Whether lists with dots agree in the elements before and after these."""
    halves = []
    for elements in (expected, given):
        at = next((index for index, element in enumerate(elements) if math_notation.has_dots(element)), None)
        if at is None:
            return False
        halves.append((elements[:at], elements[at + 1 :]))
    (head, tail), (other_head, other_tail) = halves
    pairs = [*zip(head, other_head, strict=False), *zip(reversed(tail), reversed(other_tail), strict=False)]
    return bool(tail) == bool(other_tail) and all(equal_answers(*pair) for pair in pairs)


def _compared_in_parts(expected: str, given: str) -> bool | None:
    """Lists without brackets: `2, 3`, `x = 2 or x = 3`, `a = 3, b = 4`; None if neither is one."""
    ones, others = elements_of(expected), elements_of(given)
    if len(ones) == len(others) == 1 or r"\pm" in mathematical(expected + given):
        return None
    if any(part.startswith(("\\{", "(", "[")) or "\\left" in part for part in (expected, given)):
        return None
    pairs, other_pairs = (
        [math_notation.assigned(part) for part in ones],
        [math_notation.assigned(part) for part in others],
    )
    if len(ones) != len(others):
        simple = all(literal_of(value) for _, value in pairs + other_pairs)
        return False if simple else None
    names, other_names = [name for name, _ in pairs], [name for name, _ in other_pairs]
    distinct = len(set(names)) == len(names) and all(names)
    if distinct and Counter(names) == Counter(other_names):
        values = dict(other_pairs)
        return all(equal_answers(value, values[name]) for name, value in pairs)
    if (distinct and not any(other_names)) or (
        len(set(other_names)) == len(other_names) and all(other_names) and not any(names)
    ):
        return all(equal_answers(one, other) for (_, one), (_, other) in zip(pairs, other_pairs, strict=True))
    left = [value for _, value in other_pairs]
    for _, value in pairs:
        match = next((index for index, other in enumerate(left) if equal_answers(value, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _compared_as_sets(expected: str, given: str) -> bool | None:
    """Whether inequalities joined by "or" are a union of intervals, and the other way round; None: not such answers."""
    if r"\cup" not in expected + given:
        return None
    one, other = _set_of(expected), _set_of(given)
    return one == other if one is not None and other is not None else None


def _set_of(answer: str) -> sympy.Set | None:
    union: sympy.Set = sympy.EmptySet
    for part in [answer] if r"\cup" in answer else elements_of(answer):
        parsed = _parsed(part)
        found = parsed[0] if parsed else None
        if not isinstance(found, sympy.Set | sympy.logic.boolalg.Boolean):
            return None
        if not isinstance(found, sympy.Set) and len(found.free_symbols) != 1:
            return None
        union = union.union(found if isinstance(found, sympy.Set) else found.as_set())
    return union


def _compared_by_math_verify(expected: str, given: str) -> bool:
    one, other = _parsed(expected), _parsed(given)
    if not one or not other:
        return False
    relation_allowed = bool(_INTERVAL.search(expected))  # `x < 3` for (-oo, 3)
    # The reference must come first: verify() is not symmetric for `x = 3` and `3`.
    if verify(one, other, timeout_seconds=None, allow_set_relation_comp=relation_allowed):
        return _is_close(one[0], other[0])
    if _is_equal_otherwise(one[0], other[0]):
        return True
    plain = [math_notation.without_percent(answer) for answer in (expected, given)]
    if (plain[0] != expected) == (plain[1] != given):
        return False
    return bool(verify(_parsed(plain[0]), _parsed(plain[1]), timeout_seconds=None))


def _is_close(one: object, other: object) -> bool:
    """Whether numbers that math-verify calls equal are: it rounds to six decimals, which makes tiny numbers equal."""
    if not (isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr) and one.is_number and other.is_number):
        return True
    difference = one - other
    if difference.is_Rational:
        return bool(difference == 0)
    has_decimals = one.has(sympy.Float) or other.has(sympy.Float)
    size = max(abs(one.evalf(40)), abs(other.evalf(40)))  # not Python's floats, which have no number below 1e-324
    return bool(abs(difference.evalf(40)) <= (ROUNDED if has_decimals else EXACT) * size)


def _is_equal_otherwise(one: object, other: object) -> bool:
    """Whether expressions are equal if the variables below roots are positive."""
    if not (isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr)):
        return False
    if one.free_symbols != other.free_symbols or not (_has_root(one) and _has_root(other)):
        return False
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in one.free_symbols}
    return bool(sympy.simplify((one - other).subs(positive)) == 0)


def _has_root(expression: sympy.Expr) -> bool:
    roots = [power for power in expression.atoms(sympy.Pow) if power.exp.is_Rational and not power.exp.is_Integer]
    return any(power.free_symbols for power in roots) and not expression.has(sympy.Abs)


def _is_readable(answer: str) -> bool:
    return bool(literal_of(answer) or word_of(answer) or math_notation.in_base(answer) or _WORDS.fullmatch(answer))


def _parsed(answer: str) -> list[object]:
    parsed: list[object] = parse(
        rf"\boxed{{{mathematical(answer)}}}", extraction_config=_EXTRACTION, parsing_timeout=None
    )
    return parsed


# Warm up before a deadline runs: the first uses build the parser's tables and import parts of sympy, about a second.
for _warm in (("0.5x", r"\frac{1}{3}x"), (r"\sqrt{3}+x", "(1, x)"), (r"\{1, y\}", r"\{1, x\}"), ("x+1", "x^2")):
    grade_math(*_warm)
