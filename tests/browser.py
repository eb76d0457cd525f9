"""Headless Chromium over its debugging pipe, for tests that look at pages.

Install it with `apt-get install chromium`, or name a binary in CHROMIUM.
"""

import base64
import collections
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
    *("--force-color-profile=srgb", "--remote-debugging-pipe", "about:blank"),
)
PATIENCE = 60.0  # seconds for an answer


def executable() -> str | None:
    named = os.environ.get("CHROMIUM", "")
    return (
        shutil.which(named)
        if named
        else next(filter(None, map(shutil.which, NAMES)), None)
    )


class Browser:
    """One page of a running Chromium; `errors` lists what its console reported."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._number, self._buffer, self._session = 0, b"", None
        self._events: collections.deque[dict] = collections.deque()
        self.errors: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def show(self, page: Path | str, *, width: int, height: int, scheme: str) -> None:
        """Load a file or an address in a window of these pixels, with "light" or "dark"
        colours."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        feature = dict(name="prefers-color-scheme", value=scheme)
        self.ask("Emulation.setEmulatedMedia", features=[feature])
        self.errors, self._events = [], collections.deque()
        url = page if isinstance(page, str) else page.as_uri()
        self.ask("Page.navigate", url=url)
        self._wait("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        # The debugger's scripts run in spite of the page's policy, which forbids all.
        options = dict(awaitPromise=True, returnByValue=True)
        answer = self.ask("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key by its name, such as "1" or "ArrowLeft"."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            extra = text if kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, **extra)

    def wait_until(self, condition: str) -> None:
        """Wait until a script's expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"not true: {condition}"
            time.sleep(0.02)

    def screenshot(self, path: Path, *, tallest: int = 6000) -> None:
        """The whole page as PNG, down to `tallest` pixels."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = dict(x=0, y=0, width=size["width"], scale=1)
        clip["height"] = min(size["height"], tallest)
        answer = self.ask(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=clip
        )
        path.write_bytes(base64.b64decode(answer["data"]))

    def ask(self, method: str, **params: Any) -> dict:
        """Send a command of the DevTools protocol; its result."""
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _wait(self, event: str) -> None:
        while not any(x["method"] == event for x in self._events):
            self._note(self._next())

    def _note(self, event: dict) -> None:
        if "method" not in event:
            return
        self._events.append(event)
        method, params = event["method"], event["params"]
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if method == "Network.loadingFailed":
            self.errors.append(f"not loaded: {params['errorText']}")

    def _next(self) -> dict:
        """The next message; each ends with a null byte."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"Chromium did not answer within {PATIENCE:g} s")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise ConnectionError("Chromium has ended")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


@contextlib.contextmanager
def running(binary: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile; end it with the context."""
    commands_out, commands = os.pipe()
    answers, answers_in = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4. The shell moves ours
    # there: a function between fork and exec is unsafe beside the threads of JAX.
    script = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'
    command = [
        "bash",
        "-c",
        script,
        "bash",
        binary,
        *FLAGS,
        f"--user-data-dir={profile}",
    ]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, pass_fds=(commands_out, answers_in), **quiet)
    try:
        for descriptor in (commands_out, answers_in):
            os.close(descriptor)
        yield Browser(commands, answers)
    finally:
        process.terminate()
        process.wait()
        for descriptor in (commands, answers):
            os.close(descriptor)
