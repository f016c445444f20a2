"""How a run ends before its last step: signals and the exit codes that tell a launch script what to do."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from mim.log import say

DONE, STOPPED = 0, 75  # exit codes
ONE_SIGNAL = 2.0  # seconds within which signals to stop are the same one, sent to the process and to its group
Stop = Callable[[int], bool]


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a request to save and stop; a later second one acts at once.

    `timeout` sends its signal to the process and then to the group, so the same one comes twice.
    """
    received: list[float] = []  # when, in seconds
    previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(number: int, _frame: Any) -> None:
        if not received:
            say(f"{signal.Signals(number).name}: saving at the next step, then stopping; send it again to stop at once")
        received.append(time.monotonic())
        if received[-1] - received[0] > ONE_SIGNAL:
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield lambda _step: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
