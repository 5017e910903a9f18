"""A real browser without its window, by the Chrome DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120.0  # seconds until something has to be there


def program() -> str | None:
    """Chromium, where there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """A page of a browser. requested: the addresses that it asked for."""

    def __init__(self, process: subprocess.Popen, to: int, of: int):
        self.process, self.to, self.of, self.rest, self.last = process, to, of, b"", 0
        self.session: str | None = None
        self.requested: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Network.enable")

    def send(self, method: str, **params: Any) -> dict:
        """A command of the protocol, and what it gives."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.of, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """scheme: "light" or "dark", as the reader's system is."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            self.run("new Promise(done => setTimeout(done, 100))")
        return value

    def click(self, text: str) -> None:
        """Click the button of that text, as soon as it is there."""
        button = f"[...document.querySelectorAll('button')].find(each => each.textContent.trim() == {json.dumps(text)})"
        self.until(f"(button => button && (button.click(), true))({button})")

    def picture(self, file: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))


def high(pipe: tuple[int, int]) -> tuple[int, ...]:
    """The ends of a pipe under numbers from 10 on, which the browser's own two are not."""
    ends = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe)
    for end in pipe:
        os.close(end)
    return ends


@contextmanager
def browsing(folder: Path):
    """Gives a Page; folder: where the browser may keep what it needs."""
    (theirs, to), (of, answers) = high(os.pipe()), high(os.pipe())
    words = [
        program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-proxy-server",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
        "--remote-debugging-pipe",
    ]  # fmt: skip
    # The browser takes commands at descriptor 3 and answers at 4.
    place = "import os, sys; _, a, b, *to = sys.argv; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execvp(to[0], to)"
    line = [sys.executable, "-S", "-c", place, str(theirs), str(answers), *words]
    process = subprocess.Popen(line, pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs), os.close(answers)
    try:
        yield Page(process, to, of)
    finally:
        process.kill()
        process.wait()
        os.close(to), os.close(of)
