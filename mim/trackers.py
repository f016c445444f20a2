"""Trackers: TensorBoard, W&B, Trackio and MLflow as sinks of the run log, each through Accelerate's own class for it.

log.jsonl is the truth and trackers follow it: a tracker is told every number and picture of the lines that it has not
been told, also those from before it was switched on. How far it has come stands in RUN/trackers/NAME.json, so it goes
on where it was after a resume, and no value is told twice. TensorBoard can take back what comes after the resumed step
(`purge_step`); the others cannot, and keep what they were told first: a resume repeats the same values.

Each lives in a thread of its own on the main rank: one that is slow, hangs or fails costs the run a line on standard
error, never a step. What failed is tried again with every further line of the log, and at the next start of the run.

Deliberately not `Accelerator(log_with=...)`: that drops a missing package without a word, and a tracker that raises or
hangs ends the training or holds it up.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mim.config import ConfigError
from mim.data.location import redact
from mim.log import RunLog, say, write_json
from mim.tracker_kinds import KINDS, OFFLINE, Place, plainly

LEFT = "left-tracker-"  # begins the name of a thread that hangs in its tracker
PATIENCE = 10.0  # seconds that a run waits for all its trackers together, at its start and at its end
SILENT = ("event", "step", "eval", "position")  # of a line: what is no value


class Item(NamedTuple):
    """What a tracker is told in one call: numbers by name, or the file of one picture."""

    at: tuple[float, float]  # step, and which item of this step it is
    numbers: dict[str, float]
    picture: tuple[str, Path] | None = None  # name, file


def check_installed(names: list[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before a run begins."""
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"train.trackers names {name!r}, which is unknown; choose from {', '.join(KINDS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers names {name}, which is not installed; run: pip install {name}")


class Trackers:
    """The trackers of a run (main rank alone). They follow its log from the first line on until it is closed."""

    def __init__(self, run: Path, names: list[str], sections: dict[str, Any], log: RunLog, *, ended: bool) -> None:
        """`ended`: the run has no step left, so that only what is missing is told, if anything is."""
        self._last = (-1, 0)
        self._pictures = run / "pictures"
        folder = run / "trackers"
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._sinks = [
            Sink(name, Place(folder, run.absolute().name, _read(folder, name), plainly(sections), log.cut_at))
            for name in dict.fromkeys(names)
        ]
        for entry in log.entries() if names else ():  # what a tracker has not been told before
            self.tell(entry)
        if names:
            log.followers.append(self)
            atexit.register(self.close)  # an error that ends the run must not cost its last lines
        deadline = time.monotonic() + PATIENCE
        for sink in self._sinks if not ended else ():
            sink.open(deadline)

    def tell(self, entry: dict[str, Any]) -> None:
        """Hand a line of the log to all trackers; returns at once."""
        for item in self._items(entry):
            for sink in self._sinks:
                sink.put(item)

    def close(self) -> None:
        """Let the trackers tell what is left and finish; those that take too long are left alone."""
        atexit.unregister(self.close)
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.end()
        deadline = time.monotonic() + PATIENCE
        for sink in sinks:
            sink.wait(deadline)

    def _items(self, entry: dict[str, Any]) -> Iterator[Item]:
        """Numbers and pictures of a line; lines that tell of anything else than training and evaluation hold none."""
        if entry["event"] not in ("train", "eval"):
            return
        prefix = f"{entry['eval']}/" if entry["event"] == "eval" else ""
        values = {f"{prefix}{key}": value for key, value in entry.items() if key not in SILENT}
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if numbers:
            yield Item(self._next(entry["step"]), numbers)
        for name, value in values.items():
            if isinstance(value, str) and value.endswith(".png"):
                yield Item(self._next(entry["step"]), {}, (name, self._pictures / Path(value).name))

    def _next(self, step: int) -> tuple[int, int]:
        self._last = (step, self._last[1] + 1 if step == self._last[0] else 0)
        return self._last


class Sink:
    """One tracker and the thread in which it works."""

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place, self.kind = name, place, KINDS[name]
        told = tuple(place.state.get("told", (-1, 0)))
        self._told = min(told, (place.cut_at, math.inf)) if self.kind.takes_back else told
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._waiting: deque[Item] = deque()
        self._opened, self._ending = threading.Event(), False
        self._tracker: Any = None
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        if item.at > self._told:
            self._queue.put(item)

    def open(self, deadline: float) -> None:
        """Open the tracker before the first step: a library that draws from python's generator does it here."""
        self._queue.put(None)
        if not self._opened.wait(max(deadline - time.monotonic(), 0)):
            say(f"tracker {self.name} takes more than {PATIENCE:.0f} s to open; the run begins without it")

    def end(self) -> None:
        self._ending = True
        self._queue.put(None)

    def wait(self, deadline: float) -> None:
        """Wait for the end of the work, and say what is not done by then."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._thread.name = f"{LEFT}{self.name}"  # the program does not wait for it either (mim/__main__.py)
        if self._thread.is_alive() or self._waiting:
            say(f"tracker {self.name} has not been told all of the log (log.jsonl has everything)")

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is not None:
                self._waiting.append(item)
            if item is not None or self._waiting or not self._ending:
                self._try(self._tell_waiting)
            self._opened.set()
            if self._ending and self._queue.empty():
                break
        if self._tracker is not None:
            self._try(self._tracker.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a foreign library raises, the run goes on
            if not self._failed:
                text = " ".join(redact(word) for word in str(error).split())[:200]
                say(
                    f"tracker {self.name} failed ({type(error).__name__}: {text}); the run goes on, log.jsonl "
                    f"has everything, and it is tried again with every further line"
                )
            self._failed = True

    def _tell_waiting(self) -> None:
        """Open the tracker if it is not, and tell it what waits, in order; what fails stays first in the queue."""
        if self._tracker is None:
            for key, value in OFFLINE.get(self.name, {}).items():
                os.environ.setdefault(key, value)
            self._tracker = self.kind.open(self.place)
            self._note()
        while self._waiting:
            item = self._waiting[0]
            self.place.state["told"] = item.at
            self._note()  # before it is told: after a kill between the two a value is missing, never there twice
            if item.picture is None:
                self._tracker.log(item.numbers, step=item.at[0])
            elif item.picture[1].is_file():
                self.kind.show(self._tracker, *item.picture, int(item.at[0]))
            self._waiting.popleft()
        if self._failed:
            say(f"tracker {self.name} works again and has been told what it missed")
            self._failed = False

    def _note(self) -> None:
        write_json(self.place.folder / f"{self.name}.json", self.place.state)


def _read(folder: Path, name: str) -> dict[str, Any]:
    """What the tracker's file says; an unreadable one begins a new run of that tracker."""
    try:
        state = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
