"""The verifier `choice`: the letter of a multiple-choice question."""

import re
from dataclasses import dataclass

from depo_gateway.training.rewards.answers import answer_part, boxed, hashed, mentions, reference_part, statements
from depo_gateway.training.rewards.option_letters import letters_at, letters_within
from depo_gateway.training.rewards.plain_text import keyboard_text, without_layout
from depo_gateway.training.rewards.reasoning import final_text
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RewardVerdict, verdict_of

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FEWEST_LETTERS = 10  # A to J, as MMLU-Pro has; a reference beyond extends them

_INDEX = re.compile(r"\d{1,2}")
_ALONE = re.compile(r"[\s(\[{*_\"'`$]*([A-Za-z])[\s)\]}*_\"'`$.:,]*")
_WITH_TEXT = re.compile(
    r"[\s*_]*(?:[Oo]ption\s+)?(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])[).:])[*_]*\s+(\S.*)", re.DOTALL
)
_CORRECT = r"(?:the\s+)?(?:only\s+|most\s+)?(?:correct|right|best|true|accurate|appropriate|answer)\b"
_CHOSEN = re.compile(
    r"\b(?:choose|choosing|chose|pick|picking|select|selecting|go\s+with|going\s+with|opt\s+for)\s+"
    r"|\bcorrect\s*(?:[:=]|is\b)|故?[选選]择?擇?[:：]?|\b(?:choice|option)\s*(?:is\b|[:：=])",
    re.IGNORECASE,
)

_GROUND = re.compile(r"[)\]*.]*(?:\s*[,;:]|\s*-\s|\s+(?:because|since|as|due)\b)")
_CHOSEN_STEMS = (
    "choos",
    "chose",
    "pick",
    "select",
    "go with",
    "going with",
    "opt for",
    "correct",
    "choice",
    "option",
    "选",
    "選",
)


@dataclass(frozen=True, slots=True)
class Option:
    """What a reference names: its letters, and the option's own text if it is given."""

    letters: frozenset[str]
    text: str = ""

    @property
    def allowed(self) -> str:
        """The letters of all options: A to J, or to the reference's own."""
        return ALPHABET[: max(FEWEST_LETTERS, *(ALPHABET.index(letter) + 1 for letter in self.letters))]


def grade_choice(completion: str, reference: str) -> RewardVerdict:
    """1 if the completion chooses the reference's letter, or answers with that option's own text.

    The reference is a letter ("C", "(c)"), a letter and the option's text ("C. Vitamin D"), several letters ("A, C"),
    or an index from 0.
    """
    expected = option_of(reference_part(reference))
    if expected is None:
        return NO_REFERENCE
    given = letters_of(answer_part(final_text(completion) or ""), expected)
    return NOT_READABLE if given is None else verdict_of(given == expected.letters)


def option_of(reference: str) -> Option | None:
    """The option that a reference names; None if it names none."""
    text = _plain(reference)
    text = boxed(text) or hashed(text) or next(statements(text), text)
    text = without_layout(text).strip()
    if _INDEX.fullmatch(text):
        return Option(frozenset(ALPHABET[int(text)]), text) if int(text) < len(ALPHABET) else None
    if match := _ALONE.fullmatch(text):
        return Option(frozenset(match[1].upper()))
    if match := _WITH_TEXT.fullmatch(text):
        return Option(frozenset((match[1] or match[2]).upper()), match[3])
    read = letters_at(text, 0, ALPHABET)
    return Option(read[0]) if read and not text[read[1] :].strip(" \t\n.)]*\"'") else None


def letters_of(text: str, expected: Option) -> frozenset[str] | None:
    r"""The letters that a completion chooses; those expected also for the expected option's own text; None: none.

    It is read, in this order, from the last \boxed{}; the last "the answer is X"; the last "X is correct" or "I choose
    X"; a line that begins as an option does ("B. A decrease"), if all such lines have one letter; the last letter.
    """
    text, allowed = _plain(text), expected.allowed
    box = boxed(text)
    for stated in ([box] if box else []) + list(statements(text)):
        stated = without_layout(stated)
        if _is_text_of(stated, expected):
            return expected.letters
        read = letters_at(stated, 0, allowed)
        found = read[0] if read else letters_within(stated, allowed) if stated != box else None
        if found:
            return found
    text = without_layout(text)
    if _is_text_of(text, expected):
        return expected.letters
    return _preferred(text, allowed) or _first_of_line(text, allowed) or letters_within(text, allowed)


def _preferred(text: str, allowed: str) -> frozenset[str] | None:
    """The letter of the last "X is correct", "I choose X", "Correct: X"."""
    is_correct = re.compile(
        rf"(?<![A-Za-z0-9_'])([{allowed}])[)\]*_.\"'}}]*\s+(?:is|would\s+be|must\s+be|seems|looks)\s+{_CORRECT}"
    )
    found = [(match.start(), frozenset(match[1])) for match in is_correct.finditer(text)]
    chosen = _CHOSEN.finditer(text) if mentions(text, _CHOSEN_STEMS) else ()
    it_is = re.compile(
        rf"\b(?:so|thus|hence|therefore)[\s,:(*_]+([{allowed}])[)\]*_.\"'}}]*\s+it\s+is\b", re.IGNORECASE
    )
    found += [(match.start(), frozenset(match[1].upper())) for match in it_is.finditer(text)]
    found += [(match.end(), read[0]) for match in chosen if (read := letters_at(text, match.end(), allowed))]
    return max(found, key=lambda each: each[0])[1] if found else None


def _first_of_line(text: str, allowed: str) -> frozenset[str] | None:
    """The one letter with which lines begin as options do: `B.`, `(B)`, `**B**`, `b)`, or `B` alone on its line.

    Without such lines, the letter with which the text begins, if a reason or the option's text follows it. If lines
    begin with several, the last line counts, if it is a letter alone.
    """
    either = allowed + allowed.lower()
    begins = re.compile(
        rf"^[ \t*_>#-]*(?:(?:option|choice)\s+)?(?:\(([{either}])\)|\[([{either}])\]|([{either}])\)|([{allowed}])[.:]"
        rf"|([{allowed}])[*_]+(?=\s|$)|([{either}])[.:*_]*\s*$)",
        re.MULTILINE,
    )
    letters = [next(filter(None, match.groups())).upper() for match in begins.finditer(text)]
    if not letters:
        return _first_of_text(text, allowed)
    if len(set(letters)) == 1:
        return frozenset(letters[:1])
    alone = _ALONE.fullmatch(text.rstrip().rpartition("\n")[2])
    return frozenset(alone[1].upper()) if alone and alone[1].upper() in allowed else None


def _first_of_text(text: str, allowed: str) -> frozenset[str] | None:
    """The letters with which a text begins: `b. text`, `B Text`, `B because`, `B, since`."""
    if small := re.match(rf"[\s*_]*([{allowed.lower()}])\.\s", text):
        return frozenset(small[1].upper())
    capital = re.match(rf"\s*([{allowed}])\s+(?=[A-Z\d])(?![A-Z](?![A-Za-z]))", text)
    if capital and capital[1] not in "AI":  # `A Nile crocodile`
        return frozenset(capital[1])
    read = letters_at(text, 0, allowed)
    return read[0] if read and read[0] != {"I"} and _GROUND.match(text, read[1]) else None


def _is_text_of(answer: str, expected: Option) -> bool:
    return bool(expected.text) and _bare(answer) == _bare(expected.text)


def _plain(text: str) -> str:
    return keyboard_text(text).replace("\\times ", "x")


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(" .,;:!?\"'`*_()").casefold()
