"""A real browser over the real server: what the tests of the page share."""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import peer

SECONDS = 120  # that a test waits for something on the page


def find_browser() -> tuple[str, str]:
    """(chromium, its driver). Where they are absent the test is skipped."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium and driver:
        return chromium, driver
    pytest.skip("needs a browser: apt-get install chromium chromium-driver")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The address of `chat.py --web`, started in a folder with its checkpoints."""
    command = [sys.executable, str(ROOT / "chat.py"), "--web", "--port", "0", *options]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert server.stdout
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split()[0]
    finally:
        server.terminate()
        assert server.wait(SECONDS) == 0


class Recorder:
    """A proxy that forwards nothing: what the browser would send to other machines.

    asked: the first line of each request, which names the machine.
    """

    def __init__(self):
        self.asked = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # closed: the test is over
            with connection:
                self.asked.append(connection.recv(4096).partition(b"\r\n")[0].decode())


class Browser:
    """Chromium without a window. No request of it leaves this machine."""

    def __init__(self, language: str = "zh-CN"):
        webdriver = peer("selenium.webdriver")
        chromium, driver = find_browser()
        self.recorder = Recorder()
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "--headless=new",
            "--no-sandbox",  # a container's root has no sandbox
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--window-size=1280,900",
            f"--lang={language}",
            f"--proxy-server={self.recorder.address}",
            "--proxy-bypass-list=evil.test",
            "--host-resolver-rules=MAP evil.test 127.0.0.1",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def close(self):
        self.driver.quit()
        self.recorder.listener.close()

    def script(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition, what: str = ""):
        """The first value of condition() that is true."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(
            self.driver, SECONDS, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return waiting.until(lambda driver: condition(), what)

    def find(self, selector: str):
        """The first element that is shown."""

        def shown():
            found = self.driver.find_elements("css selector", selector)
            return next((element for element in found if element.is_displayed()), None)

        return self.wait(shown, f"{selector} is not on the page")

    def is_shown(self, selector: str) -> bool:
        return any(e.is_displayed() for e in self.driver.find_elements("css selector", selector))

    def click(self, selector: str):
        """As soon as nothing lies over it."""
        from selenium.common.exceptions import ElementClickInterceptedException as Covered

        def clicked():
            with contextlib.suppress(Covered):
                self.find(selector).click()
                return True

        self.wait(clicked, f"{selector} cannot be clicked")

    def type(self, selector: str, text: str):
        box = self.find(selector)
        box.clear()
        box.send_keys(text)

    def open(self, address: str):
        """Afresh: the page before is left, and what its cut streams complained of is read."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)
        self.find("#message textarea")

    def choose(self, box: str, name: str):
        """An entry of a drop-down list."""
        self.type(f"#{box} input", name)
        self.wait(lambda: self.texts(f"#{box} [role=option], [role=option]"), "no list")
        self.find(f'[role=option][aria-label="{name}"]').click()

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.driver.find_elements("css selector", selector)]

    def value(self, box: str) -> str:
        return self.find(f"#{box} textarea").get_property("value")
