"""The verifier `number`: equal numbers, however they are written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from depo_gateway.training.rewards.answers import answer_part, boxed, hashed, reference_part, statements
from depo_gateway.training.rewards.plain_text import keyboard_text, without_layout
from depo_gateway.training.rewards.reasoning import final_text
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

FINE_DECIMALS = 6
LONGEST_ASIDE = 80  # characters between its bracket and a number in it
TAIL = 200  # characters before the last digit that are read first
MOST_DIGITS = 4000  # of a number, and the largest exponent: Python refuses to read longer ones

_GROUPED = (
    r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:[ ]\d{3})+(?!\d)"
    r"|\d{1,3}(?:'\d{3})+(?!\d)|\d{1,3}(?:_\d{3})+(?!\d)"
)
_DECIMAL = (
    r"\d{1,3}(?:\.\d{3})+,\d{1,2}(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.]*\d)|0,\d+(?![,\d])"
    rf"|\d+,\d\d?(?=\s?(?:€|EUR|euros?))|(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+"
)
_NUMBER = re.compile(
    rf"""(?<![A-Za-z_^.\d])(?<!\^\{{)(?:
    (?P<date>\d{{4}}-\d\d?-\d\d?|\d\d?/\d\d?/\d{{2,4}})(?![\d/])
    |(?P<times>\d+(?::\d+)+)(?!\d)
    |(?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)(?![\d.])
    |(?P<base>\d+)\s*\^\s*(?:\{{\s*(?P<braced>-?\d+)\s*\}}|(?P<bare>-?\d+))
    |(?P<value>{_DECIMAL})
        (?:[eE](?P<e>[-+]?\d+)(?!\w)|\s*\*\s*10\s*\^\s*(?:\{{\s*(?P<ten>[-+]?\d+)\s*\}}|(?P<tens>[-+]?\d+)))?
        (?:\s*/\s*(?P<divisor>{_DECIMAL})(?![\d/]))?
    )(?P<scale>\s*%|\s*(?:percent|per\ cent|thousand|million|billion|trillion)\b|k\b)?""",
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {
    **dict.fromkeys(("%", "percent", "per cent"), Fraction(1, 100)),
    "thousand": Fraction(10**3),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TIMES = re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])|(?<=\d)\s*[xX](?=\s*\d)")
_MARKS = re.compile(r"\\[()\[\]]|(?<!\d)\*\*|\*\*(?!\d)|`|\\displaystyle(?![A-Za-z])")
_ROUGHLY = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])")
_BEFORE_ROUGHLY = re.compile(r"[\s*$)]*≈[\s*$(]*")  # between an exact value and its decimals
_ASIDE = re.compile(r"\((?:out\s+of|of|from|not|instead\s+of|vs\.?|compared\s+(?:to|with))\b[^()]*$", re.IGNORECASE)
_MINUS = re.compile(
    r"(?P<before>\S?)(?P<space>\s*)(?P<sign>-|\bminus|\bnegative)(?P<after>\s*)[$€£¥₹(]?\s*$", re.IGNORECASE
)
_CURRENCY = re.compile(r"[$€£¥₹]\s*$")
_SIGNS_A_VALUE = re.compile(r"(?:[=:(\[{,<>]|\b(?:is|be|are|equals|was|to|of))\s*$", re.IGNORECASE)
# What may stand between "the answer is" and the number that it states.
_LEADING = re.compile(
    r"[\s$€£¥₹(\[{\"'*_=:+≈-]*(?:(?:US|approximately|approx\.?|about|around|roughly|exactly|equal to|only|just"
    r"|simply|a total of|now|therefore|thus|then|minus|negative|[A-Za-z]\w{0,2}\s*=)[\s$€£¥₹(\[{+-]*)*",
    re.IGNORECASE,
)
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/()$€£¥%]*=[\s$€£¥]*")
_CONCLUSION = re.compile(r"\b(?:so|therefore|thus|hence|then)\b.*", re.IGNORECASE | re.DOTALL)
_LAST_DIGIT = re.compile(r"\d(?=\D*\Z)")
_BOLD = re.compile(r"(?:\*\*|__)([^*_\n]+)(?:\*\*|__)")
_WORDS = {
    word: index
    for index, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written: 20% has the value 20 and the scale 1/100. A date, time or ratio is a tuple of its parts."""

    value: Fraction | tuple[int, ...]
    scale: Fraction = Fraction(1)
    decimals: int = 0  # digits after the point, as written
    start: int = 0
    end: int = 0
    exact: "Number | None" = None  # the value that this one approximates, as written: 1/3 in "1/3 ≈ 0.333"

    def equals(self, other: "Number") -> bool:
        """Whether they are equal. If only one is scaled (20% and 20, or 0.2), either reading may be.

        A decimal of FINE_DECIMALS digits or more may stand for a fraction: 0.333333 for 1/3, but 0.33 not.
        """
        if isinstance(self.value, tuple) or isinstance(other.value, tuple):
            return self.value == other.value
        one, two = self.value * self.scale, other.value * other.scale
        if one == two or self._rounds(other) or other._rounds(self):
            return True
        return self.value == other.value and (self.scale == 1) != (other.scale == 1)

    def _rounds(self, other: "Number") -> bool:
        if isinstance(self.value, tuple) or isinstance(other.value, tuple):
            return False
        is_fraction = other.value.denominator > 1 and not other.decimals
        fine = self.decimals >= FINE_DECIMALS and self.scale == other.scale and is_fraction
        return fine and abs(self.value - other.value) < Fraction(1, 10**self.decimals)


def grade_number(completion: str, reference: str) -> RewardVerdict:
    """1 if the number that the completion answers with equals the reference's (`18` = `18.0` = `$18.00`)."""
    expected = number_of(reference_part(reference))
    if expected is None:
        return NO_REFERENCE
    given = number_of(answer_part(final_text(completion) or ""))
    if given is None:
        return NOT_READABLE
    return verdict_of(given.equals(expected) or (given.exact is not None and given.exact.equals(expected)))


def number_of(text: str) -> Number | None:
    r"""The number a text answers with: in its last \boxed{}, after its last ####, after "the answer is", else the last.

    After "the answer is" that is the first number, if it follows at once ("12, checked in 3 ways"), or its result
    ("3 * 4 = 12"). A number alone in bold type counts before others of the last paragraph.
    """
    box = boxed(text)
    if box is not None:
        found = list(numbers_in(box)) or _in_words(box)
        if found:
            return found[-1]
    line = hashed(text)
    for stated in [line] if line else statements(text):
        found = list(numbers_in(stated)) or _in_words(stated)
        if found:
            return _stated(plain_numbers(stated), found)
    paragraph = text.rstrip().rpartition("\n\n")[2]
    for bold in reversed(_BOLD.findall(paragraph)):
        found = list(numbers_in(bold))
        if len(found) == 1 and len(re.findall(r"[A-Za-z]+", bold)) <= 2 and not re.match(r"\s*\d+[.):]", bold):
            return found[0]
    return _last_number(text) or next(iter(_in_words(text)), None)


def numbers_in(text: str) -> Iterator[Number]:
    """The numbers of a text in their order. Exponents of units, and digits within words, are none."""
    text = plain_numbers(text)
    for match in _NUMBER.finditer(text):
        number = _read(match, _is_negative(text, match.start()))
        if number is not None:
            yield number


def _last_number(text: str) -> Number | None:
    text = plain_numbers(text)
    digits = _LAST_DIGIT.search(text)
    if digits is None:
        return None
    begin = max(0, digits.start() - TAIL)  # the whole of a long text is read only if its end has no number by itself
    for start in (begin, 0) if begin else (0,):
        matches = [match for match in _NUMBER.finditer(text, start) if match.start() > start or not start]
        last = aside = None
        for match in reversed(matches):
            number = _read(match, _is_negative(text, match.start()))
            if number is None:
                continue
            if last is not None:
                about = _BEFORE_ROUGHLY.fullmatch(text, number.end, last.start)
                return replace(last, exact=number) if about else last
            if _ASIDE.search(text, max(0, match.start() - LONGEST_ASIDE), match.start()):
                aside = aside or number
            else:
                last = number
        if last or aside:
            return last or aside
    return None


def plain_numbers(text: str) -> str:
    """The text as `numbers_in` reads it: plain signs, fractions as a/b, no LaTeX layout or bold type."""
    text = without_layout(keyboard_text(text))
    if "frac" in text:
        text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text)
    if "\\" in text or "x" in text or "X" in text:
        text = _TIMES.sub("*", text)
    return _MARKS.sub("", _ROUGHLY.sub("≈", text) if "\\" in text else text)


def _read(match: re.Match[str], negative: bool) -> Number | None:
    sign = -1 if negative else 1
    if len(match[0]) > MOST_DIGITS:
        return None
    suffix = (match["scale"] or "").strip().lower()
    thousands = suffix == "k"  # a part of the number: 3k is 3000 and never 3
    scale = Fraction(1) if thousands else _SCALES.get(suffix, Fraction(1))
    if match["date"] or match["times"]:
        parts = tuple(int(part) for part in re.split(r"[-/:]", match["date"] or match["times"]))
        return Number(parts, start=match.start(), end=match.end())
    if match["whole"]:
        if not int(match["under"]):
            return None
        value = int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
    elif match["base"]:
        base, power = int(match["base"]), int(match["braced"] or match["bare"])
        if abs(power) * len(match["base"]) > MOST_DIGITS or (base == 0 and power < 0):
            return None
        value = Fraction(base) ** power
    else:
        value = _decimal(match["value"])
        power = int(match["e"] or match["ten"] or match["tens"] or 0)
        if abs(power) > MOST_DIGITS:
            return None
        value *= Fraction(10) ** power
        if match["divisor"]:
            divisor = _decimal(match["divisor"])
            if not divisor:
                return None
            value /= divisor
    decimals = 0 if match["divisor"] else len((match["value"] or "").partition(".")[2])
    return Number(sign * value * (1000 if thousands else 1), scale, decimals, match.start(), match.end())


def _decimal(text: str) -> Fraction:
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d{1,2}|\d{1,3}(?:\.\d{3}){2,}", text):
        text = text.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"0,\d+|\d+,\d\d?", text):
        text = text.replace(",", ".")
    return Fraction(re.sub(r"[,' _]", "", text))


def _is_negative(text: str, start: int) -> bool:
    """Whether a minus before the number is its sign: not between two operands, in a range, a word or a list."""
    before = text[max(0, start - 40) : start]
    if "-" not in before and "n" not in before.lower():  # of minus, negative
        return False
    minus = _MINUS.search(before)
    if minus is None:
        return False
    left = before[: minus.start("sign")]
    if minus["sign"] != "-":
        return minus["sign"].lower() == "negative" or not left.rstrip()[-1:].isdigit()
    if (minus["before"] and minus["before"] in ")]}%") or minus["before"].isdigit():
        return False
    if not minus["space"]:  # attached to what stands before it: `COVID-19` is no sign, `=-5` is one
        return not minus["before"].isalpha()
    spaced = bool(minus["after"]) and not _CURRENCY.search(before)
    if not spaced:
        return True
    if "\n" in minus["space"] or not left.strip():
        return text[: max(0, start - len(before)) + len(left)].strip() == "" and "\n- " not in text
    return bool(_SIGNS_A_VALUE.search(left))


def _stated(text: str, found: list[Number]) -> Number:
    """The number that a statement begins with, or the result of the arithmetic it begins with; else its last."""
    first = found[0]
    if not _LEADING.fullmatch(text, 0, first.start):
        return found[-1]
    end = first.end
    while equation := _ARITHMETIC.match(text, end):
        following = [number for number in found if number.start >= equation.end()]
        if not following:
            break
        first, end = following[0], following[0].end
    conclusion = _CONCLUSION.search(text, end)
    return found[-1] if conclusion and "=" in conclusion[0] and found[-1].start > conclusion.start() else first


def _in_words(text: str) -> list[Number]:
    word = re.sub(r"[^a-z]", "", text.casefold())
    return [Number(Fraction(_WORDS[word]))] if word in _WORDS else []
