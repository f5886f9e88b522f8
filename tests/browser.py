"""A headless Chromium, spoken to through its debugging pipe: no driver and no package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page; every message that the browser sends is kept in `events`."""

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = os.fdopen(reading, "rb", buffering=0), os.fdopen(writing, "wb", buffering=0)
        self.number, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.page(f"{domain}.enable")

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters or {}}
        self.writing.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            piece = self.reading.read(1 << 16)
            assert piece, "the browser went away"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def page(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.call(method, parameters, self.session)

    def show(self, file: Path, *, width: int, scheme: str) -> None:
        """Load a page at a width under a colour scheme, and wait until it is drawn."""
        self.page(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.page("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the page itself."""
        found = []
        for event in self.events:
            method, data = event.get("method"), event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(json.dumps(data)[:300])
            if method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
                found.append(data["entry"]["text"])
            url = data.get("request", {}).get("url", "file:") if method == "Network.requestWillBeSent" else "file:"
            if not url.startswith(("file:", "data:")):
                found.append(f"asked for {url}")
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with its data in `folder`; it ends with the context."""
    assert CHROMIUM is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def pipes() -> None:
        # Chromium reads commands from descriptor 3 and answers on 4; copied up first, so that neither is overwritten.
        first, second = os.dup(theirs_in), os.dup(theirs_out)
        high, higher = os.dup2(first, 63), os.dup2(second, 64)
        os.dup2(high, 3)
        os.dup2(higher, 4)

    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}", "--hide-scrollbars"], preexec_fn=pipes, close_fds=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    shown = None
    try:
        shown = Browser(ours_in, ours_out)
        yield shown
    finally:
        process.terminate()
        process.wait(20)
        if shown is not None:
            shown.reading.close()
            shown.writing.close()
