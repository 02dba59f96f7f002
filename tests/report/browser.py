"""Chromium without a window, driven over the WebDriver protocol through Debian's chromedriver."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assets import absent

_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # CI runs as root, where Chromium's sandbox does not start
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Browser:
    """One tab."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: Path) -> None:
        _call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        """What a script, the body of a function, returns."""
        body = {"script": script, "args": list(arguments)}
        return _call("POST", f"{self._session}/execute/sync", body)

    def emulate(self, *, scheme: str = "light", width: int = 1100, height: int = 1400) -> None:
        """Colour scheme, "light" or "dark", and size of the window."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", features=features)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", **metrics)

    def print(self) -> bytes:
        """The page as PDF, with backgrounds, on A4."""
        paper = {"background": True, "page": {"width": 21.0, "height": 29.7}}
        return base64.b64decode(_call("POST", f"{self._session}/print", paper))

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self._command("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def log(self) -> list[dict[str, Any]]:
        """What the console has shown: errors, and whatever the page's policy refused."""
        found: list[dict[str, Any]] = _call("POST", f"{self._session}/se/log", {"type": "browser"})
        return found

    def _command(self, name: str, **parameters: object) -> Any:
        body = {"cmd": name, "params": parameters}
        return _call("POST", f"{self._session}/goog/cdp/execute", body)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in `folder`; without Chromium the test skips, or fails in CI."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        absent("Debian's chromium and chromium-driver are not installed")
    log = folder / "chromedriver.log"
    with log.open("wb") as file:
        process = subprocess.Popen([driver, "--port=0"], stdout=file, stderr=subprocess.STDOUT)
    try:
        server = f"http://127.0.0.1:{_port(process, log)}"
        options = {
            "binary": chromium,
            "args": [*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        found = _call("POST", f"{server}/session", capabilities)
        session = f"{server}/session/{found['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call("DELETE", session)
    finally:
        process.terminate()
        process.wait(30)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that the driver says it took."""
    for _ in range(600):
        _, found, rest = log.read_text().partition("started successfully on port ")
        if found and "." in rest:
            return int(rest.partition(".")[0])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"chromedriver does not answer: {log.read_text()}")


def _call(method: str, url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()}") from error
