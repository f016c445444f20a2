"""Faults inside a training process: it is killed, signalled, or its disk refuses, at a place that a case names.

A fault is a dict:

    at      "step"    before micro-batch `micro` of step `step`
            "stage"   when the `save`-th save (from 1) reaches the stage `stage` (mim.saving.save_stages)
            "write"   before the `number`-th operation (from 1) on files under `folder` that changes them: opening to
                      write, fsync, rename, mkdir, remove; counted from the `save`-th save on
            "count"   never; the operations are counted, and their names are events
    do      "kill" (SIGKILL) | "term" (SIGTERM) | "term twice" | "fill" (the disk that the run is on becomes full) |
            "wait" (a slow disk: half a second at every save) |
            an errno by name, ENOSPC: the operation fails with it, and from then on all like it unless `once`
    rank    the rank that it happens to; default: all

That it happened stands in the events of the rank before anything else happens.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATHS = {"open": 1, "os.rename": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1}  # event: its paths
BLOCK = 1 << 12  # bytes
SLOW = 0.5  # seconds
APART = 2.5  # seconds between two signals that are not one


class Fault:
    """A fault, installed in this process; its owner tells it of steps and saves."""

    def __init__(self, fault: dict[str, Any], rank: int, events: Path) -> None:
        self.fault = fault
        self.mine = fault.get("rank", rank) == rank
        self.events = events
        self.folder = os.path.realpath(fault.get("folder", "/nowhere"))
        self.saves = self.operations = 0
        self.fired = self.busy = False
        if fault["at"] in ("write", "count") and self.mine:
            sys.addaudithook(self._audit)
            self._fsync, os.fsync = os.fsync, self._synced

    def step(self, step: int, micro: int) -> None:
        """A micro-batch begins."""
        if self.fault["at"] == "step" and (step, micro) == (self.fault["step"], self.fault.get("micro", 0)):
            self._fire(f"step {step}, micro-batch {micro}")

    def write(self, file: Any) -> None:
        """A file is about to be written by code that is not Python's."""
        if self.fault["at"] in ("write", "count") and self.mine and isinstance(file, str | os.PathLike):
            self._operation("open", [_absolute(file, -1)])

    def stage(self, stage: str) -> None:
        """A save reaches a stage; the first one is called `begin`."""
        self.saves += stage == "begin"
        if self.fault["at"] == "stage" and stage == self.fault["stage"]:
            if self.fault["do"] == "wait":
                self._tell("fault", "wait", stage)
                time.sleep(SLOW)
            elif self.saves == self.fault["save"]:
                self._fire(stage)

    # ---- operations on files -------------------------------------------------------------------------------------

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATHS or self.busy:
            return
        if event == "open" and not _writes(arguments):
            return
        folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        self._operation(event, [_absolute(path, folder) for path in arguments[: PATHS[event]]])

    def _synced(self, descriptor: int) -> None:
        self._operation("fsync", [_absolute(descriptor, -1)])
        self._fsync(descriptor)

    def _operation(self, event: str, paths: list[str]) -> None:
        """Count an operation, when it is one on the folder and saves have begun that count."""
        inside = [path for path in paths if path.startswith(self.folder + "/")]
        if not inside or self.saves < self.fault.get("save", 1):
            return
        self.operations += 1
        name = f"{event} {inside[0].removeprefix(self.folder + '/')}"
        if self.fault["at"] == "count":
            self._tell("operation", name, str(self.saves))
        elif self.operations == self.fault["number"] or (self._persists() and self.operations > self.fault["number"]):
            self._fire(name)

    def _persists(self) -> bool:
        return hasattr(errno, self.fault["do"]) and not self.fault.get("once")

    # ---- what happens --------------------------------------------------------------------------------------------

    def _fire(self, where: str) -> None:
        if not self.mine or (self.fired and not self._persists()):
            return
        self.fired = True
        self._tell("fault", self.fault["do"], where)
        match self.fault["do"]:
            case "kill":
                os.killpg(os.getpgrp(), signal.SIGKILL)  # with its loader processes
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "term twice":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(APART)
                self._tell("again", str(time.time()))
                os.kill(os.getpid(), signal.SIGTERM)
            case "fill":
                fill(Path(self.folder).parent.parent)
            case name:
                number = getattr(errno, name)
                raise OSError(number, os.strerror(number), where)

    def _tell(self, *event: str) -> None:
        self.busy = True
        with self.events.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self.busy = False


def fill(folder: Path) -> None:
    """Write a file into the folder until its file system has no room."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        size = 1 << 20
        while size >= BLOCK:
            try:
                if file.write(bytes(size)) < size:
                    size //= 2
            except OSError:
                size //= 2


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITING)


def _absolute(path: Any, folder: int) -> str:
    """A path, a descriptor, or a name in an open folder, as a path."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(text):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)
