"""A report as a list of blocks, written as Markdown or as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from depo_gateway.training.evaluation.markdown import table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.35; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1.05em; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 48rem; }
figure { margin: 1.2rem 0; max-width: 44rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .9em; color: #444; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }
thead th { border-bottom: 2px solid #777; }
tbody th { font-weight: 400; }
tr.marked th, tr.marked td { background: #e8f0f7; font-weight: 600; }
@media (max-width: 600px) { body { padding: .6rem; } h1 { font-size: 1.2rem; } th, td { padding: .3rem .4rem; } }
@media print {
  body { font-size: 11px; max-width: none; padding: 0; } h1 { font-size: 16px; } h2 { font-size: 13px; }
  figure, table, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; } .scroll { overflow: visible; }
  figure { max-width: 13cm; } table { font-size: 9px; } th, td { padding: 2px 5px; }
}
"""


@dataclass(frozen=True, slots=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table whose first column names its rows. `marked`: the row to stand out, in HTML."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: a file beside the Markdown, the same as SVG inside the HTML. `alt` says in words what it shows."""

    file: str
    svg: bytes
    alt: str
    caption: str


Block = Heading | Paragraph | TableBlock | Figure


@dataclass(frozen=True, slots=True)
class Report:
    """A report's figures, for report.json, and its blocks; its figure stands between beginning and tables."""

    figures: dict[str, Any]
    pools: tuple[str, ...]
    beginning: Sequence[Block]  # the answer, and what must be known with it
    tables: Sequence[Block]  # two tables at most
    appendix: Sequence[Block]


def blocks_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return f"**{block.text}**" if block.strong else block.text
    if isinstance(block, Figure):
        return f"![{block.alt.replace('[', '(').replace(']', ')')}]({block.file})\n\n{block.caption}"
    return f"{block.caption}:\n\n{table(block.rows, block.header)}"


def blocks_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as an HTML page that loads nothing: style and pictures are inside."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        text = escape(block.text)
        return f"<p><strong>{text}</strong></p>" if block.strong else f"<p>{text}</p>"
    if isinstance(block, Figure):
        data = base64.b64encode(block.svg).decode()
        image = f'<img alt="{escape(block.alt)}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure>{image}<figcaption>{escape(block.caption)}</figcaption></figure>"
    return _html_table(block)


def _html_table(block: TableBlock) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in block.header)
    rows = []
    for index, row in enumerate(block.rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        marked = ' class="marked"' if index == block.marked else ""
        rows.append(f'<tr{marked}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(block.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )
