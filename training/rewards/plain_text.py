"""Spellings of one text: Unicode's typography and LaTeX's layout as plain characters."""

import re
import unicodedata

# Quotes, dashes and signs as a keyboard writes them, which NFKC leaves.
_KEYBOARD = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛‹›′", "'"),
        **dict.fromkeys("“”„‟«»″", '"'),
        **dict.fromkeys("−‐‑‒–—―﹣－", "-"),
        **dict.fromkeys("×✕✖", "\\times "),
        **dict.fromkeys("·⋅∙", "\\cdot "),
        "÷": "/",
        "⁄": "/",
    }
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_SUPERSCRIPT_RUN = re.compile(f"[{_SUPERSCRIPTS}]+")
_PLAIN_DIGITS = str.maketrans(_SUPERSCRIPTS, "0123456789+-")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")  # a digit before one makes a mixed number
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|hbox|underline|operatorname)\s*\{([^{}]*)\}"
)
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}\s*(?:\{([^{}]*)\})?")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|,?\\!|limits|phantom\{[^{}]*\})(?![A-Za-z])")
_THIN = re.compile(r"\\[,;:! ]|~|\\(?:quad|qquad|thinspace)(?![A-Za-z])")


def keyboard_text(text: str) -> str:
    """The text in compatibility form (NFKC), with a keyboard's quotes and signs, fractions and powers spelled out."""
    if text.isascii():
        return text
    text = _INVISIBLE.sub("", text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run[0].translate(_PLAIN_DIGITS) + "}", text)
    text = _VULGAR.sub(lambda char: " " + unicodedata.normalize("NFKC", char[0]), text)
    return unicodedata.normalize("NFKC", text.translate(_KEYBOARD)).translate(_KEYBOARD)


def without_layout(latex: str) -> str:
    r"""LaTeX without sizes, colours and fonts: `9{,}500` and `9,\!500` as `9,500`, `\$` and `\%` without backslash."""
    if "\\" not in latex and "{" not in latex and "~" not in latex:
        return latex
    latex = latex.replace("{,}", ",").replace("\\!", "")
    for _ in range(3):  # nested fonts
        latex, changed = _TEXT.subn(r" \1 ", latex)
        if not changed:
            break
    latex = _COLOR.sub(lambda match: match[1] or "", latex)
    latex = _SIZES.sub("", latex)
    latex = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", "", latex)
    latex = _THIN.sub(" ", latex)
    return latex.replace("\\$", "$").replace("\\%", "%").replace("\\#", "#").replace("\\&", "&")
