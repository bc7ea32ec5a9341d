"""A headless Chromium, driven over WebDriver's HTTP interface (https://www.w3.org/TR/webdriver2)."""

import base64
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # which needs rights that containers do not give
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
SECONDS = 30.0  # for anything to happen


class Chromium:
    """One window. Scripts run as function bodies in the page and give back JSON."""

    def __init__(self, address: str, binary: str) -> None:
        options = {"args": ARGUMENTS, "binary": binary}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        session = _request("POST", f"{address}/session", capabilities)
        self.session = f"{address}/session/{session['sessionId']}"

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a file afresh; what was logged before is forgotten."""
        self._post("url", {"url": "about:blank"})
        self.messages(), self.requests()
        self._post("url", {"url": page.as_uri() + fragment})

    def run(self, script: str, *arguments: object) -> Any:
        return self._post("execute/sync", {"script": script, "args": arguments})

    def until(self, condition: str) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._post("actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def devtools(self, command: str, **parameters: object) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, width: int, scheme: str = "light", media: str = "") -> None:
        """A window so wide, in a colour scheme, for the screen or in print."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def messages(self) -> list[str]:
        """What the console said since it was last asked."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since then."""
        events = (
            json.loads(entry["message"])["message"]
            for entry in self._post("se/log", {"type": "performance"})
        )
        sent = (event for event in events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        _request("DELETE", self.session)

    def _post(self, command: str, value: object) -> Any:
        return _request("POST", f"{self.session}/{command}", value)


@contextmanager
def chromium(binary: str, driver: str) -> Iterator[Chromium]:
    """A browser, for as long as it is needed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address)
            browser = Chromium(address, binary)
            yield browser
            browser.close()
        finally:
            process.terminate()


def _wait(address: str) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            if _request("GET", f"{address}/status")["ready"]:
                return
        except OSError:
            assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.05)


def _request(method: str, address: str, value: object = None) -> Any:
    body = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(
        address, body, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None
