"""A headless Chromium, driven over the WebDriver protocol by the standard library alone."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

WHY_NONE = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage"
)


def is_there() -> bool:
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """One window; every host name leads nowhere, so a page that loads anything fails."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory(prefix="paci-browser-")
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._url = f"http://127.0.0.1:{port}"
        flags = [
            *_FLAGS.split(),
            f"--user-data-dir={self._folder.name}",
            "--window-size=1400,900",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        try:
            self._wait_for_driver()
            capabilities = {
                "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
            self._url += f"/session/{made['sessionId']}"
        except BaseException:
            self.close()
            raise

    def open(self, path: Path) -> None:
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        body = {"script": script, "args": list(arguments)}
        return self._call("POST", "/execute/sync", body)

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the pointer to a place in the window, and press there."""
        steps: list[dict[str, Any]] = [_move(max(x - 3, 0), y), _move(x, y)]
        if click:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._act("pointer", steps)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        self._act("pointer", [_move(*start), down, _move(*middle), _move(*end), up])

    def wheel(self, x: float, y: float, delta_y: int) -> None:
        step = {"type": "scroll", "x": int(x), "y": int(y), "deltaX": 0, "deltaY": delta_y}
        self._act("wheel", [step | {"origin": "viewport", "duration": 0}])

    def logs(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call; the browser's own, and data, left out."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [
            url for url in urls if not url.startswith(("chrome:", "chrome-untrusted:", "data:"))
        ]

    def close(self) -> None:
        try:
            if "/session/" in self._url:
                self._call("DELETE", "", None)
        finally:
            self._process.terminate()
            self._process.wait(timeout=20)
            shutil.rmtree(self._folder.name, ignore_errors=True)

    def _act(self, kind: str, steps: list[dict[str, Any]]) -> None:
        device: dict[str, Any] = {"type": kind, "id": kind, "actions": steps}
        if kind == "pointer":
            device["parameters"] = {"pointerType": "mouse"}
        self._call("POST", "/actions", {"actions": [device]})

    def _wait_for_driver(self) -> None:
        for _ in range(300):
            try:
                if self._call("GET", "/status", None)["ready"]:
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver did not start")

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


def _move(x: float, y: float) -> dict[str, Any]:
    return {"type": "pointerMove", "duration": 0, "x": int(x), "y": int(y), "origin": "viewport"}
