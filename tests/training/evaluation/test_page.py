"""Reports as Markdown and as one HTML page."""

from html.parser import HTMLParser

from depo_gateway.training.evaluation.page import (
    Block,
    Figure,
    Heading,
    Paragraph,
    TableBlock,
    blocks_html,
    blocks_markdown,
)

VOID = {"meta", "img", "br", "hr", "link"}
BLOCKS: list[Block] = [
    Heading(1, "At <threshold> & more"),
    Paragraph("said plainly", strong=True),
    Figure("curve.png", b"<svg/>", 'quality "over" [cost]', "A caption"),
    TableBlock("Rows", ("name", "x"), [("a|b", "1"), ("c", "2")], marked=1),
]


class Page(HTMLParser):
    """The elements of a page; fails where one is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def loads_nothing(text: str) -> bool:
    """Whether a page needs no other file: no scripts, no links, pictures inside."""
    page = Page(text)
    outside = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "poster") and not (value or "").startswith("data:")
    ]
    return not outside and not page.named("script") and "url(" not in text and "@import" not in text


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    text = blocks_html("A <report>", BLOCKS)
    page = Page(text)
    assert loads_nothing(text)
    assert "<h1>At &lt;threshold&gt; &amp; more</h1>" in text
    assert page.named("html") == [{"lang": "en"}]
    assert page.named("img")[0]["alt"] == 'quality "over" [cost]'
    assert [cell["scope"] for cell in page.named("th")] == ["col", "col", "row", "row"]
    assert len(page.named("caption")) == 1
    assert '<tr class="marked"><th scope="row">c</th>' in text
    assert not loads_nothing(text.replace("data:image", "https://example.org/image"))


def test_markdown_has_the_same_parts() -> None:
    assert blocks_markdown(BLOCKS) == (
        "# At <threshold> & more\n\n**said plainly**\n\n"
        '![quality "over" (cost)](curve.png)\n\nA caption\n\n'
        "Rows:\n\n| name | x |\n|------|---|\n| a\\|b | 1 |\n| c    | 2 |\n"
    )
