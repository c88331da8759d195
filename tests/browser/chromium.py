"""Headless Chromium, and a server for the folder it looks at that notes what was asked of it."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PATIENCE = 120  # seconds


def look(profile: Path, *arguments: str) -> str:
    """What Chromium prints once the page has had three seconds of its own time."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, "--virtual-time-budget=3000", f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def told(profile: Path, asked: list[str], *arguments: str) -> str:
    """What the page tells by asking the server for /told?TEXT, for pages whose workers do not end."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + PATIENCE
        try:
            while time.monotonic() < end:
                found = [path for path in list(asked) if path.startswith("/told?")]
                if found:
                    return unquote(found[0].removeprefix("/told?"))
                time.sleep(0.1)
        finally:
            process.terminate()
    raise TimeoutError(f"the page told nothing in {PATIENCE} s; it asked for {asked[-5:]}")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the folder's server, and the paths that were asked for."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
