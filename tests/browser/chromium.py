"""Headless Chromium, and a server for the folder it looks at that notes what was asked of it."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PATIENCE = 3000  # milliseconds of the page's own time


def look(profile: Path, *arguments: str, patience: int = PATIENCE) -> str:
    """What Chromium prints."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--virtual-time-budget={patience}", f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


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
