"""`mim report --serve`: the page of a run that goes on, to a browser on this machine and to nobody else.

It listens on 127.0.0.1 alone and answers GET and HEAD of `/` alone; it serves no file, so there is no path to misuse. A
page of another site cannot read it through a name that it points at 127.0.0.1 (DNS rebinding): the Host of a request
must be the address itself.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mim.report.page import page
from mim.report.runs import FILES

ADDRESS = "127.0.0.1"
SECONDS = 10  # that a browser may take for its request
STALE = 600  # seconds after which a page is made anew though no file changed: it tells how long a run is silent


class Viewer(ThreadingHTTPServer):
    """A server of one page, which is made anew when the files of its runs have changed."""

    daemon_threads = True

    def __init__(self, runs: list[Path], port: int) -> None:
        super().__init__((ADDRESS, port), Handler)
        self.runs = runs
        self._lock = threading.Lock()
        self._made: tuple[tuple[object, ...], bytes, str] | None = None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def current(self) -> tuple[bytes, str]:
        """The page, and its version. Raises ConfigError when a run directory is gone."""
        with self._lock:
            files = (*FILES, "journal.jsonl", "pictures")
            seen = (time.time() // STALE, *(_seen(run / name) for run in self.runs for name in files))
            if self._made is None or self._made[0] != seen:
                text = page(self.runs, live=True).encode()
                self._made = seen, text, f'"{hashlib.sha256(text).hexdigest()[:32]}"'
            return self._made[1:]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of `/`."""

    server: Viewer
    timeout = SECONDS
    server_version = "mimstream"
    sys_version = ""

    def do_GET(self) -> None:
        """Send the page, or nothing where the browser has this version."""
        own = {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}
        if self.headers.get("Host") not in own:
            self._plain(HTTPStatus.FORBIDDEN, "This page answers to its own address alone.\n")
            return
        if self.path != "/":
            self._plain(HTTPStatus.NOT_FOUND, "There is one page: /\n")
            return
        try:
            text, version = self.server.current()
        except (OSError, ValueError) as error:
            self._plain(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
            return
        if self.headers.get("If-None-Match") == version:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.send_header("ETag", version)
            self.end_headers()
            return
        self._send(HTTPStatus.OK, text, "text/html; charset=utf-8", ETag=version)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""

    def _plain(self, status: HTTPStatus, text: str) -> None:
        self._send(status, text.encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, content: bytes, kind: str, **more: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _seen(file: Path) -> tuple[int, int] | None:
    """What changes when a file does."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
