"""A real Chromium without a window, driven by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import eventually

_ANSWER_SECONDS = 20


class Browser:
    """One tab. A context manager; `problems`: errors that pages logged, and exceptions that they did not catch."""

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        told = Path(self._folder.name) / "DevToolsActivePort"
        port = eventually(lambda: told.exists() and told.read_text().partition("\n")[0], 60, "Chromium listens")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            url = next(target["webSocketDebuggerUrl"] for target in json.load(answer) if target["type"] == "page")
        self.problems: list[str] = []
        self._count, self._loop = 0, asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(url))
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()
        os.killpg(self._process.pid, signal.SIGKILL)  # its children, too, write into the folder
        self._process.wait(timeout=20)
        self._folder.cleanup()

    def open(self, url: str, width: int, height: int = 900) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self._call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of JavaScript, as JSON can say it."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        return eventually(lambda: self.value(expression), seconds, expression)

    def screenshot(self, path: Path) -> None:
        """The whole page, also what is below the window."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(method, parameters), _ANSWER_SECONDS))

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    async def _close(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
