"""Settles what math-verify misreads in an answer: signs, currency, mixed numbers, fonts, letters, bases."""

import re

from depo_gateway.training.rewards.number import Number, numbers_in, plain_numbers
from depo_gateway.training.rewards.plain_text import keyboard_text, without_layout

_SYMBOLS = str.maketrans(
    {
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
    }
    | {"°": r"^\circ ", "±": r"\pm ", "√": r"\sqrt", "θ": r"\theta ", "…": r"\ldots ", "⇒": r"\Rightarrow "}
)
_ROOT = re.compile(r"\\sqrt\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))")
_ROOT_OF_BRACKET = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_FUNCTION = re.compile(r"(?<![\\A-Za-z{])(sin|cos|tan|cot|sec|csc|log|ln|pi|theta|infty|sqrt)(?![A-Za-z])")
_DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?[)}]?")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?m\.?)?", re.IGNORECASE)
_MIXED = re.compile(r"(?<![\w.^{/])(-?)\s*(\d+)(?:\s|\\[ ,;:!])+(\d+)\s*/\s*(\d+)(?![\w.])")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)")
_PERCENT = re.compile(r"\\?%|\s*(?:percent|per cent)\b")
_OPTION = re.compile(r"^\s*(?:\\text(?:bf|rm)?\s*\{\s*)?\(([A-J])\)\s*\}?(?:\\[ ,;:!]|~|\s)*(?=\S)")
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?\s*(\d+)\s*\}?")
_MODULO = re.compile(r"\\(?:pmod|bmod|mod)\s*\{?\s*([^{}()\s]+)\s*\}?|\(\s*\\?mod\s+(\w+)\s*\)|\bmod\s+(\w+)")
_DOTS = re.compile(r"\\(?:ldots|cdots|dots)\b|\.\.\.")
_ASSIGNED = re.compile(r"\s*\\?[A-Za-z]+(?:_\{?\w+\}?|')?(?:\([a-z]\))?\s*=(?!=)\s*(.+)", re.DOTALL)
_AND = re.compile(r"\s*(?:,\s*(?:and|or)\b|\b(?:and|or)\b|[,;])\s*")
# Before and after a number alone: a currency or `x =`; a unit of letters, as `km/h`, `cm^2`, `apples`.
_BEFORE_NUMBER = re.compile(
    r"(?:\s*\\?[A-Za-z](?:_\{?\w+\}?)?\s*=)?\s*(?:US|USD|EUR|GBP|Rs\.?)?[\s$€£¥₹(+-]*(?:\\(?:approx|sim)\s*)?"
)
_NOT_UNITS = (
    r"(?!(?:pi|sin|cos|tan|log|ln|exp|sqrt|or|and|mod|if|where|for|to|times|cdot|frac|choose|dots|ldots|cdots)\b)"
)
_VARIABLE_K = re.compile(r"\dk\b")  # 3k is a multiple of a variable in mathematics
_UNIT = rf"{_NOT_UNITS}(?:[A-Za-z]{{2,20}}|[A-Za-z](?=/))"
_AFTER_NUMBER = re.compile(
    rf"[\s)]*(?:\^?\s*\{{?\s*\\(?:circ|degree)\s*\}}?|°)?\s*[CF]?[\s)]*"
    rf"(?:{_UNIT}(?:(?:\s+|/|\s*/\s*){_NOT_UNITS}[A-Za-z]{{1,20}})*(?:\s*\^\s*\{{?\s*-?[1-4]\s*\}}?)?)?[\s).]*"
)
_INSIGNIFICANT = re.compile(r"\\[,;:!]|\$|(?<!\d)\s+|\s+(?!\d)|\.$")


def mathematical(answer: str) -> str:
    r"""The answer in the LaTeX that math-verify reads: `−` as -, √5 as \sqrt{5}, `2 1/2` as a sum, no currency."""
    latex = keyboard_text(answer.translate(_SYMBOLS)).translate(_SYMBOLS)
    latex = latex.replace("\\$", "").replace("{,}", ",").replace(",\\!", ",").replace("\\!", "")
    latex = re.sub(r"^\s*\$+(.*?)\$*\s*$", r"\1", latex, flags=re.DOTALL)
    latex = re.sub(r"^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1", latex, flags=re.DOTALL)
    latex = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}\s*", "", latex)
    latex = re.sub(r"\\text\s*\{\s*(-?[\d.,]+\s*[A-Za-z ]*)\}", lambda m: without_layout(m[0]), latex)
    latex = re.sub(r"(?<=[\w)])\s*\*\*\s*(?=[\w(-])", "^", latex).replace("**", "")
    latex = _FUNCTION.sub(r"\\\1 ", latex).replace("\\varnothing", "\\emptyset")
    latex = _DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", latex)
    latex = re.sub(r"\\underline\s*\{([^{}]*)\}", r"\1", latex)
    latex = _REPEATING.sub(_fraction, latex)
    latex = _ROOT_OF_BRACKET.sub(r"\\sqrt{\1}", _ROOT.sub(r"\\sqrt{\1}", latex))
    latex = _EXPONENT.sub(r"\1 \\cdot 10^{\2}", latex)
    latex = re.sub(r"\$(?=\d)", "", latex)
    return _MIXED.sub(r"\1(\2+\\frac{\3}{\4})", latex).strip()


def bare_text(answer: str) -> str:
    """The answer without fonts, spaces (but `2 1/2` is not `21/2`) and the case of a word, to compare as text."""
    text = (
        _DOTS.sub("...", without_layout(mathematical(answer))).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    )
    text = _MODULO.sub(lambda m: f" mod {m[1] or m[2] or m[3]}", text).replace("(mod", "mod")
    bare = _INSIGNIFICANT.sub("", text.strip())
    bare = re.sub(r"^\(([A-Za-z])\)$", r"\1", bare)
    return bare.casefold() if len(bare) > 2 and re.fullmatch(r"[^\W\d_]+", bare) else bare


def word_of(answer: str) -> str | None:
    r"""The answer as words, if it is nothing else: \text{East}, no solution, ACD. Letters alone may be variables."""
    plain = " ".join(without_layout(keyboard_text(answer)).replace("$", "").split()).strip(" .,;:!?\"'*()")
    is_text = "\\text" in answer or len(plain) >= 4 or plain.isupper() or plain.casefold() in ("yes", "no")
    return plain.casefold() if len(plain) > 1 and is_text and re.fullmatch(r"[^\W\d_][^\W\d_' -]+", plain) else None


def literal_of(answer: str) -> Number | None:
    """The number that an answer consists of, with at most a currency, `x =` and a unit; None if it is anything else."""
    plain = plain_numbers(answer).replace("\\(", "").replace("\\)", "").strip()
    plain = re.sub(r"^\$(.*)\$$", r"\1", plain).strip()
    found = list(numbers_in(plain))
    if len(found) != 1 or isinstance(found[0].value, tuple) or _VARIABLE_K.search(plain):
        return None
    before, after = plain[: found[0].start], plain[found[0].end :]
    if not _BEFORE_NUMBER.fullmatch(before) or not _AFTER_NUMBER.fullmatch(after) or before.count("-") > 1:
        return None
    return found[0]


def without_option(answer: str) -> str:
    r"""The answer without the option's letter before it: `\text{(D)}\ 7` is 7."""
    return _OPTION.sub("", answer)


def without_percent(answer: str) -> str:
    return _PERCENT.sub("", answer)


def in_base(answer: str) -> tuple[str, int] | None:
    """The digits and the base of `1010_2`."""
    match = _BASE.fullmatch(re.sub(r"[\s$,]", "", without_layout(answer)))
    return (match[1].lower().lstrip("0"), int(match[2])) if match else None


def clock_of(answer: str) -> tuple[int, int, str] | None:
    """The hour, the minute and the half of the day (a, p or nothing) of `6:30 PM`."""
    match = _CLOCK.fullmatch(without_layout(answer).replace("$", "").strip())
    return (int(match[1]), int(match[2]), (match[3] or "").lower()) if match else None


def modulus_of(answer: str) -> str | None:
    match = _MODULO.search(without_layout(answer))
    return (match[1] or match[2] or match[3]) if match else None


def is_equal_to_zero(answer: str) -> bool:
    """Whether it is an equation of several terms with 0, as of a line: its right side alone is no answer."""
    left, equals, right = answer.rpartition("=")
    return bool(equals) and right.strip(" $.") == "0" and bool(re.search(r"[A-Za-z].*[+-]|[+-].*[A-Za-z]", left))


def has_dots(answer: str) -> bool:
    return bool(_DOTS.search(answer))


def elements_of(answer: str) -> list[str]:
    """The parts of a list without brackets around it: "2, 3", "2 or 3". `10,000` and `(1, 2)` are one part."""
    text = without_layout(keyboard_text(answer)).replace("$", "").strip()
    parts, depth, start = [], 0, 0
    position = 0
    while position < len(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[position], 0)
        joint = _AND.match(text, position) if depth == 0 else None
        thousands = re.compile(r",\d{3}(?!\d)").match(text, position) and text[position - 1 : position].isdigit()
        inside_word = text[position].isalpha() and text[position - 1 : position].isalpha()
        if joint and joint.end() > position and not thousands and not inside_word and joint[0].strip():
            parts.append(text[start:position])
            start = position = joint.end()
        else:
            position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def assigned(part: str) -> tuple[str, str]:
    """The variable and the value of `x = 3`; no variable for any other part."""
    match = _ASSIGNED.fullmatch(part)
    return (part[: match.start(1)].rstrip("= ").strip(), match[1].strip()) if match else ("", part)


def _fraction(repeating: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction."""
    whole, fixed, repeated = repeating[1] or "0", repeating[2], repeating[3]
    under = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + repeated) - int(whole + fixed)}}}{{{under}}}"
