"""A page in headless Chromium, as Debian has it: chromium and chromium-driver."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BINARY, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


class Page:
    """A browser that has no network.

    Args:
        driver: of the browser.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path) -> float:
        """Open a file, go to its first picture, and return the seconds until that is drawn."""
        began = time.perf_counter()
        self.driver.get(file.resolve().as_uri())
        self.run("document.querySelector('figure.plot').scrollIntoView()")
        self.wait("document.querySelector('figure.plot canvas')")
        return time.perf_counter() - began

    def run(self, script: str) -> Any:
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script)

    def wait(self, condition: str, limit_s: float = 240) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + limit_s
        while not self.run(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} did not become true in {limit_s} s")
            time.sleep(0.05)

    def emulate(self, *, scheme: str = "light", width: int = 1100, height: int = 900) -> None:
        """Choose the color scheme and the size of the window in pixels."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._command("Emulation.setDeviceMetricsOverride", size)

    def show_all(self) -> None:
        """Make the window as high as the page, so that every picture is drawn."""
        width = self.run("return innerWidth")
        height = self.run("return document.documentElement.scrollHeight")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._command("Emulation.setDeviceMetricsOverride", size)
        figures = "[...document.querySelectorAll('figure.plot')]"
        self.wait(f"{figures}.every(figure => figure.querySelector('canvas'))")

    def move_mouse(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window, in pixels."""
        place = {"type": "mouseMoved", "x": x, "y": y, "pointerType": "mouse"}
        self._command("Input.dispatchMouseEvent", place)

    def print_to_pdf(self, file: Path) -> None:
        """Print the page on A4."""
        paper = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
        file.write_bytes(base64.b64decode(self._command("Page.printToPDF", paper)["data"]))

    def messages(self) -> list[str]:
        """Return what the console and the browser's log said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for, itself left out."""
        entries: list[str] = self.run(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        return entries

    def _command(self, name: str, values: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(name, values)


@contextmanager
def open_browser() -> Iterator[Page]:
    """Start a browser without a network."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BINARY)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no name leads anywhere
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        page = Page(driver)
        page.emulate()
        yield page
    finally:
        driver.quit()
