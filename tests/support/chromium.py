"""A headless Chromium driven over its debugging pipe: no driver program, no port, nothing to install but itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.05
# Chromium reads its commands from 3 and writes answers to 4; bash, in between, puts our pipes there.
_LAUNCH = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


def find() -> str:
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


class Browser:
    """One page. Errors and warnings that it logs are kept in ``complaints``."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        command = [
            *(find(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-extensions"),
            *("--disable-background-networking", "--disable-component-update", "about:blank"),
        ]
        self._log = (folder.parent / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            ["bash", "-c", _LAUNCH, "bash", str(ours[0]), str(theirs[1]), *command],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=(ours[0], theirs[1]),
            start_new_session=True,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        self._buffer = b""
        self._number = 0
        self.complaints: list[str] = []
        self._session: str | None = None
        targets = self._call("Target.getTargets", START_TIMEOUT_S)["targetInfos"]
        target = next(x["targetId"] for x in targets if x["type"] == "page")
        attached = self._call("Target.attachToTarget", START_TIMEOUT_S, targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, timeout_s: float = CALL_TIMEOUT_S, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        ends_s = time.monotonic() + timeout_s
        while True:
            answer = self._next(ends_s)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _next(self, ends_s: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._read], [], [], max(0.0, ends_s - time.monotonic()))
            assert readable, "the browser did not answer in time"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case _:
                pass

    def open(self, url: str) -> None:
        """Returns when the document is whole; what it fetches later may still be missing. Complaints start anew."""
        # The page before may still ask a server that is gone.
        self._call("Page.navigate", url="about:blank")
        self.wait_until("location.href === 'about:blank'")
        self.complaints.clear()
        self._call("Page.navigate", url=url)
        self.wait_until("document.readyState === 'complete'")

    def size(self, width: int, height: int, *, is_dark: bool = False) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_until(self, script: str, timeout_s: float = 15.0) -> None:
        """Until an expression is true."""
        ends_s = time.monotonic() + timeout_s
        while not self.evaluate(script):
            text = "document.body.innerText"
            assert time.monotonic() < ends_s, f"{script} did not come true: {self.evaluate(text)}; {self.complaints}"
            time.sleep(LOOK_EVERY_S)

    def screenshot(self, path: Path) -> bytes:
        png = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(png)
        return png

    def close(self) -> None:
        try:
            self._session = None
            self._call("Browser.close")
        finally:
            os.close(self._write)
            os.close(self._read)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
            self._log.close()
