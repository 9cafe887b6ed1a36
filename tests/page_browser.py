"""One Chromium for all tests of the page, driven through Selenium."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page_server import Behaviour, PageServer, page_server

WINDOW = (1200, 800)
PHONE = (360, 740)
SECONDS = 30  # of waiting, on a busy machine


class Page:
    """The page in the browser, and the stand-in server behind it."""

    def __init__(self, driver: Any, server: PageServer) -> None:
        self.driver = driver
        self.server = server

    def open(self, address: str = "", url: str | None = None) -> Page:
        """Load the page anew at an address (from # on), and wait until the models are known."""
        self.driver.get("about:blank")  # another # alone would not load anything
        self.driver.get((url or self.server.url) + address)
        self.wait(lambda: self.js("""const shown = id => document.getElementById(id);
            return shown('guidance').value !== '' || !shown('message').hidden"""), "the models, or an error")
        return self

    def size(self, width: int, height: int) -> None:
        """Set what the page sees as its window; a real window is never as narrow as a phone."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=False)

    def media(self, **features: str) -> None:
        """Set media features: prefers_color_scheme="dark"."""
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=values)

    def offline(self, yes: bool) -> None:
        """Let every request fail, as when the server is gone."""
        self.cdp("Network.enable")
        self.cdp("Network.emulateNetworkConditions", offline=yes, latency=0, downloadThroughput=-1,
                 uploadThroughput=-1)

    def cdp(self, method: str, **values: Any) -> Any:
        """Call Chromium's debugging protocol."""
        return self.driver.execute_cdp_cmd(method, values)

    def js(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; a promise is awaited."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """Return the first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Return all elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """Return an element's text, also a hidden one's."""
        return self.js("return document.querySelector(arguments[0]).textContent.replace(/\\s+/g, ' ').trim()", selector)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        """Wait for a true value and return it; fail with what was waited for."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: condition())
        except TimeoutException:
            said = self.js("return document.getElementById('output')?.innerText")
            pytest.fail(f"waited {seconds} s for {what}; the page says: {said}")

    def type(self, selector: str, text: str) -> None:
        """Replace a field's text by typing."""
        field = self.find(selector)
        self.js("arguments[0].select()", field)
        field.send_keys(text or "\ue017")

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver, duration=0)
        for key in keys:
            chain.send_keys(key)
        chain.perform()

    def hover(self, element: Any) -> None:
        """Move the mouse over an element."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def draw(self, prompt: str) -> None:
        """Type a prompt, press Enter, wait for the end."""
        self.type("#prompt", prompt)
        self.keys("\ue007")
        self.finished()

    def finished(self, count: int | None = None) -> None:
        """Wait until all pictures of the grid are finished."""
        def done() -> bool:
            states = self.states()
            return set(states) == {"done"} and (count is None or len(states) == count)
        self.wait(done, "all pictures")

    def states(self) -> list[str]:
        """Return the state of each picture of the grid."""
        return self.js("return [...document.querySelectorAll('#grid .frame')].map(frame => frame.dataset.state)")

    def pictures(self) -> list[bytes]:
        """Return the pixels of each picture of the grid, as RGBA in rows."""
        return [bytes(values) for values in self.js("""
            return [...document.querySelectorAll('#grid img')].map(image => {
              const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
              const context = canvas.getContext('2d');
              context.drawImage(image, 0, 0);
              return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
            })""")]

    def download(self, selector: str, folder: Path) -> Path:
        """Click a link and return the file that the browser has saved."""
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.find(selector).click()
        return self.wait(lambda: next(folder.glob("*.png"), None), "a downloaded file")

    def value(self, name: str) -> str:
        """Return what a field of the form holds."""
        return self.js("return document.getElementById(arguments[0]).value", name)

    def hash(self) -> str:
        """Return the address from # on."""
        return self.js("return location.hash")

    def reads(self, selector: str, words: str) -> None:
        """Wait until an element's text holds some words."""
        self.wait(lambda: words in self.text(selector), f"{words!r} in {selector}")

    def told(self, words: str) -> None:
        """Wait until the page's message or status says something."""
        self.wait(lambda: words in self.text("#message-text") + self.text("#status"), repr(words))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    program = shutil.which("chromedriver")
    missing = "Chromium" if binary is None else "chromedriver" if program is None else None
    if missing is not None:
        pytest.skip(f"{missing} is not on PATH (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        # no sandbox: containers, and root, cannot have one
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars",
                     f"user-data-dir={profile}", "window-size=1200,800"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(program))
        driver.set_script_timeout(SECONDS)
        yield driver
        driver.quit()


@pytest.fixture(scope="session")
def stand_in(browser: Any) -> Iterator[PageServer]:
    """The stand-in server; there is none without a browser."""
    with page_server() as server:
        yield server


@pytest.fixture
def page(browser: Any, stand_in: PageServer, tmp_path: Path) -> Iterator[Page]:
    """The page, freshly opened, before a server that answers at once; no error in its console at the end."""
    stand_in.behaviour = Behaviour()
    shown = Page(browser, stand_in)
    shown.size(*WINDOW)
    shown.media(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    shown.open()
    shown.js("sessionStorage.clear()")
    browser.get_log("browser")
    yield shown
    shown.offline(False)
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # a failed request is logged by the browser itself
    wrong = [message for message in severe if "Failed to load resource" not in message]
    assert not wrong, wrong
