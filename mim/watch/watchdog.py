"""Which rank keeps the others waiting: each tells where its main thread is, and a run that does not move is ended.

`torch.distributed.monitored_barrier` names a rank that misses a barrier, but the main rank only gets to one when it
does not hang itself, and where the missing rank is, it cannot say. So every rank notes its place on the board once a
second, from a thread that runs although the main thread does not.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import InitProcessGroupKwargs

from mim.watch.board import Board

LONG = 3  # times the patience of a step: the first one, which compiles; an evaluation's batch; a save; a rollback
SILENCE = 3.0  # seconds of which a living rank's thread writes several notes
LONG_PLACES = ("start", "evaluation", "save", "rollback")


@dataclass(frozen=True)
class Beat:
    """Where the main thread of a rank is."""

    count: int  # of places that it came to; every rank comes to the same ones
    place: str  # start, data, forward, backward, update, log, evaluation, decision, save, rollback
    step: int
    age: float = 0.0  # seconds since it came there
    note: int = 0  # number of this note

    @property
    def where(self) -> str:
        return "the start" if self.place == "start" else f"the {self.place} of step {self.step}"


@dataclass(frozen=True)
class Look:
    """A rank as another one sees it."""

    beat: Beat | None  # its last note
    alive: bool  # whether its thread still writes; else it is dead, stopped or cut off


class Watchdog:
    """The heartbeat of this rank's main thread. `patience`: seconds that a step may take; None: for ever."""

    def __init__(self, board: Board, patience: float | None) -> None:
        self._board, self._patience = board, patience
        self._count = 0
        self._beat = Beat(0, "start", 0)
        self._moved, self._age, self._looked = True, 0.0, time.monotonic()
        self._notes = 0
        self._stepped = False

    # ---- of the main thread ------------------------------------------------------------------------------------------

    def at(self, place: str, step: int) -> None:
        """The main thread came to a place of a step."""
        self._count += 1
        self._stepped |= place == "log"
        self._beat = Beat(self._count, place, step)
        self._moved = True

    def moves(self) -> None:
        """It is still there, and gets on with it."""
        self._moved = True

    @property
    def step(self) -> int:
        return self._beat.step

    @property
    def where(self) -> str:
        """What the main thread is doing."""
        return self._beat.where

    # ---- of the attending thread -------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Note where this rank is. True when its main thread has not moved for too long.

        Only time that this thread saw pass counts: a process that was stopped and goes on is not late.
        """
        now = time.monotonic()
        self._age += min(now - self._looked, SILENCE)
        self._looked = now
        if self._moved:
            self._moved, self._age = False, 0.0
        self.note()
        return self.limit is not None and self._age >= self.limit

    @property
    def limit(self) -> float | None:
        """Seconds that the main thread may stay where it is."""
        if self._patience is None:
            return None
        return self._patience * (LONG if not self._stepped or self._beat.place in LONG_PLACES else 1)

    def note(self) -> None:
        """Write this rank's beat on the board."""
        self._notes += 1
        beat = self._beat
        self._board.put_mine("beat", json.dumps([beat.count, beat.place, beat.step, self._age, self._notes]))

    def look(self) -> list[Look]:
        """How every rank is; takes some seconds, in which those that live write again."""
        before = self._beats()
        if self._board.world == 1:
            return [Look(before[0], alive=True)]
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(SILENCE / 10)
            self.note()
        return [Look(new, alive=old != new) for old, new in zip(before, self._beats(), strict=True)]

    def _beats(self) -> list[Beat | None]:
        """What every rank noted last; None of one that never did."""
        notes: Sequence[str | None] | None = self._board.of_all("beat")
        if notes is None:
            notes = [self._board.get(f"beat/{rank}") for rank in range(self._board.world)]
        return [None if note is None else Beat(*json.loads(note)) for note in notes]


def blame(found: Sequence[Look], limit: float | None) -> str:
    """Who keeps the others waiting, after `limit` seconds without a step.

    First a rank that does not write any more, then those that came to fewer places than others.
    """
    within = "" if limit is None else f" within {limit:g} s"
    if silent := [rank for rank, look in enumerate(found) if not look.alive]:
        beat = found[silent[0]].beat
        last = "" if beat is None else f"; it was last seen at {beat.where}"
        return f"{_named(silent)} did not answer for {SILENCE:g} s{last}"
    beats = [look.beat for look in found if look.beat is not None]
    first, last_one = min(beats, key=lambda b: b.count), max(beats, key=lambda b: b.count)
    if first.count == last_one.count:
        who = "the run" if len(found) == 1 else f"each of the {len(found)} ranks"
        return f"{who} did not get past {first.where}{within}"
    behind = [rank for rank, look in enumerate(found) if look.beat is not None and look.beat.count == first.count]
    them = "it" if len(behind) == 1 else "them"
    return f"{_named(behind)} did not get past {first.where}{within}; others wait for {them} at {last_one.where}"


def _named(found: list[int]) -> str:
    shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return f"rank {shown}" if len(found) == 1 else f"ranks {shown}"


def collective_limit(patience: float | None) -> timedelta:
    """How long a collective waits: longer than the watchdog, which names who is missing; without one, a year."""
    return timedelta(days=365) if patience is None else timedelta(seconds=LONG * patience + 60)


def group_options(patience: float | None) -> list[InitProcessGroupKwargs]:
    """That limit as accelerate's argument."""
    return [InitProcessGroupKwargs(timeout=collective_limit(patience))]


def dump_stacks(path: Path) -> None:
    """Write where every thread of this process is, to a file and to standard error."""
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
