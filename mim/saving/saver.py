"""Writing checkpoints: a snapshot at a step boundary, then a thread on every rank, then one rename.

    the loop, all ranks    lease and free space are checked; every rank copies the tensors that it will write
    threads, all ranks     tensors are written, hashed and synced; sizes and hashes are exchanged
    thread, main rank      state.json, manifest.json last, rename (the one commit point), the folder above synced;
                           then the new checkpoint is read again and, if it is valid, old ones are deleted
    threads, all ranks     are told what became of it

One save is in flight: the next one waits for it. The threads speak over a gloo group of their own, so nothing of the
loop's can come between, and all of them know the same outcome. The loop asks for it where all ranks come together
(`check`), and fails on all of them or on none.

A disk that is full or refuses: the temporary is removed, older checkpoints stay as they are, and training goes on, up
to `train.failed_saves` failed saves in a row, each told in log.jsonl and status.json. One more ends the run (exit code
74), and so does a failed save that the run waits for, at its end or at a signal.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mim import ranks
from mim.contracts import StorageError
from mim.log import say, write_json
from mim.saving import checkpoint, retention, save_stages
from mim.saving.lease import Lease
from mim.saving.snapshot import Snapshot, num_bytes

MARGIN = 1.1  # of the expected size must be free
PATIENCE = timedelta(hours=2)  # of a rank that waits for the slowest one's disk
Tell = Callable[..., None]  # tell(event, step, **values): for log.jsonl and status.json


@dataclasses.dataclass
class _Fault:
    """Why a save failed."""

    reason: str
    kind: str  # storage: may pass | taken: the run directory is another job's | internal: a mistake of ours


@dataclasses.dataclass
class _Save:
    """A save in flight."""

    step: int
    final: Path
    temporary: Path
    state: dict[str, Any]
    thread: threading.Thread | None = None
    fault: _Fault | None = None  # of this rank, then of all


class Saver:
    """Saves the checkpoints of a run. All ranks have one and call it together; the main rank's has the lease."""

    def __init__(
        self,
        run: Path,
        lease: Lease | None,
        *,
        keep: int,
        keep_every: int | None = None,
        failed_saves: int = 2,
    ) -> None:
        self.run, self.lease, self.keep, self.keep_every = run, lease, keep, keep_every
        self.failed_saves = failed_saves
        self.tell: Tell = lambda *_args, **_values: None  # of a failed save; the loop gives its own
        self.committed: Callable[[int], None] = lambda _step: None  # told when a save is known to be whole
        self.failed = 0  # saves in a row
        self.main = ranks.place()[0] == 0
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        (self._token,) = ranks.gather([lease.token if lease is not None else "0"] if self.main else [])
        self._snapshot, self._verifier = Snapshot(), retention.Verifier()
        self._save: _Save | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        write_extra: Callable[[Path], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Take a snapshot of a step and write it in the background; with `wait`, return when it is committed.

        `write_extra(folder)` adds files of the main rank's before this returns. Raises StorageError on all ranks.
        """
        self.wait()
        save_stages.reached("begin")
        final = self.run / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f".tmp-{final.name}-{self._token}")
        current = _Save(step, final, temporary, copy.deepcopy(state))
        if fault := self._prepare(current, num_bytes(tensors)):
            current.fault = fault
            self._settle(current, last=wait)
            return
        current.fault = _attempt(lambda: self._snapshot.take(tensors, current.temporary / "tensors"))
        save_stages.reached("snapshot")
        if self.main and write_extra is not None:
            current.fault = current.fault or _attempt(lambda: write_extra(current.temporary))
        self._save = current
        if wait:
            self._write(current)
            self.wait(last=True)
        else:
            current.thread = threading.Thread(target=self._write, args=(current,), name="saver", daemon=True)
            current.thread.start()

    def check(self) -> None:
        """Tell of a save that ended on all ranks, without waiting for it. Raises StorageError when too many failed."""
        if self._save is not None and not ranks.agree(self._alive(self._save)):
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Wait for the save in flight, and tell how long the loop stood still for it."""
        if self._save is None:
            return
        current, began = self._save, time.perf_counter()
        if current.thread is not None:
            current.thread.join()
            waited = time.perf_counter() - began
            if waited > 1:
                say(f"waited {waited:.1f} s for the checkpoint of step {current.step} to be written", main=self.main)
        self._save = None
        self._settle(current, last=last)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Let a save in flight end where the loop ends with an error; where a user interrupts it, leave it."""
        if self._save is not None and self._save.thread is not None and (kind is None or issubclass(kind, Exception)):
            self._save.thread.join()
            if self._save.fault is None:
                self.committed(self._save.step)

    def _alive(self, current: _Save) -> bool:
        return current.thread is not None and current.thread.is_alive()

    def _settle(self, current: _Save, *, last: bool) -> None:
        """What the loop does about an outcome that all ranks know."""
        if current.fault is None:
            self.failed = 0
            self.committed(current.step)
            return
        if current.fault.kind == "internal":
            raise RuntimeError(f"the checkpoint of step {current.step} could not be written: {current.fault.reason}")
        if current.fault.kind == "taken":
            raise StorageError(current.fault.reason)
        self.failed += 1
        reason = f"checkpoint {current.final} was not saved: {current.fault.reason}; older ones are intact"
        over = self.failed > self.failed_saves
        rest = "" if last or over else f"; training goes on ({self.failed} of {self.failed_saves} failures in a row)"
        say(reason + rest, main=self.main)
        stops = last or over
        self.tell("save_failed", current.step, reason=reason, in_a_row=self.failed, stops=stops)
        if stops:
            advice = "free or add space, then run the same command: it resumes from the newest checkpoint"
            raise StorageError(f"{reason}; {advice}")

    def _prepare(self, current: _Save, size: int) -> _Fault | None:
        """Make the temporary folder if there is room (the main rank); returns on all ranks why not."""

        def prepare() -> None:
            if self.lease is not None:
                self.lease.check()
            retention.remove_dead(self.run)
            current.final.parent.mkdir(parents=True, exist_ok=True)
            needed, free = int(MARGIN * size), shutil.disk_usage(self.run).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"no space left: {needed} bytes are needed and {free} are free")
            (current.temporary / "tensors").mkdir(parents=True)
            save_stages.reached("folder")

        fault = _attempt(prepare) if self.main else None
        return self._told(fault, None)

    def _write(self, current: _Save) -> None:
        """The thread of a rank. Whatever happens, all ranks exchange the same two messages."""
        files: dict[str, dict[str, Any]] = {}

        def write() -> None:
            save_stages.reached("before-tensors")
            files.update({f"tensors/{name}": entry for name, entry in self._snapshot.write().items()})
            save_stages.reached("after-tensors")

        try:
            current.fault = current.fault or _attempt(write)
            found = ranks.gather([[name, entry] for name, entry in files.items()], group=self._group)
            current.fault = self._told(current.fault, self._group)
            fault = current.fault or _attempt(lambda: save_stages.reached("hashes"))
            if fault is None and self.main:
                fault = _attempt(lambda: self._commit(current, dict(found)))
            if fault is not None and self.main:
                shutil.rmtree(current.temporary, ignore_errors=True)
            current.fault = self._told(fault, self._group)
        except RuntimeError as error:  # of the group: another rank is gone or too slow
            current.fault = _Fault(f"a rank did not answer: {' '.join(str(error).split())[:300]}", "internal")

    def _commit(self, current: _Save, files: dict[str, dict[str, Any]]) -> None:
        """State, manifest and rename, on the main rank."""
        temporary, final = current.temporary, current.final
        save_stages.reached("before-state")
        write_json(temporary / "state.json", {"format": checkpoint.FORMAT, "step": current.step, **current.state})
        for path in temporary.rglob("*"):
            name = str(path.relative_to(temporary))
            if path.is_file() and name not in files:
                files[name] = _synced(path)
        save_stages.reached("after-state")
        save_stages.reached("before-manifest")
        manifest = {"format": checkpoint.FORMAT, "files": dict(sorted(files.items()))}
        write_json(temporary / "manifest.json", manifest)
        _sync_folder(temporary / "tensors")
        _sync_folder(temporary)
        save_stages.reached("after-manifest")
        if self.lease is not None:
            self.lease.check()
        save_stages.reached("before-rename")
        replaced = final.with_name(f"{retention.REPLACED}{final.name}")
        if final.exists():  # a rejected checkpoint of the same step, or the same step saved again
            shutil.rmtree(replaced, ignore_errors=True)
            if retention.pinned(final):
                retention.pin(temporary)
            final.rename(replaced)
        temporary.rename(final)
        save_stages.reached("after-rename")
        _sync_folder(final.parent)
        save_stages.reached("after-parent")
        if (reason := self._verifier.reason(final)) is not None:
            if replaced.exists():
                final.rename(temporary)
                replaced.rename(final)
            raise OSError(errno.EIO, f"read again after it was written, {reason}")
        save_stages.reached("verified")
        self._prune()

    def _prune(self) -> None:
        """Delete old checkpoints; where that fails, the new one is no worse for it."""
        save_stages.reached("before-prune")
        try:
            retention.prune(self.run, keep=self.keep, keep_every=self.keep_every, verifier=self._verifier)
        except OSError as error:
            say(f"an old checkpoint of {self.run} could not be deleted: {error}")
        retention.remove_dead(self.run)
        save_stages.reached("after-prune")

    def _told(self, fault: _Fault | None, group: dist.ProcessGroup | None) -> _Fault | None:
        """The first fault of any rank, on all ranks."""
        rank, world = ranks.place()
        where = f"rank {rank}: " if world > 1 else ""
        own = [[where + fault.reason, fault.kind]] if fault is not None else []
        found = ranks.gather(own, group=group)
        return _Fault(*found[0]) if found else None


def _attempt(work: Callable[[], None]) -> _Fault | None:
    """Do something; an error is turned into a fault that other ranks can be told."""
    try:
        work()
    except StorageError as error:
        return _Fault(str(error), "taken")
    except Exception as error:  # a thread's error must reach the loop, on all ranks, whatever it is
        reason = _storage_reason(error)
        if reason is not None:
            return _Fault(reason, "storage")
        say(traceback.format_exc())
        return _Fault(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", "internal")
    return None


def _storage_reason(error: BaseException | None) -> str | None:
    """What a disk has to do with an error, however it is wrapped; None: nothing."""
    while error is not None:
        if isinstance(error, CheckpointException):
            return next((r for e in error.failures.values() if (r := _storage_reason(e[0]))), None)
        if isinstance(error, OSError):
            return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        if isinstance(error, SafetensorError) and "os error" in str(error):  # how its Rust says OSError
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _synced(path: Path) -> dict[str, Any]:
    """Size and hash of a small file that is on the disk when this returns."""
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
