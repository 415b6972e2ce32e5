import pytest

from depo_gateway.training.rewards.plain_text import keyboard_text, without_layout


@pytest.mark.parametrize(
    ("typeset", "plain"),
    [
        ("−5 – 3", "-5 - 3"),
        ("“It’s”", '"It\'s"'),
        ("１２％", "12%"),
        ("2½", "2 1/2"),
        ("27 m³ · 10⁻²", "27 m^{3} \\cdot  10^{-2}"),
        ("1\u00a0000\u200b", "1 000"),
        ("ascii - only", "ascii - only"),
    ],
)
def test_unicode_as_a_keyboard_writes_it(typeset: str, plain: str) -> None:
    assert keyboard_text(typeset) == plain


@pytest.mark.parametrize(
    ("latex", "plain"),
    [
        (r"9{,}500", "9,500"),
        (r"9,\!500", "9,500"),
        (r"1\,000\,000", "1000000"),
        (r"\$5 and 6\%", "$5 and 6%"),
        (r"\text{\textbf{C}}", "C"),
        (r"\color{red}{42}", "42"),
        (r"\left(1, 2\right)", "(1, 2)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\underline{6}", "6"),
    ],
)
def test_latex_without_its_layout(latex: str, plain: str) -> None:
    assert without_layout(latex).strip() == plain
