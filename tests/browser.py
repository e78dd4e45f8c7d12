"""A real headless Chromium for the tests of pages, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 60.0
_DEBUGGING_PORT = "DevToolsActivePort"


class Tab:
    """One page. What it logs and loads is kept in ``messages`` and ``requests``."""

    def __init__(self, connection: ClientConnection, downloads: Path) -> None:
        self._connection, self._numbers, self._session = connection, itertools.count(1), ""
        self.downloads = downloads
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._send(f"{domain}.enable")
        session, self._session = self._session, ""
        self._send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        self._session = session

    def look(self, *, width_px: int = 1280, dark: bool = False, script: bool = True) -> None:
        """Sets the width of the window, its colours, and whether pages may run scripts."""
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 600}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._send("Emulation.setScriptExecutionDisabled", value=not script)

    def open(self, path: Path) -> None:
        self._loaded = False
        self._send("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._hear(json.loads(self._connection.recv(timeout=DEADLINE_S)))

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, worked out outside the page's content security policy."""
        told = self._send("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def downloaded(self, name: str) -> Path:
        """The file of this name, once it is there."""
        path, end = self.downloads / name, time.monotonic() + DEADLINE_S
        while not path.exists():
            assert time.monotonic() < end, f"{name} was not downloaded; there is {[*self.downloads.iterdir()]}"
            self.ask("0")  # hears what the browser has to say meanwhile
            time.sleep(0.02)
        return path

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        told = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        while True:
            told = json.loads(self._connection.recv(timeout=DEADLINE_S))
            if told.get("id") == number:
                assert "error" not in told, told
                return dict(told["result"])
            self._hear(told)

    def _hear(self, told: dict[str, Any]) -> None:
        about = told.get("params", {})
        match told.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Log.entryAdded":
                self.messages.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.messages.append(json.dumps(about)[:1000])


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, whose files lie in ``folder``. Skips the test where there is no Chromium."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            port, place = _wait_for(folder / "profile" / _DEBUGGING_PORT, process).split()
            with connect(f"ws://127.0.0.1:{port}{place}", max_size=None, proxy=None) as connection:
                yield Tab(connection, downloads)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_text().count("\n"):
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"the browser did not start: {(path.parent.parent / 'log').read_text()[-2000:]}")
