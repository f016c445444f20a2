"""Loader workers and signals: a worker ends when its main process says so or is gone, and not before.

Torch's workers end by any SIGTERM, also by one that was meant for the whole process group; the main process then dies
of the lost worker instead of saving. And one that waits to hand over a batch outlives a killed main process while a
sibling holds the pipe open.
"""

from __future__ import annotations

import os
import signal
import threading

PARENT_CHECK = 1.0  # seconds between a worker's looks whether its parent still lives


def stay_until_told(_worker: int) -> None:
    """Let a worker go on when a signal to stop reaches the whole process group: the main process needs it to save.

    Ctrl-C in a terminal sends SIGINT to the group; `timeout`, scancel and some launchers send SIGTERM to it.
    """
    signal.set_wakeup_fd(-1)  # the main process's pipe, inherited: it would take the worker's signals for its own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in this thread and all that it starts
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK)
        if received is not None and received.si_pid == parent:
            os._exit(0)  # as torch's own handler does
    os._exit(1)
