"""Reads option letters, as `(B)`, `B.` or `A, B and C`, and tells them from articles, pronouns and names."""

import re

_OPEN = r"[\s*_`\"'$(\[{<]*"
_CLOSE = r"[*_`\"'$)\]}>]*"
_BEFORE, _AFTER = r"(?<![A-Za-zÀ-ɏ0-9_\\'])", r"(?![A-Za-zÀ-ɏ0-9_^]|'[A-Za-z])(?!\s*(?:[=<≤≥^]|\\(?![)\]])))"
# `A` and `I` before a lower-case word are an article and a pronoun, except before words that give a reason.
_REASON = (
    r"(?:because|since|as|due|for|given|based|which|where|while|but|not|though|rather|instead|however|or|and|with"
    r"|are)\b"
)
_WORD_AFTER = re.compile(rf"\s+(?!{_REASON})[a-zà-ÿ]|'[a-z]")
_FILLER = re.compile(
    r"(?:[\s*_:]|(?:the|probably|likely|clearly|definitely|actually|indeed|simply|therefore|thus|then|either|both|correct"
    r"|options?|choices?|letters?|opción|alternativa|选项)\b\s*:?)*",
    re.IGNORECASE,
)
_SMALL = re.compile(rf"{_OPEN}([a-z])(?={_CLOSE}(?:[)\]}}.,:](?!\w)|\s*$|\s*\n))")
_JOIN = re.compile(
    rf"{_CLOSE}(?:\s*(?:,|/|;|&|\bor\b|\band\b)\s*(?:(?:or|and)\b)?|\s+)(?:option\s+)?{_OPEN}", re.IGNORECASE
)
_ITEM_ENDS = re.compile(rf"{_CLOSE}\s*(?:[,/;&.!?:)]|$|\n|(?:or|and|are)\b|[A-Z](?![A-Za-z]))")
_DENIED = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brul(?:e|ed|es|ing)\s+out|\beliminat\w+|\bexclud\w+|\bthan|\bunlike)"
    rf"\s+(?:the\s+)?(?:option\s+|choice\s+|answer\s+)?{_OPEN}$",
    re.IGNORECASE,
)
# `vitamin C`, `Type A`, `Hepatitis B`: the letter belongs to a name.
_NAME = re.compile(
    r"(?:\b(?:vitamin|hepatitis|type|class|group|grade|plan|section|part|figure|table|point|phase|influenza|angle|set|line)"
    r"|[^\s.!?:;\n]\s+[A-Z][a-z]{2,}|^\s*(?!(?:So|Thus|Hence|Therefore|Option|Choice|Answer|Only|Then|Either|Maybe|Probably"
    r"|Definitely|Clearly|Choose|Pick|Select|Letter)\b)[A-Z][a-z]{2,})\s+$"
)


def letters_at(text: str, start: int, allowed: str) -> tuple[frozenset[str], int] | None:
    """The option letters at a place where an answer is stated, and where they end: `(B)`, `b)`, `A or B`, `AC`."""
    filler = _FILLER.match(text, start)
    position = filler.end() if filler else start
    run = re.compile(rf"{_OPEN}([{allowed}]{{2,}}){_AFTER}").match(text, position)
    if run and list(run[1]) == sorted(set(run[1])):
        return frozenset(run[1]), run.end()
    one = re.compile(rf"{_OPEN}([{allowed}]){_AFTER}").match(text, position)
    if one is None:
        small = _SMALL.match(text, position)
        if small is None or small[1].upper() not in allowed:
            return None
        return frozenset(small[1].upper()), small.end()
    if one[1] in "AI" and _WORD_AFTER.match(text, one.end()):
        return None
    found, end = {one[1]}, one.end()
    while (join := _JOIN.match(text, end)) and (item := re.compile(rf"([{allowed}]){_AFTER}").match(text, join.end())):
        if not _ITEM_ENDS.match(text, item.end()):
            break
        found.add(item[1])
        end = item.end()
    return frozenset(found), end


def letters_within(text: str, allowed: str) -> frozenset[str] | None:
    """The last option letter anywhere in a text, with those it is listed with; None if there is none."""
    found, position = None, 0
    single = re.compile(rf"{_BEFORE}([{allowed}]){_AFTER}")
    while match := single.search(text, position):
        read = letters_at(text, match.start(), allowed)
        position = read[1] if read else match.end()
        before = text[max(0, match.start() - 60) : match.start()]
        if read and not _DENIED.search(before) and not _NAME.search(before) and not before.rstrip().endswith("="):
            found = read[0]
    return found
