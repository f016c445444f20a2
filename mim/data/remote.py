"""Ranges of remote objects over http(s): deadlines, retries, and proof that it is still the same object.

A body is never shorter than what was asked for: its length is checked against the range, and what a cut connection
left out is asked for again from there on. An object is held to the size and ETag that were seen first (If-Match). A
connection that is silent or slower than a minimum is given up. Everything is retried, with jittered back-off that
honours Retry-After up to a cap, until one deadline; then it is a StorageError. Redirects are followed inside one host
(and one scheme) only; link-local addresses, where clouds serve credentials, are never asked.

The transport is `http.client`'s response parser on our own socket; each service's library is asked for credentials
alone (`mim.data.endpoint`). `benchmarks/remote.py` compares it with the two libraries that could stand here, by what
faults become: obstore never returns in a process that was forked after its first read, as loader workers are, and
gives up a body that is cut without Content-Length; fsspec returns such a body short without a word, does not notice
an object that was overwritten, and a trickle holds it. Proxy variables of the environment are ignored.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from mim.contracts import DataError, StorageError
from mim.data.endpoint import Endpoints
from mim.data.location import redact
from mim.data.refusals import Transient, check_redirect, check_status, same_host
from mim.data.wire import PIECE, ForbiddenAddress, Patience, Wire, open_socket, reason

MAX_REDIRECTS = 3
MAX_CONNECTIONS = 8  # kept open, one per host
REDIRECTS = (301, 302, 303, 307, 308)
SAFE = "/%~!$&'()*+,;=:@"  # in a path that is already encoded (RFC 3986 3.3)


class Identity(NamedTuple):
    """What tells whether an object is the same as before."""

    size: int  # bytes
    etag: str | None  # of the server, or its Last-Modified


class _Answer(NamedTuple):
    response: http.client.HTTPResponse
    place: tuple[str, str, int]  # scheme, host, port
    connection: socket.socket


class Remote:
    """Range reads of http(s), s3, gs and hf objects. Arrives empty in another process; not shared between threads."""

    def __init__(self, patience: Patience | None = None):
        self.patience = patience or Patience()
        self._forget()

    def identify(self, url: str) -> Identity:
        """Size and ETag of an object, as seen first by this process. One request of one byte."""
        if url not in self._seen:
            self._retry(url, 0, lambda deadline: self._probe(url, deadline))
        return self._seen[url]

    def pread(self, url: str, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`.

        Raises DataError when the object ends before, or is not the one that was seen first; StorageError when it
        cannot be read until the deadline.
        """
        data = bytearray()
        self.copy(url, offset, offset + size, data.extend)
        return bytes(data)

    def copy(self, url: str, start: int, end: int, sink: Callable[[bytes], Any]) -> None:
        """Hand the bytes [start, end) of an object to `sink`, in order, each once. Raises as `pread`."""
        at = start

        def attempt(deadline: float) -> None:
            nonlocal at
            for piece in self._pieces(url, at, end, deadline):
                sink(piece)
                at += len(piece)

        if start < end:
            self._retry(url, end - start, attempt, progress=lambda: at)

    def close(self) -> None:
        """Close the connections; the next read opens new ones."""
        while self._idle:
            self._idle.popitem()[1].close()

    def _retry(
        self, url: str, size: int, attempt: Callable[[float], None], progress: Callable[[], int] = lambda: 0
    ) -> None:
        """Call `attempt(deadline)` until it succeeds, or until no further attempt fits before the deadline."""
        if self._process != os.getpid():
            self._forget()  # after a fork: the connections are the parent's
        patience, began = self.patience, time.monotonic()
        deadline = began + patience.until(size)
        tries, failures, before, cause = 0, 0, progress(), ""
        while True:
            tries += 1
            try:
                return attempt(deadline)
            except Transient as fault:
                failures, before = (0, progress()) if progress() > before else (failures + 1, before)
                wait = min(patience.first_wait * 2 ** min(failures, 20), patience.longest_wait)
                wait *= self._jitter.uniform(0.5, 1)
                wait = max(wait, min(fault.wait, patience.longest_wait))
                now = time.monotonic()
                cause = cause if cause and now >= deadline else str(fault)  # being cut by the deadline says nothing
                if now + wait > (min(deadline, began + patience.unreachable) if fault.unreachable else deadline):
                    raise StorageError(
                        f"cannot read {redact(url)}: {cause} ({tries} attempts in {now - began:.2g} s)"
                    ) from None
                time.sleep(wait)

    def _probe(self, url: str, deadline: float) -> None:
        with self._ask(url, 0, 1, deadline) as answer:
            if answer.response.status == 416:  # an empty object has no first byte
                self._recognise(url, answer.response, 0)
            else:
                self._check_range(url, answer.response, 0, 1)

    def _pieces(self, url: str, start: int, end: int, deadline: float) -> Iterator[bytes]:
        """Yield the bytes [start, end), or fewer and then a Transient."""
        with self._ask(url, start, end, deadline) as answer:
            response, left = answer.response, end - start
            self._check_range(url, response, start, end)
            while left:
                try:
                    piece = response.read1(min(PIECE, left))
                except (OSError, http.client.HTTPException) as error:
                    raise Transient(reason(error)) from error
                if not piece:
                    raise Transient(f"the connection ended {left} bytes early")
                left -= len(piece)
                yield piece
            if response.length == 0 and not response.will_close:
                self._keep(answer)

    def _check_range(self, url: str, response: http.client.HTTPResponse, start: int, end: int) -> None:
        """Check that an answer holds the range [start, end) of the object that was seen first."""
        shown = redact(url)
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise StorageError(f"cannot read {shown}: the server sends it compressed, so ranges of it have no meaning")
        if response.status == 200:  # the server ignores ranges; the whole from its beginning will do
            if start or response.length is None:
                raise StorageError(f"cannot read a part of {shown}: the server answers no range requests; copy it here")
            first, last, size = 0, end - 1, response.length
        else:
            match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", response.getheader("Content-Range", ""))
            if match is None:
                raise Transient("an answer without a Content-Range that gives the size")
            first, last, size = (int(number or -1) for number in match.groups())
        self._recognise(url, response, size)
        if size < end:
            raise DataError(f"{shown} ends at byte {size}, {end - max(size, start)} bytes short; upload it again")
        if (first, last) != (start, end - 1):
            raise Transient(f"the range {first}-{last} instead of {start}-{end - 1}")

    def _recognise(self, url: str, response: http.client.HTTPResponse, size: int) -> None:
        """Hold an object to what was seen of it first."""
        seen = self._seen.get(url)
        etag = response.getheader("ETag") or response.getheader("Last-Modified")
        if response.status == 416 and seen is not None:  # many servers leave it out there
            etag = seen.etag
        now = Identity(size, etag)
        if response.status != 416 or size == 0:
            seen = self._seen.setdefault(url, now)
        if seen is not None and seen != now:
            raise DataError(
                f"{redact(url)} was overwritten: it has {now.size} bytes and ETag {now.etag}, and had {seen.size} and "
                f"{seen.etag}; a shard must not change during a run"
            )

    @contextlib.contextmanager
    def _ask(self, url: str, start: int, end: int, deadline: float) -> Iterator[_Answer]:
        """Send one range request, follow its redirects, and sort out every answer that is not a body."""
        target = self._endpoints.target(url)
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"} | target.headers
        etag = self._seen[url].etag if url in self._seen else None
        if target.if_match and etag is not None and etag.startswith('"'):  # a weak one never matches, RFC 9110 13.1.1
            headers["If-Match"] = etag
        where = target.url
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._exchange(where, headers, deadline, url)
            if answer.response.status not in REDIRECTS:
                break
            answer.connection.close()
            location = urljoin(where, answer.response.getheader("Location", ""))
            if not same_host(where, location):
                check_redirect(url, target, location)
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
            where = location
        try:
            self._check_status(url, answer.response)
            yield answer
        finally:
            if answer.connection not in self._idle.values():
                answer.connection.close()

    def _check_status(self, url: str, response: http.client.HTTPResponse) -> None:
        status = response.status
        if status in (200, 206, 416):
            return
        if status == 412:
            raise DataError(
                f"{redact(url)} was overwritten (its ETag is no longer {self._seen[url].etag}); a shard must not "
                f"change during a run"
            )
        check_status(url, response)

    def _exchange(self, where: str, headers: dict[str, str], deadline: float, url: str) -> _Answer:
        """One request and the head of its answer. A kept connection that the server has closed is replaced at once."""
        parts = urlsplit(where)
        try:
            place = (parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        except ValueError:
            raise StorageError(f"cannot read {redact(url)}: it leads to a wrong port") from None
        path = quote(parts.path or "/", safe=SAFE) + (f"?{quote(parts.query, safe=SAFE + '?')}" if parts.query else "")
        lines = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", *(f"{k}: {v}" for k, v in headers.items())]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1")
        while True:
            kept = self._idle.pop(place, None)
            connection = kept or self._connect(place, deadline, url)
            try:
                connection.settimeout(self.patience.silence)
                connection.sendall(request)
                wire: Any = Wire(connection, self.patience, deadline)  # the one method of a socket that is called
                response = http.client.HTTPResponse(wire, method="GET")
                response.begin()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept is None or isinstance(error, TimeoutError):
                    raise Transient(reason(error)) from error
            else:
                self._answered.add(place)
                return _Answer(response, place, connection)

    def _connect(self, place: tuple[str, str, int], deadline: float, url: str) -> socket.socket:
        scheme, host, port = place
        new, error = place not in self._answered, None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        except OSError as failure:
            raise Transient(f"the name of the host is not known ({reason(failure)})", unreachable=new) from failure
        for address in addresses:
            timeout = min(self.patience.connect, max(0.001, deadline - time.monotonic()))
            try:
                return open_socket(
                    address, port, timeout=timeout, tls=self._tls if scheme == "https" else None, host=host
                )
            except (ForbiddenAddress, ssl.SSLCertVerificationError) as failure:
                raise StorageError(f"cannot read {redact(url)}: {reason(failure)}") from failure
            except OSError as failure:
                error = failure
        raise Transient(f"no connection ({reason(error)})", unreachable=new) from error

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # reading all certificates takes a moment that local data need not wait

    def _keep(self, answer: _Answer) -> None:
        if len(self._idle) >= MAX_CONNECTIONS:
            self._idle.pop(next(iter(self._idle))).close()
        self._idle[answer.place] = answer.connection

    def _forget(self) -> None:
        self._process = os.getpid()
        self._idle: dict[tuple[str, str, int], socket.socket] = {}
        self._seen: dict[str, Identity] = getattr(self, "_seen", {})
        self._answered: set[tuple[str, str, int]] = set()
        self._endpoints = Endpoints()
        self._jitter = random.Random()  # of its own: waiting must not advance a generator of the run

    def __getstate__(self) -> dict[str, Any]:
        return {"patience": self.patience, "_seen": self._seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
