"""A real Chromium without a window, driven over WebDriver, for the session.

Where it or its driver isn't installed the tests that need it are skipped; with DEPO_NEEDS_CHROMIUM=1, as in .ci/run,
they fail.
"""

import os
import shutil
import warnings
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers, which Chromium's sandbox refuses
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def start(width: int = 1280, height: int = 1600) -> webdriver.Chrome:
    """A browser of its own; `quit` ends it.

    Raises:
        FileNotFoundError: Chromium or its driver isn't installed.
    """
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("Debian's packages chromium and chromium-driver aren't installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(driver))


def scheme(browser: webdriver.Chrome, name: str) -> None:
    """Prefers a color scheme, light or dark, from now on."""
    preferred = {"features": [{"name": "prefers-color-scheme", "value": name}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)


def resize(browser: webdriver.Chrome, width: int, height: int = 1600, scale: float = 1.0) -> None:
    """The page's own size, below the least width of a window too; `scale`: dots a pixel."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    try:
        browser = start()
    except FileNotFoundError as error:
        pytest.fail(str(error)) if os.environ.get("DEPO_NEEDS_CHROMIUM") == "1" else pytest.skip(str(error))
    yield browser
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        browser.quit()
