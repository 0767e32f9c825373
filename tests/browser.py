"""Chromium, without a window, driven through its DevTools protocol: for pages that a person opens.

With `--remote-debugging-pipe` it reads commands from file descriptor 3 and writes what happens to 4: JSON, a zero byte
behind each. So no port, and no driver beside the browser.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
_QUIET = (
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-gpu", "--no-sandbox", "--headless",
)  # fmt: skip


class Browser:
    """One page of one browser; a context manager.

    `requests` are the addresses that the page has asked for, `problems` what it wrote to its console: errors of its
    script, and what its policy has stopped.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._number = 0

    def __enter__(self) -> "Browser":
        self._profile = tempfile.mkdtemp(prefix="browser-")
        commands, self._out = os.pipe()
        self._in, events = os.pipe()
        moved = f'exec "$0" "$@" 3<&{commands} 4>&{events}'
        arguments = (CHROMIUM, *_QUIET, f"--user-data-dir={self._profile}", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            ["bash", "-c", moved, *arguments], pass_fds=(commands, events), stderr=subprocess.DEVNULL
        )
        os.close(commands), os.close(events)
        self._rest, self._session = b"", None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out), os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=20)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, fragment: str = "", *, width: int = 1100) -> None:
        """Shows the page, at this width."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=page.absolute().as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's included, as JSON has it."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.02)

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._in, 1 << 16)
                assert read, "the browser has ended"
                self._rest += read
            line, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(line)
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, event: str | None, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(facts["exceptionDetails"]))
        elif event == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.problems.append(facts["entry"]["text"])
