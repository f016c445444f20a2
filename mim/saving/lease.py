"""The lease of a run directory: one job at a time writes there.

    RUN/.lease.json   who holds it; its modification time is moved every 15 s, the sign of life

It works on storage that several machines share, without `flock`: the file is created exclusively, and ages are
differences of times that the file server itself wrote, so clocks may differ. A lease is stale when its process is gone,
which is known at once on the same machine, or when it gave no sign of life for three minutes. It is then taken over,
with a line that says so. A holder that was thought dead finds out before it commits or deletes anything (`check`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mim import ranks
from mim.config import ConfigError
from mim.contracts import StorageError
from mim.log import say

FILE = ".lease.json"
TAKING = ".lease-taking"  # exists while a stale lease is replaced
BEAT = 15.0  # seconds between signs of life
STALE = 180.0  # seconds without one; NFS clients cache times for up to 60


class Lease:
    """What the main rank of the one job holds."""

    def __init__(self, run: Path) -> None:
        self.file = run / FILE
        self.token = secrets.token_hex(4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise StorageError when another job took the directory over, OSError when the storage does not answer."""
        found = _read(self.file)
        if found is None or found.get("token") != self.token:
            by = f"by {_named(found)}" if found else "and given up again"
            raise StorageError(
                f"{self.file.parent} was taken over {by}, because this job had given no sign of life for "
                f"{STALE:.0f} s; it saves and deletes nothing more there"
            )

    def start(self) -> None:
        self._thread.start()

    def release(self) -> None:
        """Give the lease back, unless it is another's by now."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if (_read(self.file) or {}).get("token") == self.token:
                self.file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a server that is away for a moment; what is not written ages
                if (_read(self.file) or {}).get("token") != self.token:
                    return  # `check` tells the saver
                os.utime(self.file)


@contextlib.contextmanager
def hold(run: Path) -> Iterator[Lease | None]:
    """Hold the run directory while the block runs (called on all ranks; the main one alone gets the lease).

    Raises ConfigError on all ranks when another job holds it, StorageError when the directory cannot be written.
    """
    lease, refusal, storage = None, "", False
    made = []
    if ranks.place()[0] == 0:
        try:
            made = _make(run)
            lease = _acquire(run)
        except (ConfigError, OSError) as error:
            refusal, storage = str(error), isinstance(error, OSError)
    told = ranks.gather([[refusal, storage]] if ranks.place()[0] == 0 else [])
    refusal, storage = told[0]
    if refusal:
        raise StorageError(f"train.run={run} cannot be written: {refusal}") if storage else ConfigError(refusal)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()
        for folder in made:
            with contextlib.suppress(OSError):  # it is no longer empty, as it should be
                folder.rmdir()


def holder(run: Path) -> str | None:
    """Who holds a run directory now, in words; None when nobody does, as far as one can know without waiting."""
    file = run / FILE
    found = _peek(file)
    if found is None or _gone(found):
        return None
    return _named(found) if time.time() - file.stat().st_mtime < STALE else None


def _acquire(run: Path) -> Lease:
    """The lease of a run; waits for a sign of life where the holder is on another machine."""
    lease = Lease(run)
    began, seen = time.monotonic(), None
    while not _create(lease.file, lease.token):
        found, beat = _peek(lease.file), _beat_of(lease.file)
        if found is None and beat is None:  # it was given back just now, or may not be read
            if time.monotonic() - began > 2 * STALE:
                _refuse(run, found)
            time.sleep(0.2)
            continue
        dead = found is not None and _gone(found)
        if dead or (beat is not None and _now(run) - beat > STALE):
            if _take_over(lease, found):
                break
        elif found is not None and _here(found):
            _refuse(run, found)
        elif seen is None:
            seen = beat
            say(f"{run} is held by {_named(found)}; waiting up to {STALE:.0f} s for a sign of life")
        elif beat != seen or time.monotonic() - began > 2 * STALE:
            _refuse(run, found)
        time.sleep(0.2 if dead else 2.0)
    lease.start()
    return lease


def _refuse(run: Path, found: dict[str, Any] | None) -> None:
    raise ConfigError(f"train.run={run} is in use by {_named(found)}; stop that job first, or choose another train.run")


def _take_over(lease: Lease, stale: dict[str, Any] | None) -> bool:
    """Replace a stale lease, unless another job is doing so or has done it."""
    guard = lease.file.with_name(TAKING)
    try:
        guard.open("x").close()
    except FileExistsError:
        if _now(guard.parent) - (_beat_of(guard) or 0) > STALE:  # whoever made it died within a few milliseconds
            guard.unlink(missing_ok=True)
        return False
    try:
        if _peek(lease.file) != stale:
            return False
        temporary = lease.file.with_name(f"{FILE}-{lease.token}")
        temporary.write_text(json.dumps(_own(lease.token)))
        temporary.replace(lease.file)
    finally:
        guard.unlink(missing_ok=True)
    say(f"{lease.file.parent} was held by {_named(stale)}, which is gone: taken over")
    return True


def _create(file: Path, token: str) -> bool:
    """Write the lease if there is none."""
    try:
        with file.open("x") as new:
            new.write(json.dumps(_own(token)))
            new.flush()
            os.fsync(new.fileno())
    except FileExistsError:
        return False
    return True


def _own(token: str) -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return {
        "token": token,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _process(pid)[1],
        "since": since,
    }


def _read(file: Path) -> dict[str, Any] | None:
    """The lease in a file; None when there is none, or it is being written. Raises OSError when nobody can tell."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _peek(file: Path) -> dict[str, Any] | None:
    """The lease of a stranger; None where it cannot be read, too."""
    try:
        return _read(file)
    except OSError:
        return None


def _named(found: dict[str, Any] | None) -> str:
    if not found:
        return "a job that wrote no name"
    return f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}"


def _here(found: dict[str, Any]) -> bool:
    """Whether the holder's process number means something in this process."""
    return found.get("machine") == _machine()


def _gone(found: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended; a process number that was given to another process is no holder."""
    if not _here(found) or not isinstance(found.get("pid"), int):
        return False
    running, started = _process(found["pid"])
    return not running or (started is not None and started != found.get("started"))


def _machine() -> str:
    """This boot of this machine and this space of process numbers, where the system tells; else the host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> tuple[bool, str | None]:
    """Whether a process of this machine runs, and when it started (in the system's own unit; None: not told)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] not in "ZX", fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return False, None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, None
    except PermissionError:
        pass
    return True, None


def _beat_of(file: Path) -> float | None:
    """Time of the last sign of life, on the clock of the file server; opened, for NFS asks the server then."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return None


def _now(run: Path) -> float:
    """The time on the clock of the file server."""
    probe = run / f"{FILE}-now-{secrets.token_hex(4)}"
    try:
        probe.write_text("")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _make(run: Path) -> list[Path]:
    """Make the run directory; returns the folders that were not there, the innermost first."""
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    return missing
