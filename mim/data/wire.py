"""A connection whose every wait has an end: deadlines, minimum throughput, and no link-local address."""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

PIECE = 1 << 18  # bytes received at a time
CREDENTIAL_SERVICES = (ipaddress.ip_address("fd00:ec2::254"),)  # AWS; the others are link-local


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    connect: float = 10.0  # one attempt to connect, TLS included
    silence: float = 20.0  # without a byte
    min_rate: float = 64 * 1024  # bytes/s over `silence` seconds
    total: float = 120.0  # of one read with all its retries, plus its bytes at `min_rate`
    unreachable: float = 6.0  # of retries while a host has never answered: a wrong name should not take minutes
    first_wait: float = 0.5  # between two attempts, doubling
    longest_wait: float = 30.0  # also of a Retry-After

    def until(self, size: int) -> float:
        """Seconds within which a read of `size` bytes has succeeded or failed."""
        return self.total + size / self.min_rate


class ForbiddenAddress(OSError):
    """An address that is never asked."""


def open_socket(address: str, port: int, *, timeout: float, tls: ssl.SSLContext | None, host: str) -> socket.socket:
    """Connect to a numeric address; with `tls` prove that it is `host`.

    Raises OSError. Its kinds ForbiddenAddress and ssl.SSLCertVerificationError are not mended by another attempt.
    """
    check_address(address)
    plain = socket.create_connection((address, port), timeout=timeout)
    if tls is None:
        return plain
    with contextlib.ExitStack() as stack:
        stack.callback(plain.close)
        secured = tls.wrap_socket(plain, server_hostname=host)
        stack.pop_all()
    return secured


class Wire(io.RawIOBase):
    """The receiving side of a socket under the deadlines; one per answer."""

    def __init__(self, connection: socket.socket, patience: Patience, deadline: float):
        self.connection = connection
        self.patience = patience
        self.deadline = deadline
        self.waited, self.received = 0.0, 0  # s and bytes of the present window; what we do in between is not waiting

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client asks of a socket."""
        return io.BufferedReader(self, PIECE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive some bytes. Raises TimeoutError after `silence`, below `min_rate`, and at the deadline."""
        patience, now = self.patience, time.monotonic()
        if now >= self.deadline:
            raise TimeoutError("the deadline has passed")
        if self.waited >= patience.silence:
            if self.received < patience.min_rate * self.waited:
                rate = self.received / self.waited
                raise TimeoutError(f"{rate:.0f} bytes/s, less than the {patience.min_rate:.0f} of a living connection")
            self.waited, self.received = 0.0, 0
        self.connection.settimeout(min(patience.silence, self.deadline - now))
        try:
            count = self.connection.recv_into(buffer)
        except TimeoutError:
            raise TimeoutError(f"no byte for {time.monotonic() - now:.2g} s") from None
        self.waited += time.monotonic() - now
        self.received += count
        return count


def check_address(address: str) -> None:
    """Refuse addresses at which clouds hand out credentials, whatever name led to them. Raises ForbiddenAddress."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip in CREDENTIAL_SERVICES:
        raise ForbiddenAddress(f"it leads to the link-local address {ip}, which is refused; no shard lies there")


def reason(error: BaseException | None) -> str:
    """What an error says, in a few words."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}" if isinstance(error, http.client.HTTPException) else text
