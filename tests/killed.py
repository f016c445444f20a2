"""A command that is killed, for real and from outside, as soon as it has come to a certain place."""

import os
import signal
import subprocess
import sys
import time


def kill_when(reached, *command):
    """Run `mim COMMAND` in a process of its own until `reached()`, then kill -9 it."""
    process = subprocess.Popen([sys.executable, "-m", "mim", *map(str, command)])
    deadline = time.monotonic() + 120
    try:
        while not reached():
            assert process.poll() is None, "the command ended before it came to that place"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
