"""How a run ends before its last step: signals, the end of its time, and one step for all ranks.

Only one rank may have got the signal, so ranks must agree on the step, and a collective for that in every step would
hold each host up for the slowest. Instead a thread of each rank (attendant.py) notes the step that its main thread
has begun; all finish the latest of these and stop there. Nothing is sent until someone asks to stop.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mim.config import ConfigError
from mim.interruption import Left
from mim.watch.board import Board
from mim.watch.status import DONE, STOPPED

__all__ = ["DONE", "STOPPED", "Deadline", "Stop", "Stopping", "deadline", "either", "seconds"]

Stop = Callable[[int], bool]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds


class Stopping:
    """Whether to stop after a step; asked after every step, it gives all ranks the same answer."""

    def __init__(self, board: Board, limit: timedelta = timedelta(minutes=30)) -> None:
        """`limit`: how long ranks wait for each other inside an evaluation."""
        self._board = board
        self._lock = threading.Lock()
        self._begun: int | None = None  # the step that the main thread will finish before it asks
        self._target: int | None = None
        self._round = 0  # of votes: a run that returns to an earlier step votes again
        self._voted, self._decided = False, threading.Event()
        self.stepped = False  # whether this process finished a step
        self.reason: str | None = None
        self._group: Any = dist.new_group(backend="gloo", timeout=limit) if board.world > 1 else None

    def begin(self, step: int) -> None:
        """The main thread of every rank begins this step: its first, or the first after a return to an earlier one."""
        with self._lock:
            self._begun, self._target, self._voted = step, None, False
            self._round += 1
            self._decided.clear()

    def __call__(self, step: int) -> bool:
        """True when all ranks stop after this step. A rank that comes early waits for the votes of the others."""
        self.stepped = True
        with self._lock:
            if not self._voted:
                self._begun = step + 1
                return False
        self._decided.wait()
        return self.now(step)

    def now(self, step: int) -> bool:
        """Whether it is known by now that all ranks stop after this step."""
        return self._target is not None and step >= self._target

    def meet(self, step: int) -> None:
        """Called by all ranks inside an evaluation after a step. Raises Left on all when one of them has to stop."""
        wanted = torch.tensor(int(self.now(step)))
        if self._group is not None:
            dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        if wanted:
            raise Left

    # ---- of the attending thread -------------------------------------------------------------------------------------

    def ask(self, reason: str) -> None:
        """Ask all ranks to stop; the first reason stands."""
        self._board.first("stop", reason)

    @property
    def voting(self) -> bool:
        return self._voted and not self._decided.is_set()

    def poll(self) -> None:
        """Look whether someone asks, vote, and count the votes."""
        if self._decided.is_set():
            return
        if self.reason is None:
            self.reason = self._board.get("stop")
        with self._lock:
            votes, step = f"last step/{self._round}", self._begun
            voting = self.reason is not None and step is not None and not self._voted
            self._voted = self._voted or voting
        if voting:
            self._board.put_mine(votes, str(step))
        if not self._voted or (steps := self._board.of_all(votes)) is None:
            return
        with self._lock:
            if votes == f"last step/{self._round}":
                self._target = max(map(int, steps))
                self._decided.set()


def either(asked: Stop | None, stopping: Stop) -> Stop:
    """Stop when one of two says so; both are asked."""
    return stopping if asked is None else lambda step: any([asked(step), stopping(step)])


# ---- time --------------------------------------------------------------------------------------------


@dataclass
class Deadline:
    """When a run has to stop, so that its last checkpoint is written before its job is killed."""

    at: float  # seconds since 1970
    reason: str

    @property
    def passed(self) -> bool:
        return time.time() >= self.at


def deadline(
    time_limit: str | None, stop_before: str, *, began: float, environment: Mapping[str, str] = os.environ
) -> Deadline | None:
    """`stop_before` of the earlier end of `time_limit` (from `began`, seconds since 1970) and of the Slurm job.

    Slurm tells its jobs their end as SLURM_JOB_END_TIME. None when there is no limit. Raises ConfigError.
    """
    before = seconds(stop_before, "train.stop_before")
    ends: list[tuple[float, str]] = []
    if time_limit is not None:
        limit = seconds(time_limit, "train.time_limit")
        if limit <= before:
            raise ConfigError(
                f"train.time_limit={time_limit} leaves no time to train before train.stop_before={stop_before}; "
                f"raise the limit, or stop later"
            )
        ends.append((began + limit, f"train.time_limit={time_limit}"))
    if (end := environment.get("SLURM_JOB_END_TIME", "")).isdigit():
        ends.append((float(end), "the Slurm job's limit"))
    if not ends:
        return None
    end_time, name = min(ends)
    return Deadline(end_time - before, f"{stop_before} before the end of {name}")


def seconds(duration: str, where: str) -> float:
    """Seconds of "90s", "5m", "1.5h", "2d" or "1h30m". Raises ConfigError that names `where`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", str(duration))
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != "".join(str(duration).split()):
        raise ConfigError(f"{where}={duration!r} is not a time; write e.g. '90s', '5m' or '1h30m'")
    return sum(float(number) * UNITS[unit] for number, unit in parts)
