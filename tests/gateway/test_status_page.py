"""The status page in a real browser, in front of a real gateway."""

import asyncio
import contextlib
import io
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from depo_gateway.estimator import calibration, checkpoint, held_publish
from depo_gateway.estimator.calibration import Calibration, Curve
from depo_gateway.estimator.held_publish import HeldPublish
from tests import chromium as browsers
from tests.chromium import chromium
from tests.gateway import checkpoints
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, running, settings

__all__ = ["chromium"]  # a fixture

pytestmark = pytest.mark.slow
WAIT_SECONDS = 10.0
HOSTILE = '</script><img src=x onerror="document.title=1"><b>model</b>'
CURVE = Curve(
    tuple(step / 20 for step in range(21)),
    tuple((1 - share, share) for share in (step / 25 for step in range(21))),
    tuple(0.5 + 0.45 * (1 - (1 - step / 20) ** 2) for step in range(21)),
    0.96,
)
# Every text that can be seen, with its color's contrast to what is behind it.
CONTRASTS = """
const channel = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const numbers = color => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest("script, :disabled")) continue;
  const style = getComputedStyle(element), own = numbers(element.closest("svg") ? style.fill : style.color);
  let behind = element;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const [a, b] = [light(own), light(numbers(getComputedStyle(behind || document.body).backgroundColor))];
  found.push([text, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]);
}
return found;
"""


class Page:
    """The page in the browser. Selenium waits in threads, for the gateway runs on this loop."""

    def __init__(self, browser: webdriver.Chrome, admin: str) -> None:
        self.browser, self.admin = browser, admin

    async def open(self) -> None:
        browsers.scheme(self.browser, "light")
        browsers.resize(self.browser, 1280)
        await asyncio.to_thread(self.browser.get_log, "browser")  # what other pages said
        await asyncio.to_thread(self.browser.get, self.admin + "/admin/")
        await self.shows("state", lambda text: text != "Asking")

    async def text(self, name: str) -> str:
        return await asyncio.to_thread(lambda: self.browser.find_element(By.ID, name).text)

    async def shows(self, name: str, wanted: Callable[[str], bool] | str) -> str:
        """The element's text once it is what is wanted, or contains it."""
        fits = wanted if callable(wanted) else lambda text: wanted in text
        deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
        while not fits(found := await self.text(name)):
            assert asyncio.get_running_loop().time() < deadline, f"{name} still shows {found!r}"
            await asyncio.sleep(0.05)
        return found

    async def run(self, script: str) -> Any:
        return await asyncio.to_thread(self.browser.execute_script, script)

    async def rows(self, name: str) -> list[list[str]]:
        """A table's cells, seen or not."""
        cells = "[...row.children].map(cell => cell.textContent)"
        found: list[list[str]] = await self.run(
            f"return [...document.querySelectorAll('#{name} tbody tr')].map(row => {cells})"
        )
        return found

    async def complaints(self) -> list[str]:
        """What the browser's console says, a refused load among it."""
        return [entry["message"] for entry in await asyncio.to_thread(self.browser.get_log, "browser")]


@contextlib.asynccontextmanager
async def page(browser: webdriver.Chrome, raw: dict[str, Any]) -> AsyncIterator[tuple[Page, Running]]:
    async with running(raw) as gateway:
        shown = Page(browser, gateway.admin)
        await shown.open()
        try:
            yield shown, gateway
        finally:
            await asyncio.to_thread(browser.get, "about:blank")  # or it goes on asking


@pytest.fixture(scope="module")
def curved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a curve."""
    place = tmp_path_factory.mktemp("curved") / "one"
    checkpoints.version(tiny_checkpoint, place, 0.0, {"gain": CURVE})
    return place


async def test_it_shows_what_the_gateway_does_as_it_happens(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, gateway):
            assert await shown.text("state") == "Ready"
            assert "No decision yet." in await shown.text("recent")
            assert await shown.text("saved") == await shown.text("share") == "–"
            for text in ("easy one", "easy two", "hard " * 9):
                await (await gateway.chat(text)).read()
            answer = await gateway.chat("easy", "large")
            await shown.shows("share-of", "of 4 decisions")
            assert await shown.text("share") == "50%"
            assert await shown.text("saved") == "40%"
            assert await shown.text("failed") == "0%"
            assert (await shown.text("mix-legend")).split() == ["small", "50%", "large", "50%"]
            label = await shown.run("return document.querySelector('#mix svg').getAttribute('aria-label')")
            assert label == "4 decisions in the last 5 minutes: 50% to small, 50% to large."
            assert await shown.run("return document.querySelectorAll('#mix rect').length") >= 2
            rows = await shown.rows("recent")
            assert [row[1].strip() for row in rows] == ["large", "large", "small", "small"]
            assert [row[2] for row in rows] == ["pinned", "unsure", "confident", "confident"]
            assert rows[0][3:6] == ["–", "–", "200"]
            assert rows[0][-1] == answer.headers["x-request-id"]
            assert all(float(row[3]) >= float(row[4]) == 0.85 for row in rows[2:])
            why = [row[1:] for row in await shown.rows("why")]
            assert why == [["2", "0", "2"], ["0", "1", "1"], ["0", "1", "1"]]  # confident, unsure, pinned
            assert small.url in await shown.text("pools")
            assert await shown.complaints() == []


async def test_the_curve_shows_where_the_threshold_stands_and_what_another_would_do(
    chromium: webdriver.Chrome, curved: Path
) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved, routing={"threshold": 0.5})) as (shown, _):
            assert await shown.text("trial-effect") == (
                "In force, 0.50: 40% to large, 52% of the cost, quality 83.8% (87.2% of large's)."
            )
            rows = await shown.rows("curve-table")
            assert rows[10] == ["0.50", "40.0%", "52.0%", "83.8%"]
            assert len(rows) == 21
            # The drawing agrees with the text: the point in force lies on the line, at its own place.
            place = await shown.run(
                "const points = document.querySelector('#curve .curve').getAttribute('points').split(' ');"
                "const here = document.querySelector('#curve .here');"
                "return [points[10].split(',').map(Number), ['cx', 'cy'].map(name => Number(here.getAttribute(name)))]"
            )
            assert place[0] == pytest.approx(place[1], abs=0.1)
            slider = chromium.find_element(By.ID, "trial")
            assert not chromium.find_element(By.ID, "back").is_enabled()
            for _ in range(50):  # by keyboard, in steps of .005
                await asyncio.to_thread(slider.send_keys, Keys.ARROW_RIGHT)
            assert await shown.text("trial-effect") == (
                "With 0.75: 60% to large, 68% of the cost, quality 92.2% (96.0% of large's)."
            )
            assert await shown.run("return document.querySelectorAll('#curve .trial').length") == 1
            await asyncio.to_thread(chromium.find_element(By.ID, "back").click)
            assert (await shown.text("trial-effect")).startswith("In force, 0.50")
            assert await shown.run("return document.querySelectorAll('#curve .trial').length") == 0


async def test_without_labels_the_curve_is_of_shares_and_without_a_curve_it_says_so(
    chromium: webdriver.Chrome, tiny_checkpoint: Path, tiny_policy_checkpoint: Path
) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        routing = {"rule": "difficulty", "threshold": 0.5}
        async with page(chromium, settings([small], [large], tiny_policy_checkpoint, routing=routing)) as (shown, _):
            assert await shown.text("curve-title") == "What the loaded estimator's thresholds do"
            assert re.fullmatch(r"In force, 0.50: \d+% to large, \d+% of the cost\.", await shown.text("trial-effect"))
            assert "quality" not in await shown.text("curve-all")
            assert await shown.complaints() == []
        async with page(chromium, settings([small], [large], tiny_checkpoint)) as (shown, _):
            assert "has no curve for the rule gain and these pools" in await shown.text("curve-none")
            assert not chromium.find_element(By.ID, "trial").is_displayed()
        alike = {"large": {"cost": 1}}
        curved = tiny_checkpoint.parent / "alike"
        checkpoints.version(tiny_checkpoint, curved, 0.0, {"gain": CURVE})
        async with page(chromium, settings([small], [large], curved, **alike)) as (shown, gateway):
            assert await shown.text("trial-effect") == "In force, 0.85: 68% to large, quality 94.0% (97.9% of large's)."
            assert "share of large" in await shown.text("curve")
            await (await gateway.chat("easy")).read()
            await shown.shows("saved-of", "pools.*.cost is the same for all pools")


async def test_names_from_the_config_are_text_and_never_markup(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        hostile = {"model": HOSTILE, "backends": [{"url": small.url}, {"url": "http://127.0.0.1:1/<b>x</b>"}]}
        async with page(chromium, settings([small], [large], curved, small=hostile)) as (shown, gateway):
            await gateway.chat("easy")
            await shown.shows("recent", "small")
            assert HOSTILE in await shown.text("pools")
            assert "http://127.0.0.1:1/<b>x</b>" in await shown.text("pools")
            assert await shown.run("return document.querySelectorAll('main img, main b:not(.legend b)').length") == 0
            assert (await shown.run("return document.title")).endswith("DEPO Gateway")
            # And were there markup, the policy would not let it run.
            await shown.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
            await asyncio.sleep(0.3)
            assert await shown.run("return window.ran ?? null") is None
            assert any("Content Security Policy" in said for said in await shown.complaints())


async def test_pools_stand_in_the_configs_order_whatever_they_are_called(
    chromium: webdriver.Chrome, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    files = {name: (tiny_checkpoint / name).read_bytes() for name in checkpoint.FILES}
    manifest, known = checkpoint.load_manifest(tiny_checkpoint), calibration.loads(files[checkpoint.CALIBRATION])
    names = ("constructor", "70")
    files[checkpoint.CALIBRATION] = calibration.dumps(Calibration(names, known.stages, {}, {}))
    checkpoint.write_checkpoint(tmp_path / "named", files, manifest.base, names, manifest.text, {})
    async with FakeVllm() as one:
        raw = settings([one], [one], tmp_path / "named")
        backends = [{"url": one.url}]
        raw["pools"] = {
            name: {"model": f"m-{name}", "cost": 0.0004 * 3**at, "backends": backends} for at, name in enumerate(names)
        }
        async with page(chromium, raw) as (shown, gateway):
            await (await gateway.chat("easy", "70")).read()
            await shown.shows("share", "100%")
            assert await shown.text("share-title") == "Sent to 70"
            assert [(row[0].split("m-")[0].strip(), row[1]) for row in await shown.rows("pools")] == [
                ("constructor", "0.0004"),
                ("70", "0.0012"),
            ]
            assert (await shown.text("mix-legend")).split() == ["constructor", "0%", "70", "100%"]
            assert await shown.complaints() == []


async def test_an_answer_of_another_version_is_reported(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, _):
            await shown.run(
                "const asked = window.fetch; window.fetch = async (...what) => {"
                "const text = await (await asked(...what)).json(); delete text.lately; return Response.json(text); }"
            )
            await shown.shows("lost", "its answer is of another version than this page")
            assert await shown.text("state") == "No answer"


async def test_a_lost_gateway_is_shown_with_the_time_and_found_again(chromium: webdriver.Chrome, curved: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], curved, admin={"port": port})
        shown = Page(chromium, f"http://127.0.0.1:{port}")
        async with running(raw) as gateway:
            await shown.open()
            await (await gateway.chat("easy")).read()
            await shown.shows("share-of", "of 1 decision ")
            assert not chromium.find_element(By.ID, "lost").is_displayed()
        text = await shown.shows("lost", "has not answered since")
        assert re.fullmatch(
            r"The gateway has not answered since (\d\d:\d\d:\d\d) \(no connection\)\. "
            r"The page shows the state of that moment; it keeps trying\.",
            text,
        )
        assert await shown.text("state") == "No answer"
        assert "as of" in await shown.text("updated")
        assert (await shown.run("return document.title")).startswith("No answer")
        assert "of 1 decision " in await shown.text("share-of")  # the last known, dimmed
        assert await shown.run("return getComputedStyle(document.querySelector('main')).opacity") == "0.5"
        await asyncio.sleep(2.5)
        assert await shown.text("lost") == text  # the moment stays
        async with running(raw):
            await shown.shows("state", "Ready")
            assert not chromium.find_element(By.ID, "lost").is_displayed()
            assert await shown.run("return document.body.className") == ""
            await asyncio.to_thread(chromium.get, "about:blank")


async def test_what_a_publish_changed_and_one_that_is_held_back_are_shown(
    chromium: webdriver.Chrome, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    change = {"publish_change": {"share_change": -0.0123, "cost_change": 0.02}}
    version(tiny_checkpoint, tmp_path / "1", 0.0, metrics=change)
    checkpoint.publish(tmp_path / "1")
    held = HeldPublish("2", "v2", "v1", 1.0, "2 is held back: <b>the cost</b> would rise by 53.6 points", 0.67, 0.536)
    held_publish.write_held(tmp_path, held)
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], tmp_path)) as (shown, _):
            await shown.shows("notices", held.sentence + ".")
            facts = await shown.text("facts")
            assert "changed the share of large by −1.2 points and the cost by +2.0 points of all-large's" in facts
            assert await shown.complaints() == []


async def test_trouble_stands_at_the_top(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, gateway):
            await small.kill()
            await gateway.chat("easy")
            await shown.shows("state", "Ready, 1 of 2 backends out")
            assert "down" in await shown.text("pools")
            large.script = Script(status=503)
            await large.kill()
            assert (await gateway.chat("easy")).status == 503
            await shown.shows("notices", "The gateway is not ready: no pool has a usable backend.")
            assert await shown.text("state") == "Not ready"
            assert await shown.shows("failed-of", "(5xx)") == "1 of 2 requests in 10 s (5xx)"
            assert "no answer" in (await shown.rows("recent"))[0][2]


async def test_pausing_holds_the_page_still(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, gateway):
            button = chromium.find_element(By.ID, "pause")
            await asyncio.to_thread(button.click)
            assert button.get_attribute("aria-pressed") == "true"
            await (await gateway.chat("easy")).read()
            await asyncio.sleep(2.5)
            assert "No decision yet." in await shown.text("recent")
            await asyncio.to_thread(button.click)
            await shown.shows("recent", "confident")


async def test_texts_under_a_target_mention_it(chromium: webdriver.Chrome, curved: Path) -> None:
    """A target knows no pinned requests; with a pool away the calibration's figures are not what happens."""
    async with FakeVllm() as small, FakeVllm() as large:
        routing = {"target": {"large_share": 0.3}}
        async with page(chromium, settings([small], [large], curved, routing=routing)) as (shown, gateway):
            await (await gateway.chat("easy", "large")).read()
            text = await shown.shows("share-of", "of 1 decision ")
            assert text.endswith(", pinned ones too; the target leaves them out")
            assert "follows a target of 0.3, now at – (without pinned requests)" in await shown.text("facts")
            text = await shown.text("trial-effect")
            assert text.startswith("In force, ")
            assert "calibration" not in text
            await small.kill()
            text = await shown.shows("trial-effect", "calibration")
            assert text.endswith("). This is by the calibration; at present small has no backend that answers.")
            label = await shown.run("return document.querySelector('#curve svg').getAttribute('aria-label')")
            assert label.endswith("at present small has no backend that answers.")
        async with page(chromium, settings([large], [large], curved)) as (shown, gateway):
            await (await gateway.chat("easy", "large")).read()
            assert "pinned" not in await shown.shows("share-of", "of 1 decision ")


async def test_the_curve_s_axes_have_names(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, _):
            said = (await shown.text("curve")).split("\n")
            assert "quality" in said
            assert "cost, of all in large" in said
            covered = await shown.run(
                "const boxes = [...document.querySelectorAll('#curve text')].map(item => item.getBoundingClientRect());"
                "return boxes.some((one, at) => boxes.slice(at + 1).some(other => one.left < other.right - 1 &&"
                "other.left < one.right - 1 && one.top < other.bottom - 4 && other.top < one.bottom - 4))"
            )
            assert not covered


async def test_a_phone_shows_what_matters_and_where_there_is_more(chromium: webdriver.Chrome, curved: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        backends = [{"url": small.url}, {"url": "http://inference7.models.svc.cluster.local:18000/v1"}]
        raw = settings([small], [large], curved, small={"backends": backends})
        async with page(chromium, raw) as (shown, gateway):
            await (await gateway.chat("easy")).read()
            await large.kill()
            await gateway.chat("easy", "large")
            await shown.shows("recent", "503")
            heads = "return [...document.querySelectorAll('#recent thead th')].filter(head => {"
            heads += "const box = head.getBoundingClientRect(), whole = document.getElementById('recent');"
            heads += "return box.width && box.right <= whole.getBoundingClientRect().right + .5})"
            heads += ".map(head => head.textContent)"
            every = ["Time", "Pool", "Reason", "Confidence", "Threshold", "Status", "Seconds", "Endpoint", "Request"]
            for width, wanted in (
                (1280, every),
                (700, every[:7]),
                (400, ["Time", "Pool", "Reason", "Confidence", "Status"]),
                (360, ["Time", "Pool", "Reason", "Status"]),
            ):
                browsers.resize(chromium, width)
                await asyncio.sleep(0.3)
                assert await shown.run(heads) == wanted, width
                lines = await shown.run(
                    "const found = [], range = document.createRange();"
                    "for (const item of document.querySelectorAll('#pools .url'))"
                    "  for (const node of item.childNodes) if (node.nodeType === 3 && /\\d/.test(node.data)) {"
                    "    range.selectNodeContents(node);"
                    "    found.push([node.data, new Set([...range.getClientRects()].map(box => box.top)).size]);"
                    "  }"
                    "return found"
                )
                assert len(lines) >= 4
                assert [text for text, count in lines if count != 1] == []
                assert small.url in await shown.run("return document.getElementById('pools').textContent")
            # A shadow stands where there is more to the side, and on no other.
            browsers.resize(chromium, 400)
            await shown.run("document.querySelector('#recent table').style.width = '900px'")
            assert await shadows(shown) == (False, True)
            await shown.run("document.querySelector('#recent').scrollLeft = 200")
            assert await shadows(shown) == (True, True)
            await shown.run("document.querySelector('#recent').scrollLeft = 9000")
            assert await shadows(shown) == (True, False)


async def shadows(shown: Page) -> tuple[bool, bool]:
    """Whether the recent decisions' left and right edge, beneath the heads, is darker than the card."""
    await asyncio.sleep(0.1)
    shot = await asyncio.to_thread(lambda: shown.browser.find_element(By.ID, "recent").screenshot_as_png)
    image = Image.open(io.BytesIO(shot)).convert("L")
    left, right = (image.getpixel((x, image.height - 2)) for x in (1, image.width - 2))
    assert isinstance(left, int)
    assert isinstance(right, int)
    return left < 245, right < 245


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_can_be_read(chromium: webdriver.Chrome, curved: Path, scheme: str) -> None:
    """WCAG's contrast of 4.5 for every text, names for what can be operated, and no scrolling sideways."""
    async with FakeVllm() as small, FakeVllm() as large:
        async with page(chromium, settings([small], [large], curved)) as (shown, gateway):
            browsers.scheme(chromium, scheme)
            for text in ("easy", "hard " * 9):
                await (await gateway.chat(text)).read()
            await large.kill()
            await gateway.chat("easy", "large")
            await shown.shows("state", "backends out")
            await shown.run("document.querySelectorAll('details').forEach(item => item.open = true)")
            ground = await shown.run("return getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")
            contrasts = await shown.run(CONTRASTS)
            assert len(contrasts) > 100
            assert [(text, round(ratio, 2)) for text, ratio in contrasts if ratio < 4.5] == []
            unnamed = await shown.run(
                "return [...document.querySelectorAll('button, input, [tabindex], svg[role=img], figure')]"
                ".filter(item => !item.ariaLabel && !item.getAttribute('aria-labelledby') && !item.labels?.length"
                "&& !(item.matches('button') && item.textContent.trim())).map(item => item.outerHTML)"
            )
            assert unnamed == []
            for width in (1280, 800, 400, 320):
                browsers.resize(chromium, width)
                await asyncio.sleep(0.3)
                assert await shown.run("return document.documentElement.scrollWidth") <= width, width
            assert await shown.complaints() == []
