"""The figure of a report, as SVG and PNG."""

import re
from pathlib import Path

from depo_gateway.training.evaluation.figure import CurveFigure, MarkedPoint, draw_figure


def row(share: float) -> dict[str, object]:
    quality = {"value": 0.5 + share / 3, "low": 0.4 + share / 3, "high": 0.6 + share / 3}
    lower = {name: value - 0.05 for name, value in quality.items()}
    return {"threshold": share, "large_share": share, "quality": quality, "coin": lower, "length": lower}


ROWS = [row(step / 10) for step in range(11)]
POINTS = [MarkedPoint(0.4, 0.633, "0.85 in force", "o"), MarkedPoint(0.3, 0.6, "0.78", "D", filled=False)]
FIGURE = CurveFigure("gain", ROWS, POINTS, "large", [(0, 0.5), (1, 0.83)])


def test_the_threshold_in_force_is_marked_and_named(tmp_path: Path) -> None:
    svg = draw_figure(
        CurveFigure("gain", ROWS, POINTS, "large", [(0, 0.5), (1, 0.83)]), tmp_path / "curve.png"
    ).decode()
    for name in ("0.85 in force", "0.78", "rule gain", "random, same shares", "by prompt length", "95% interval"):
        assert f"<!-- {name} -->" in svg, name
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_series_differ_in_colour_dashes_and_lightness(tmp_path: Path) -> None:
    svg = draw_figure(
        CurveFigure("gain", ROWS, POINTS, "large", [(0, 0.5), (1, 0.83)]), tmp_path / "curve.png"
    ).decode()
    styles = set(re.findall(r'style="fill: none; (stroke-dasharray: [\d.,]+)?[^"]*?stroke: (#\w{6})', svg))
    lines = {(dashes, color) for dashes, color in styles if color in ("#0b3c6f", "#6b6b6b", "#c2570c")}
    assert len({color for _, color in lines}) == 3
    assert len({dashes for dashes, _ in lines}) == 3
    lightness = sorted(sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in {color for _, color in lines})
    assert lightness[1] - lightness[0] > 80


def test_without_quality_the_shares_are_drawn(tmp_path: Path) -> None:
    rows = [{"threshold": 0.0, "large_share": 0.0}, {"threshold": 1.0, "large_share": 0.7}]
    figure = CurveFigure("gain", rows, [MarkedPoint(0.85, 0.5, "0.85 in force", "o")], "large", measured=False)
    svg = draw_figure(figure, tmp_path / "curve.png").decode()
    assert "<!-- share of prompts to large -->" in svg
    assert "<!-- 0.85 in force -->" in svg
    assert "<!-- mean quality -->" not in svg
