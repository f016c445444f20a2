"""A run on several ranks that is watched and signalled from outside: forks, which begin at once, or torchrun.

A run is made slow or broken by settings: step, batch, save: seconds that a step, a batch of an evaluation and the
commit of a save take longer; hang, fail: (rank, step) that never ends, or ends in an error.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from mim import __main__
from mim.data import stream
from mim.objectives.mae import MAE
from mim.saving import save_stages

ROOT = Path(__file__).parent.parent


class Run:
    """What a launched run writes, and how to wait for it."""

    def __init__(self, run):
        self.run = Path(run)
        self.output = self.run.with_name(f"{self.run.name}.said")
        self.slow_place = self.run.with_name(f"{self.run.name}.slow")  # appears at a slow batch or save
        self.slow_place.unlink(missing_ok=True)

    @property
    def said(self):
        return self.output.read_text()

    @property
    def status(self):
        return json.loads((self.run / "status.json").read_text())

    def until(self, reached, seconds=90):
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def until_step(self, step):
        log = self.run / "log.jsonl"
        self.until(lambda: log.is_file() and f'"step": {step},' in log.read_text())


class Forked(Run):
    """`mim train` on ranks that are forks of this process, without a launcher: rank 0 keeps the store."""

    def __init__(self, recipe, run, *overrides, ranks=2, **slow):
        super().__init__(run)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["mim", "train", recipe, f"train.run={run}", "train.cpu=true", *overrides]
        context = multiprocessing.get_context("fork")
        self.ranks = []
        for rank in range(ranks):
            environment = {k: str(v) for k, v in {**found, "RANK": rank, "LOCAL_RANK": rank}.items()}
            self.ranks.append(context.Process(target=self._begin, args=(command, environment, slow)))
            self.ranks[-1].start()

    def _begin(self, command, environment, slow):
        file = self.output.open("a", buffering=1)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stderr = sys.__stderr__ = file
        os.environ.update(environment)
        for state in (PartialState, AcceleratorState, GradientState):
            state._reset_state()  # of a training in this process
        slow_down(int(environment["RANK"]), self.slow_place, **slow)
        sys.argv = command
        __main__.main()
        os._exit(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.ranks:
            process.kill()
            process.join()

    def send(self, rank, number):
        os.kill(self.ranks[rank].pid, number)

    def codes(self, seconds=90):
        """The exit codes of all ranks, once they ended."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.ranks]


class Torchrun(Run):
    """`torchrun -m mim train`."""

    def __init__(self, recipe, run, *overrides, ranks=2):
        super().__init__(run)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
                   "-m", "mim", "train", recipe, f"train.run={run}", "train.cpu=true", *overrides]  # fmt: skip
        with self.output.open("a") as file:
            settings = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=file, stderr=file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def slow_down(rank, marker, *, step=0.0, batch=None, save=None, hang=None, fail=None):
    """Change this process for ever."""
    forward, to_device = MAE.forward, stream.to_device
    steps = 0

    def slow_forward(self, batch, progress):
        nonlocal steps
        if self.training:
            steps += 1
            time.sleep(1e6 if (rank, steps) == hang else step)
            if (rank, steps) == fail:
                raise FloatingPointError("the sum is odd")
        return forward(self, batch, progress)

    def slow_to_device(images, device):
        if batch is not None and not torch.is_grad_enabled():
            marker.touch()
            time.sleep(batch)
        return to_device(images, device)

    def slow_save(stage):
        if save is not None and stage == "before-manifest":
            marker.touch()
            time.sleep(save)

    MAE.forward, stream.to_device, save_stages.reached = slow_forward, slow_to_device, slow_save
