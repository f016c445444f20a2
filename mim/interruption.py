"""Places where long work may be left halfway: between two batches of an evaluation, and before ranks meet.

The work itself knows nothing of it. A rank that leaves must not be waited for, so before a collective all ranks tell
each other whether one has left, and leave together (mim/looking.py). Threads beside the work are not part of it: one
that writes a checkpoint has collectives of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Left(Exception):
    """The work was left halfway, on all ranks; it is to be done again."""


_between: Callable[[], None] | None = None
_meet: Callable[[], None] | None = None
_worker: int | None = None  # the thread that does the work


@contextlib.contextmanager
def leavable(between: Callable[[], None], meet: Callable[[], None]) -> Iterator[None]:
    """While the block runs, ask `between` at every batch and `meet` before every collective; both may raise Left."""
    global _between, _meet, _worker
    before = _between, _meet, _worker
    _between, _meet, _worker = between, meet, threading.get_ident()
    try:
        yield
    finally:
        _between, _meet, _worker = before


def between_batches() -> None:
    """Called for every batch, or piece of work of that length."""
    if _between is not None and _worker == threading.get_ident():
        _between()


def before_collective() -> None:
    """Called by all ranks alike before they exchange anything."""
    if _meet is not None and _worker == threading.get_ident():
        _meet()
