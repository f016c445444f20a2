"""RUN/status.json: how a run stands, for scripts that start it again.

Launchers turn every exit code that is not 0 into 1, so scripts read this file instead: what the run was doing when it
last said so, why it ended, and the exit code of `mim train` itself.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim.config import ConfigError
from mim.contracts import DataError, ExportError, NumericsError, StorageError
from mim.log import say, write_json

DONE, STOPPED, INTERNAL = 0, 75, 70  # exit codes; those of errors are below
CODES = {ConfigError: 2, DataError: 65, ExportError: INTERNAL, NumericsError: INTERNAL, StorageError: 74}
STATES = ("running", "done", "stopped", "failed")


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends `mim` with: 2 configuration, 65 data, 74 storage, 70 any other."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), INTERNAL)


@dataclass
class Status:
    """Writes status.json, whole at every moment: the old file or the new one."""

    run: Path
    recipe: str
    of: int  # steps of the whole run
    step: int = 0  # as last written: the newest that is saved
    _lock: threading.Lock = field(default_factory=threading.Lock)  # the loop writes, and the thread that attends to it
    _ended: bool = False

    def write(self, state: str, step: int, *, reason: str | None = None, code: int | None = None) -> None:
        """Write a state, one of `STATES`, and the exit code of a run that ended. On a full disk the old one stays."""
        assert state in STATES, state
        with self._lock:
            self._write(state, step, reason, code)

    def _write(self, state: str, step: int, reason: str | None, code: int | None) -> None:
        if self._ended and state == "running":  # the attending thread wrote the end meanwhile
            return
        self._ended = state != "running"
        self.step = step
        value: dict[str, Any] = {"state": state, "step": step, "of": self.of, "recipe": self.recipe}
        value |= {"reason": reason, "exit_code": code, "time": round(time.time(), 3)}  # seconds since 1970
        try:
            write_json(self.run / "status.json", value)
        except OSError as error:  # what a full disk means for the run is decided where a checkpoint is saved
            say(f"{self.run / 'status.json'} could not be written: {error.strerror}")
