"""What a run tells: the run log (log.jsonl), the progress line, averages kept on the device, and status.json.

log.jsonl is the truth: one JSON object a line, each with `step` and `event`; a resume cuts it back to the resumed step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mim.interruption import between_batches

_heard = True  # whether this process says anything


def say(message: str, *, main: bool = True) -> None:
    """Print one line for people, on standard error, above any progress bar."""
    if main and _heard:
        tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def heard(main: bool) -> Iterator[None]:
    """Let only the main rank say anything while all ranks run the block."""
    global _heard
    before, _heard = _heard, main
    try:
        yield
    finally:
        _heard = before


@contextlib.contextmanager
def aside(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes its name when it is whole: a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open(mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside, then rename it."""
    with aside(path) as file:
        json.dump(value, file, indent=1)
        file.write("\n")


class Follower(Protocol):
    """Whatever is told every line of a run log."""

    def tell(self, entry: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Append-only JSON lines; opened at a step, it drops the lines that come after it.

    again: evaluations of that step that are to be repeated; their lines are dropped, too.

    Lines of a rollback (its number is `rollback`) lie at the step that it returned to: those beyond the `rollbacks`
    that the state of that step knows are of an attempt that ended before it saved anything, and dropped too.

    The cut is one rename: a kill at any moment leaves the old log or the cut one, and the next start cuts again.
    """

    def __init__(self, path: Path, step: int, *, again: Collection[str] = (), rollbacks: int = 0) -> None:
        self.path, self.cut_at = path, step
        self.followers: list[Follower] = []

        def stays(entry: dict[str, Any]) -> bool:
            repeated = entry["step"] == step and entry.get("eval") in again
            return entry["step"] <= step and not repeated and entry.get("rollback", 0) <= rollbacks

        kept = [line for line, entry in _whole_lines(path) if stays(entry)]
        with aside(path) as file:
            file.writelines(f"{line}\n" for line in kept)
        self._file = path.open("ab", buffering=0)
        self._pending = b""  # what a full disk did not take yet

    def write(self, event: str, step: int, **values: Any) -> None:
        """Add a line. On a full disk it waits for the next one: training does not end for want of a line."""
        entry = {"event": event, "step": step, **values}
        full = bool(self._pending)
        self._pending += (json.dumps(entry) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not full:
                say(f"{self._file.name} takes no more lines: {error.strerror}; they wait until there is space")
        for follower in self.followers:
            follower.tell(entry)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines that it holds now."""
        return read_log(self.path)

    def close(self) -> None:
        self._file.close()
        for follower in self.followers:
            follower.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a run log, up to its end or to a line that a kill or a power cut tore."""
    return (entry for _, entry in _whole_lines(path))


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            entry["step"] + 0, entry["event"]
        except (ValueError, TypeError, KeyError):
            return  # everything after a torn line is of the same moment
        yield line, entry


class Averages:
    """Weighted means of an objective's outputs, summed on the device and read once per log step.

    The sums of all ranks go into the checkpoint, so an interrupted interval logs what an uninterrupted one would have.
    """

    def __init__(self, state: dict[str, float] | None = None) -> None:
        self._saved = dict(state or {})  # sums of the open interval before a resume, kept on one rank
        self._sums: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}  # sums of the micro-batches of a step that has not ended
        self._last: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Add a micro-batch's outputs: (B,) tensors are summed with the weights (B,), 0-d ones replace the last."""
        for name, value in values.items():
            if value.ndim == 0:
                self._last[name] = value.detach()
            else:
                self._add_to(self._open, name, (value.detach().double() * weight).sum())
        self._add_to(self._open, "images", weight.double().sum())

    def add_step(self, values: dict[str, Tensor], ranks: int, *, finite: Tensor | None = None) -> None:
        """End an optimizer step, of whose 0-d values every rank knows.

        The micro-batches of a step that was not `finite` (0-d bool) and so was skipped are left out of the means.
        """
        for name, value in self._open.items():
            self._count(name, value if finite is None else value.masked_fill(~finite, 0.0))
        self._open = {}
        for name, value in values.items():
            self._count(f"step/{name}", value.double() / ranks)
        self._count("step/count", torch.full((), 1.0 / ranks, dtype=torch.float64, device=value.device))

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The sums of all ranks since the last log step; `reduce` adds a tensor over ranks. One host sync."""
        if not self._sums:
            return dict(self._saved)
        names = sorted(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        return {**self._saved, **dict(zip(names, sums, strict=True))}

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means per image, and per step for what `add_step` added; starts a new interval.

        There are none per image when every step of the interval was skipped.
        """
        sums = self.state(reduce)
        images, steps = sums.pop("images") or 1.0, sums.pop("step/count")  # an interval may lack labelled images
        if sums.get("step/skipped") == steps:
            sums = {name: value for name, value in sums.items() if name.startswith("step/")}
        means = {k.removeprefix("step/"): v / (steps if k.startswith("step/") else images) for k, v in sums.items()}
        means |= {name: value.item() for name, value in self._last.items()}
        self._saved, self._sums, self._last = {}, {}, {}
        return dict(sorted(means.items(), key=lambda item: item[0] != "loss"))  # the loss first

    def _count(self, name: str, value: Tensor) -> None:
        self._add_to(self._sums, name, value if name in self._sums else value + self._saved.pop(name, 0.0))

    @staticmethod
    def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value


class Progress:
    """Throughput, data-wait share and time left, as a bar on a terminal and as plain lines elsewhere."""

    def __init__(self, start: int, total: int, *, batch_size: int, main: bool) -> None:
        self.total, self.batch_size, self.main = total, batch_size, main
        self.start, self.began = start, time.perf_counter()
        self._since, self._since_step, self._waited = self.began, start, 0.0
        on_terminal = main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not on_terminal, dynamic_ncols=True)

    def waited(self, seconds: float) -> None:
        """Count time that the loop stood waiting for data."""
        self._waited += seconds

    def looked(self, seconds: float) -> None:
        """Leave the time of evaluations out of the rates of training."""
        self._since += seconds

    def advance(self) -> None:
        self.bar.update()

    def rates(self, step: int) -> dict[str, float]:
        """Images/s and the share of time spent waiting for data since the last call, and seconds left."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        values = {
            "images_per_s": round((step - self._since_step) * self.batch_size / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
            "eta_s": round((self.total - step) * (now - self.began) / max(step - self.start, 1), 1),
        }
        self._since, self._since_step, self._waited = now, step, 0.0
        return values

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Show the values of a log step."""
        if not self.main:
            return
        hidden = ("eta_s", "fingerprint", "position", "epoch", "weight_decay")
        shown = {k: v for k, v in values.items() if k not in hidden}
        text = "  ".join(f"{name} {_short(name, value)}" for name, value in shown.items() if value or name == "loss")
        if self.bar.disable:
            say(f"step {step}/{self.total}  {text}  left {clock(values['eta_s'])}")
        else:
            self.bar.set_postfix_str(text, refresh=True)

    def close(self) -> None:
        self.bar.close()


class Pace:
    """A line now and then about work that takes long: how much is done, how fast it goes, how long it will take."""

    EVERY = 15.0  # seconds

    def __init__(self, title: str, total: int, *, main: bool = True, unit: str = "images") -> None:
        self.title, self.total, self.main, self.unit = title, total, main, unit
        self.done = 0
        self.began = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count what was done."""
        between_batches()
        self.done = min(self.done + count, self.total)
        now = time.monotonic()
        if now - self._told < self.EVERY:
            return
        self._told = now
        rate = self.done / (now - self.began)
        left = clock((self.total - self.done) / rate)
        say(f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f} a second, left {left}", main=self.main)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(name: str, value: Any) -> str:
    if name == "data_wait":
        return f"{100 * value:.0f}%"
    if name == "images_per_s":
        return f"{value:.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
