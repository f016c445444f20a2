"""A thread that attends to a run while its main thread trains: signals, the time limit, other ranks, heartbeats.

The main thread may be inside a collective for long, where Python's signal handlers do not run; the interpreter writes
the number of a signal into a pipe at once, and this thread reads it there. A first signal asks all ranks to stop after
a step that they agree on; a second one ends them at once, and so does the first one before there is anything to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from mim import ranks
from mim.log import say
from mim.watch.board import Board
from mim.watch.requeue import saved_step
from mim.watch.status import CODES, INTERNAL, STOPPED, Status, exit_code
from mim.watch.stopping import Deadline, Stopping
from mim.watch.watchdog import Look, Watchdog, blame, collective_limit, dump_stacks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_SIGNAL = 2.0  # seconds within which signals are the same one, sent to the process and to its group
POLL, HURRY = 1.0, 0.02  # seconds between two looks at the board; while ranks wait for votes
GRACE = 5.0  # seconds in which the main thread may end by itself after another rank failed


@dataclass
class End:
    """How and why all ranks end at once."""

    rank: int  # that found it out
    writer: int  # rank that writes status.json
    state: str
    reason: str
    code: int
    hangs: bool = False  # the stacks of all ranks are wanted


class Attendant:
    """What the loop asks and tells (`stopping`, `watchdog`, `status`), and the thread behind it."""

    def __init__(self, board: Board, status: Status, *, patience: float | None, deadline: Deadline | None) -> None:
        self.board, self.status = board, status
        self.stopping = Stopping(board, collective_limit(patience))
        self.watchdog = Watchdog(board, patience)
        self._patience, self._deadline = patience, deadline
        self._over = threading.Event()
        self._seen: tuple[End, float] | None = None  # what another rank said, and when
        self._received: list[float] = []  # when signals came
        self._pipe, self._written = socket.socketpair()
        for end in (self._pipe, self._written):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._attend, name="attendant", daemon=True)

    def at(self, place: str, step: int) -> None:
        """The main thread came to a place of a step (mim/watch/watchdog.py)."""
        self.watchdog.at(place, step)

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Attend while the block runs. An error in it is told to the other ranks and written into status.json."""
        previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        if self.board.rank == 0:
            self.status.write("running", self.status.step)
        self.watchdog.note()
        self._thread.start()
        try:
            yield
            ranks.wait()  # no thread leaves before all have what they need to know
        except Exception as error:
            self._failed(error)
            raise
        finally:
            self._over.set()
            self._written.send(b"\0")  # wakes the thread
            signal.set_wakeup_fd(wakeup)
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            for number, handler in previous.items():
                signal.signal(number, handler)
            for end in (self._pipe, self._written):
                end.close()

    # ---- errors of the main thread -----------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        """Tell the others why this rank ends; of a broken connection, another rank is the reason."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if type(error) not in CODES:
            reason = f"{type(error).__name__}: {reason}"
        if self.board.rank:
            reason = f"rank {self.board.rank}: {reason}"
        mine = End(self.board.rank, 0, "failed", reason[:500], exit_code(error))
        try:
            found = self._end_of_another() if type(error) not in CODES and self.board.world > 1 else None
            stands = End(**json.loads(self.board.first("end", json.dumps(dataclasses.asdict(found or mine)))))
        except dist.DistError:
            stands = self._without_store()
        mine = mine if type(error) in CODES else stands
        if self.board.rank == mine.writer:
            self._write(mine)

    def _end_of_another(self) -> End | None:
        """Why a collective failed here: what another rank said, or that one is silent."""
        began = time.monotonic()
        while time.monotonic() - began < HURRY * 10:  # its note is older than the broken connection
            if text := self.board.get("end"):
                return End(**json.loads(text))
            time.sleep(HURRY)
        found = self.watchdog.look()
        return None if all(look.alive for look in found) else self._hang(found)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        armed, hurry = 0.0, max(HURRY, self.board.world / 1000)  # every rank asks for the votes of all
        while not self._over.is_set():
            try:
                self._hear(hurry if self.stopping.voting else POLL)
                if self._deadline is not None and self._deadline.passed and self.stopping.reason is None:
                    self._ask(self._deadline.reason)
                asked = self.stopping.reason
                self.stopping.poll()
                if asked is None and self.stopping.reason is not None:
                    main = self.board.rank == 0
                    say(f"{self.stopping.reason}: saving after this step, then stopping; a second signal stops at once",
                        main=main)  # fmt: skip
                if (text := self.board.get("end")) is not None and not self._over.is_set():
                    self._obey(End(**json.loads(text)))
                elif self.watchdog.poll():
                    self._tell(self._hang(self.watchdog.look()))
                if self._patience is not None and time.monotonic() - armed > self._patience / 4:
                    armed = time.monotonic()
                    limit = self.watchdog.limit or 0.0
                    faulthandler.dump_traceback_later(limit + self._patience, file=sys.__stderr__ or sys.stderr)
            except dist.DistError:
                self._store_is_gone()

    def _hear(self, timeout: float) -> None:
        """Wait for signals, at most so long, and act on them."""
        ready, _, _ = select.select([self._pipe], [], [], timeout)
        for number in self._pipe.recv(64) if ready else b"":
            if number not in SIGNALS:
                continue
            name, now = signal.Signals(number).name, time.monotonic()
            self._received.append(now)
            if now - self._received[0] > ONE_SIGNAL:
                self._tell(End(self.board.rank, 0, "stopped", f"a second {name}: stopped at once", STOPPED))
            elif not self.stopping.stepped:
                self._tell(End(self.board.rank, 0, "stopped", f"{name} before the first step", STOPPED))
            elif len(self._received) == 1:
                self._ask(name)

    def _ask(self, reason: str) -> None:
        self.stopping.ask(reason if self.board.world == 1 else f"{reason} (rank {self.board.rank})")

    def _tell(self, end: End) -> None:
        """End all ranks; the first reason stands."""
        self.board.first("end", json.dumps(dataclasses.asdict(end)))

    def _obey(self, end: End) -> None:
        """Leave as another rank said, or this one; after an error elsewhere the main thread may do so itself."""
        if self._seen is None:
            self._seen = end, time.monotonic()
            if end.hangs:
                dump_stacks(self.status.run / f"stacks-rank{self.board.rank}.txt")
        if end.state == "failed" and not end.hangs and time.monotonic() - self._seen[1] < GRACE:
            return
        if self.board.rank == end.writer:
            self._write(end)
            say(f"mim: {end.reason}")
        self.board.put_mine("left", "")
        waits = time.monotonic()  # the board may be in this process, and the others look at it once a second
        while self.board.rank == 0 and self.board.of_all("left") is None and time.monotonic() - waits < 2 * POLL:
            time.sleep(HURRY)
        self._exit(end.code)

    def _hang(self, found: list[Look]) -> End:
        """The end of a run that does not move, or whose ranks cannot reach each other."""
        stacks = f"; the stacks of all threads are in {self.status.run}/stacks-rank*.txt"
        writer = next(rank for rank, look in enumerate(found) if look.alive)
        reason = blame(found, self.watchdog.limit) + stacks
        return End(self.board.rank, writer, "failed", reason, INTERNAL, hangs=True)

    def _store_is_gone(self) -> None:
        """The process that keeps the board ended: so does this one, unless its main thread is about to."""
        if self._over.wait(GRACE):
            return
        end = self._without_store()
        dump_stacks(self.status.run / f"stacks-rank{self.board.rank}.txt")
        if self.board.rank == end.writer:
            self._write(end)
        say(f"mim: {end.reason}")
        self._exit(end.code)

    def _without_store(self) -> End:
        """The end of a rank that can tell the others nothing."""
        reason = "the store of the launch, which rank 0 or its launcher keeps, has ended or does not answer"
        return End(self.board.rank, min(self.board.rank, 1), "failed", reason, INTERNAL)

    def _write(self, end: End) -> None:
        """Write status.json; the newest save may be one that the loop has not asked about yet."""
        step = max(self.status.step, saved_step(self.status.run))
        self.status.write(end.state, step, reason=end.reason, code=end.code)

    def _exit(self, code: int) -> None:
        sys.stderr.flush()
        os._exit(code)
