"""An HTTP server on loopback that fails as it is told, and counts, so that a test first proves that its fault fired.

with FaultServer() as server:
    server.put("/a.tar", body, faults=[cut(100), status(503)])
    ...  # the first request of /a.tar is cut, the second gets 503, further ones are served
    assert server.fired["/a.tar"] == ["cut", "status 503"]
"""

import contextlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from mim.data.shards import LOCK


@dataclass(frozen=True)
class Fault:
    """What happens to one request; None in every field is a plain answer."""

    name: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""  # of an answer with this status
    cut_at: int | None = None  # body bytes after which the connection ends
    reset: bool = False  # ... by RST
    stall_at: int | None = None  # body bytes after which nothing comes any more
    rate: float | None = None  # body bytes/s
    head_rate: float | None = None  # header bytes/s
    length: bool = True  # send Content-Length
    ranges: bool = True  # honour Range
    etag: str | None = None
    content_range: str | None = None
    silent: bool = False  # accept and never answer


def status(code, *, body=b"", **headers):
    return Fault(f"status {code}", status=code, headers=headers, body=body)


def cut(at, *, reset=False, length=True):
    return Fault("reset" if reset else "cut", cut_at=at, reset=reset, length=length)


def stall(at):
    return Fault("stall", stall_at=at)


def trickle(rate):
    return Fault("trickle", rate=rate)


def redirect(location, code=302):
    return Fault("redirect", status=code, headers={"Location": location})


@dataclass
class Entry:
    body: bytes
    etag: str | None
    faults: list[Fault]
    then: Fault | None  # the fault of every further request


def serve_dataset(server, source, folder, *, faults=lambda body: ()):
    """Make `folder` a dataset like `source`, with its shards on the server and only lock and indices local."""
    folder.mkdir(parents=True)
    lock = json.loads((source / LOCK).read_text())
    for shard in lock["shards"]:
        body = (source / shard["file"]).read_bytes()
        shard["url"] = server.put(f"/{shard['file']}", body, faults=faults(body))
        index = Path(shard["file"]).with_suffix(".npy")
        (folder / index).write_bytes((source / index).read_bytes())
    (folder / LOCK).write_text(json.dumps(lock))
    return folder


class FaultServer:
    """Serves what was `put`, with ranges, If-Match and keep-alive. latency: s per request; bandwidth: bytes/s."""

    def __init__(self, *, latency=0.0, bandwidth=None, tls=None):
        self.latency = latency
        self.bandwidth = bandwidth
        self.entries: dict[str, Entry] = {}
        self.requests: dict[str, list[dict[str, str]]] = defaultdict(list)  # headers of each request, by path
        self.fired: dict[str, list[str]] = defaultdict(list)  # names of the faults that happened, by path
        self.sent: dict[str, int] = defaultdict(int)  # body bytes, by path
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        outer = self

        class Bound(Handler):
            server_of_faults = outer

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.scheme = "https" if tls else "http"
        if tls:  # an ssl.SSLContext of a server
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)

    def put(self, path, body, *, etag='"1"', faults=(), then=None):
        """Serve (or overwrite) an object. Returns its URL."""
        with self.lock:
            self.entries[path] = Entry(body, etag, list(faults), then)
        return self.url(path)

    def url(self, path, host="127.0.0.1"):
        return f"{self.scheme}://{host}:{self.port}{path}"

    def count(self, path):
        return len(self.requests[path])

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.connections):  # the kept ones; else a stopped server would answer on
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets
    server_of_faults: FaultServer

    def setup(self):
        super().setup()
        self.server_of_faults.connections.add(self.connection)

    def handle(self):
        with contextlib.suppress(ConnectionError):  # of a client that went away
            super().handle()

    def finish(self):
        self.server_of_faults.connections.discard(self.connection)
        super().finish()

    def do_GET(self):
        server, path = self.server_of_faults, self.path.partition("?")[0]
        with server.lock:
            server.requests[path].append({**dict(self.headers.items()), "target": self.path})
            entry = server.entries.get(path)
            fault = entry and (entry.faults.pop(0) if entry.faults else entry.then)
            if fault:
                server.fired[path].append(fault.name)
            fault = fault or Fault("none")
            body, etag = (entry.body, fault.etag or entry.etag) if entry else (b"", None)
        with contextlib.suppress(OSError):
            self.answer(server, path, entry, fault, body, etag)

    def answer(self, server, path, entry, fault, body, etag):
        if server.latency:
            time.sleep(server.latency)
        if fault.silent:
            server.stopping.wait(60)
            return self.end()
        if entry is None or fault.status is not None:
            self.head(fault.status or 404, {"Content-Length": str(len(fault.body))} | fault.headers, fault)
            return self.send(server, path, fault, fault.body)
        headers = {"ETag": etag} if etag else {}
        if self.headers.get("If-Match", etag) != etag:
            return self.head(412, {**headers, "Content-Length": "0"}, fault)
        code, match = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and fault.ranges:
            first, last = int(match[1]), min(int(match[2]), len(body) - 1)
            if first >= len(body):
                return self.head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"}, fault)
            headers["Content-Range"] = fault.content_range or f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        headers |= {"Content-Length": str(len(body))} if fault.length else {"Connection": "close"}
        self.head(code, headers, fault)
        self.send(server, path, fault, body)
        return None if fault.length and fault.cut_at is None else self.end()

    def head(self, code, headers, fault):
        text = f"HTTP/1.1 {code} X\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
        for byte in text.encode() if fault.head_rate else ():
            time.sleep(1 / fault.head_rate)
            self.wfile.write(bytes([byte]))
        if not fault.head_rate:
            self.wfile.write(text.encode())

    def send(self, server, path, fault, body):
        rate = fault.rate or server.bandwidth
        limit = min(at for at in (fault.cut_at, fault.stall_at, len(body)) if at is not None)
        step = max(1, int(rate / 50)) if rate else 1 << 16
        for start in range(0, limit, step):
            piece = body[start : min(start + step, limit)]
            self.wfile.write(piece)
            server.sent[path] += len(piece)
            if rate:
                time.sleep(len(piece) / rate)
        if fault.stall_at is not None:
            server.stopping.wait(60)
        if fault.reset:  # closing with linger 0 sends RST; a moment first, or the bytes before it are lost too
            time.sleep(0.005)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def end(self):
        self.close_connection = True
        if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            self.connection.close()  # no orderly shutdown before it
            self.wfile = self.rfile  # nothing is left to flush

    def log_message(self, *_):
        pass
