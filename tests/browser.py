"""A playground process, and its page in Debian's Chromium as a user sees it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import ROOT, until
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select


class Page:
    """What a person can do and see."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.url}/{query}")

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def upload(self, path: Path) -> None:
        self.one("#file").send_keys(str(path))

    def choose(self, profile: str) -> None:
        Select(self.one("#profile")).select_by_visible_text(profile)

    def press(self, selector: str, key: str, times: int = 1) -> None:
        """key: its name in Keys, such as HOME."""
        self.one(selector).send_keys(*[getattr(Keys, key)] * times)

    def shows(self, words: str, selector: str = "#summary") -> None:
        """Wait for an answer with these words."""
        until(lambda: words in self.text(selector) and self.text("[aria-busy]") == "", 20)

    def states(self) -> dict[tuple[str, int], str]:
        """The states of the units in the map, by block and position in its row."""
        rows = self.driver.execute_script(
            "return [...document.querySelectorAll('.map tbody tr')].map(row => "
            "[row.querySelector('th').innerText, [...row.querySelectorAll('td')].map(cell => cell.dataset.state)])"
        )
        return {(block, place): state for block, cells in rows for place, state in enumerate(cells)}

    def requested(self) -> set[str]:
        """Every URL that the browser has asked for, for a page of ours, since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {request["request"]["url"] for request in sent if request["documentURL"].startswith("http")}


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser without a window, which records its requests."""
    browser, program = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "Debian's package chromium is missing: make system-test"
    assert program, "Debian's package chromium-driver is missing: make system-test"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1300,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def playground(driver: webdriver.Chrome, server: str, *flags: str) -> Iterator[Page]:
    """A playground process for that server; it must exit with 0 when it is stopped."""
    command = [sys.executable, "-m", "service.playground", "--server", server, "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = re.match(r"ready: (\S+) ", process.stdout.readline())
        assert ready, "the playground did not start"
        yield Page(driver, ready[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
