"""A headless Chromium that shows one page, and finds what the tests ask for."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

Found = TypeVar("Found")
PATIENCE = 60.0  # seconds, for machines under load
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1240,1500",
)


class Browser:
    """One Chromium with an empty profile."""

    def __init__(self) -> None:
        os.environ["SE_AVOID_STATS"] = "true"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        for option in (*OPTIONS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        # Named, or selenium would look for drivers on the network.
        service = Service(os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def close(self) -> None:
        """Ends the browser."""
        self.driver.quit()
        self._profile.cleanup()

    def open(self, address: str) -> None:
        """Loads a page anew and waits for it."""
        self.driver.get(address)
        self.wait(lambda: self.question.is_displayed(), "the page")

    def one(self, css: str) -> WebElement:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def shows(self, css: str) -> bool:
        """Whether there is such an element, and it is displayed."""
        return any(e.is_displayed() for e in self.driver.find_elements(By.CSS_SELECTOR, css))

    @property
    def question(self) -> WebElement:
        """Where questions are typed."""
        return self.one("#question textarea, #question input")

    @property
    def status(self) -> str:
        """What the page says about the answer."""
        return self.one("#status").text

    @property
    def chat(self) -> list[str]:
        """The conversation, turn by turn."""
        return [e.text for e in self.driver.find_elements(By.CSS_SELECTOR, "#chat .turn")]

    def answer(self, mode: str) -> str:
        """An answer in the side-by-side view."""
        return self.one(f"#answer-{mode} .answer").text

    def ask(self, text: str) -> None:
        """Types a question and sends it."""
        self.question.clear()
        self.question.send_keys(text + Keys.ENTER)

    def mode(self, name: str) -> None:
        """Chooses who answers."""
        self.one(f"#mode input[value='{name}']").click()

    def wait(self, what: Callable[[], Found], name: str) -> Found:
        """The first value that counts as true."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if found := what():
                    return found
            except WebDriverException:
                pass  # not there yet, or just being replaced
            assert time.monotonic() < end, f"waited for {name}; status: {self.status!r}"
            time.sleep(0.05)

    def requested(self) -> set[str]:
        """Addresses that pages of this browser's tab asked the network for since the last call."""
        addresses = set()
        for entry in self.driver.get_log("performance"):
            message: dict[str, Any] = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.add(message["params"]["request"]["url"])
        return {a for a in addresses if not a.startswith(("chrome://", "data:", "blob:"))}

    def picture(self, name: str) -> None:
        """Keeps a picture of the whole page where C2C_WEB_PICTURES says."""
        place = os.environ.get("C2C_WEB_PICTURES")
        if not place:
            return
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        self.driver.set_window_size(1240, max(1500, height + 150))
        time.sleep(0.5)
        self.driver.save_screenshot(str(Path(place) / f"{name}.png"))
        self.driver.set_window_size(1240, 1500)
