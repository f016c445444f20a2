"""RUN/report.html while a run goes on: written by the main rank after evaluations, at its end and when it fails.

It follows the run log (mim/log.py). Writing takes at most one part in a hundred of the time of a run: after a page that
took a second, the next one waits for at least a hundred. A page that cannot be written costs one line and ends nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mim.log import say
from mim.report.page import page

SHARE = 0.01  # of the time of a run that may go into its report
WORTH_A_PAGE = ("eval", "rollback", "save_failed")  # events after which the page is written anew


class Writing:
    """Writes the report of a run when its log says something that is worth it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._due = 0.0  # time.monotonic() from which another page may be written
        self._stale = False  # whether something happened since the last page
        self._warned = False

    def tell(self, entry: dict[str, Any]) -> None:
        """Hear of a line of the log, and write the page if it is due."""
        self._stale |= entry["event"] in WORTH_A_PAGE
        if self._stale and time.monotonic() >= self._due:
            self._write()

    def close(self) -> None:
        """Write the last page of this start of the run."""
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            save([self.run], self.run / "report.html")
        except Exception as error:  # whatever it is, the training is worth more than its report
            if not self._warned:
                say(f"{self.run / 'report.html'} could not be written: {error}; training goes on")
            self._warned = True
        ended = time.monotonic()
        self._due, self._stale = ended + (ended - began) / SHARE, False


@contextlib.contextmanager
def after_failure(run: Path) -> Iterator[None]:
    """Write the page once more when the block fails: the last one was written while the run still ran."""
    try:
        yield
    except Exception:
        Writing(run).close()
        raise


def save(runs: list[Path], out: Path) -> None:
    """Write the report of some runs to a file, which is whole at every moment.

    A training and `mim report` may write the same one at the same time, so each process writes a file of its own aside.
    """
    text = page(runs)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
