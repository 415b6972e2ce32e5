"""Makes the pictures in docs/images, of a real run: the demo's two models, the gateway, a Prometheus that scrapes it.

    python -m docs.screenshots [--minutes 6]

Needs Debian's packages chromium, chromium-driver, prometheus and, for a pleasant typeface, fonts-inter. Questions come
in waves, most for `auto`, some streamed, some for a pool by name or a threshold of their own. The pictures
show what really happened.
"""

import argparse
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from tqdm import tqdm

from tests import chromium
from tests.monitoring import servers

IMAGES = Path(__file__).parent / "images"
DATA = Path(__file__).parents[1] / "gateway/demo/data"
START_SECONDS = 90.0
WIDTH, SCALE, COLORS = 1240, 1.5, 255
POOLS = {"small": 1.0, "large": 5.0}  # and what they cost
ASKED = {"auto": 30, "auto-0.6": 3, "large": 2, "small": 1}  # models, by how often
RATE, WAVE, WAVE_SECONDS = 2.5, 1.4, 140.0  # requests a second, and how it swings
CONVERSATIONS = 0.15  # of the questions, asked as a second turn
GRAPHS = {  # stacked or not
    "prometheus-routing.png": ("sum by (pool, reason) (rate(gateway_decisions_total[1m]))", True),
    "prometheus-saved.png": (
        "1 - sum(rate(gateway_cost_total[2m])) / sum(rate(gateway_cost_all_large_total[2m]))",
        False,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of traffic before the pictures (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as running:
        directory = Path(place)
        urls = {
            name: running.enter_context(
                _program(
                    directory / name,
                    "depo_gateway.gateway.demo.llama_server",
                    f"--model={DATA / name / 'model.gguf'}",
                    "--port=0",
                )
            )[0]
            for name in POOLS
        }
        config = directory / "gateway.yaml"
        config.write_text(yaml.safe_dump(_settings(urls), sort_keys=False))
        url, admin, *_ = running.enter_context(
            _program(directory / "log", "gateway", "serve", f"--config={config}", addresses=3)
        )
        prometheus = running.enter_context(
            servers.prometheus(directory / "prometheus", {"depo-gateway": [admin]}, interval="2s")
        )
        stop = threading.Event()
        asking = threading.Thread(target=_ask, args=(url, stop))
        asking.start()
        running.callback(asking.join)
        running.callback(stop.set)
        for _ in tqdm(range(round(60 * options.minutes)), desc="traffic", unit="s", disable=not sys.stderr.isatty()):
            time.sleep(1)
        browser = chromium.start(WIDTH)
        running.callback(browser.quit)
        IMAGES.mkdir(exist_ok=True)
        for scheme, name in (("light", "status.png"), ("dark", "status-dark.png")):
            chromium.scheme(browser, scheme)
            _picture(browser, f"{admin}/admin/", name, 3.0)
        chromium.scheme(browser, "light")
        for name, (expression, stacked) in GRAPHS.items():
            graph = {"expr": expression, "tab": 0, "stacked": int(stacked), "range_input": f"{options.minutes:.0f}m"}
            query = urllib.parse.urlencode({f"g0.{key}": value for key, value in graph.items()})
            _picture(browser, f"{prometheus.url}/classic/graph?{query}", name, 5.0)
    return 0


def _settings(urls: dict[str, str]) -> dict[str, Any]:
    return {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": {
            name: {"model": name, "cost": cost, "max_in_flight": 16, "backends": [{"url": urls[name]}]}
            for name, cost in POOLS.items()
        },
        "routing": {"threshold": 0.85, "explore": 0.05},
        "estimator": {"path": str(DATA / "estimator"), "deadline_ms": 200},
        "records": {},
    }


@contextlib.contextmanager
def _program(log: Path, module: str, *arguments: str, addresses: int = 1) -> Iterator[list[str]]:
    """A program of ours, as a process; yields the addresses that it prints when it is ready."""
    with log.open("wb") as written:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=written, stderr=written)
    try:
        until = time.monotonic() + START_SECONDS
        while len(found := re.findall(r"http://[\w.:]*\w", log.read_text())) < addresses:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"python -m {module} does not start: {log.read_text()}")
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait(90)


def _ask(url: str, stop: threading.Event) -> None:
    """Questions until then, at a rate that rises and falls."""
    questions = [json.loads(line)["question"] for line in (DATA / "queries.jsonl").read_text().splitlines()]
    chance, began, rate = random.Random(0), time.monotonic(), RATE
    with ThreadPoolExecutor(16) as pool:
        while not stop.wait(chance.expovariate(rate)):
            rate = RATE + WAVE * math.sin(2 * math.pi * (time.monotonic() - began) / WAVE_SECONDS)
            messages = [{"role": "user", "content": chance.choice(questions)}]
            if chance.random() < CONVERSATIONS:
                answer = {"role": "assistant", "content": "Go on."}
                messages = [messages[0], answer, {"role": "user", "content": chance.choice(questions)}]
            (model,) = chance.choices(list(ASKED), list(ASKED.values()))
            body = {"model": model, "messages": messages, "max_tokens": 64, "stream": chance.random() < 0.4}
            pool.submit(_post, f"{url}/v1/chat/completions", body)


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def _picture(browser: Chrome, url: str, name: str, wait_seconds: float) -> None:
    """The whole page, in few colors: flat ones compress well."""
    chromium.resize(browser, WIDTH, 900, SCALE)
    browser.get(url)
    time.sleep(wait_seconds)
    height = browser.find_element(By.TAG_NAME, "body").size["height"]
    chromium.resize(browser, WIDTH, height, SCALE)
    time.sleep(1.0)
    picture = Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
