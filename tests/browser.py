"""A headless Chromium that tests drive over a pipe, by the DevTools protocol."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 60


class Browser:
    """One browser; `open` shows a page in a window of a given size.

    https://chromedevtools.github.io/devtools-protocol/
    """

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(
            prefix="mlvicx-chromium-", ignore_cleanup_errors=True
        )
        theirs, self._out = os.pipe()
        self._in, back = os.pipe()
        options = [
            *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"),
            *("--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            # It reads what it is asked from descriptor 3 and answers on 4.
            preexec_fn=lambda: (os.dup2(theirs, 3), os.dup2(back, 4)),
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self._buffer, self._count = b"", 0
        self.events = defaultdict(list)

    def call(self, method, session=None, **params):
        """Ask for something and wait for the answer; what happens meanwhile goes to `events`."""
        self._count += 1
        asked = self._count
        message = {"id": asked, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE_S
        while (answer := self.receive(until)).get("id") != asked:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self, until):
        """The next message."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._in, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("Chromium says nothing.")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events[answer.get("sessionId")].append(answer)
        return answer

    def open(self, path, **window):
        """The page of a file, once it is loaded; `window` as in `Page.window`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.window(**window)
        page.call("Page.navigate", url=Path(path).absolute().as_uri())
        page.until("document.readyState == 'complete' && location.protocol == 'file:'")
        return page

    def close(self):
        """End it and everything that it started."""
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._out)
            os.close(self._in)
            self._profile.cleanup()


class Page:
    """A page in a window of its own."""

    def __init__(self, browser, target, session):
        self._browser, self._target, self._session = browser, target, session

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def window(self, *, width, height, dark=False):
        """Show it on a screen of so many px; one of less than 600 is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def until(self, expression):
        """Wait until it is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} does not come true; {self.complaints()}")
            time.sleep(0.05)

    def value(self, expression):
        """Of a JavaScript expression; of a promise, what it brings."""
        done = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def point(self, x, y):
        """Move the mouse to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def enter(self):
        """Press the Enter key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                text="\r",
                windowsVirtualKeyCode=13,
            )

    def complaints(self):
        """Errors and warnings of the console, and what was thrown."""
        found = []
        for event in self._browser.events[self._session]:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(told["exceptionDetails"])
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] != "verbose":
                found.append(told["entry"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found += [told] if told["type"] in ("error", "warning", "assert") else []
        return found

    def requests(self):
        """The addresses that were asked for, but for the data that the page itself holds."""
        asked = (
            event["params"]["request"]["url"]
            for event in self._browser.events[self._session]
            if event["method"] == "Network.requestWillBeSent"
        )
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def close(self):
        self._browser.call("Target.closeTarget", targetId=self._target)
