"""Where the time of the loader goes, and what to do when the training waits for it.

A batch carries the seconds that its worker spent in each stage. So the loop knows, without measuring anything again,
how many images a worker makes, how many the model could take, and what bounds the difference.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Mapping

STAGES = ("read", "decode", "augment", "collate")  # of a worker, in their order
WINDOW = 50  # steps
MAX_WAIT = 0.1  # share of the time that the loop may stand waiting for data
REMEDIES = {
    "read": "reading bounds a worker: put the shards on a local disk, or make fewer and larger ones",
    "decode": "decoding bounds a worker: make the shards with pre-resized images, or draw each decoded image more "
    "often (data.repeats)",
    "augment": "cropping, resizing and masking bound a worker: a simpler data.view, or pre-resized images, whose "
    "crops are smaller",
    "collate": "copying into the batch bounds a worker: fewer or smaller views",
}


class Clock:
    """Seconds per stage; a stage lasts from the end of the one before it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._since = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now


def allowed_cpus() -> int:
    """CPUs that this process may use, shared among the ranks of its node."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def bound_by(seconds: Mapping[str, float]) -> str:
    """The stage that takes a worker the longest."""
    return max(STAGES, key=lambda stage: seconds[stage])


def shares(seconds: Mapping[str, float]) -> str:
    """`read 3 %, decode 71 %, ...` of a worker's time."""
    total = max(sum(seconds[stage] for stage in STAGES), 1e-12)
    return ", ".join(f"{stage} {100 * seconds[stage] / total:.0f} %" for stage in STAGES)


def advise_workers(workers: int, cpus: int) -> str:
    """What the number of workers has to do with it."""
    if workers < cpus:
        place = "the main process renders between steps" if workers == 0 else f"{workers} of {cpus} allowed CPUs render"
        return f"{place}: set train.workers={cpus}"
    return f"{workers} workers have {cpus} allowed CPUs: more workers cannot help, more CPUs can"


class Waiting:
    """Notices when the loop keeps waiting for data, and says once why."""

    def __init__(self, workers: int):
        self.workers = workers
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (waited, elapsed) in seconds
        self._seconds: Counter[str] = Counter()
        self._images = 0
        self._waited, self._since = 0.0, 0.0  # of the open step
        self._quiet = False

    def batch(self, waited: float, seconds: Mapping[str, float], num_images: int) -> None:
        """Note a micro-batch: how long the loop stood waiting for it, and its worker's seconds per stage."""
        self._waited += waited
        self._seconds.update(seconds)
        self._images += num_images

    def step(self, now: float) -> list[str]:
        """End a step at a time of `time.perf_counter`; return the lines to say, once and if there is reason to."""
        if self._since:  # the first step waits for the workers to start
            self._steps.append((self._waited, now - self._since))
        self._waited, self._since = 0.0, now
        if self._quiet or len(self._steps) < WINDOW:
            return []
        waited, elapsed = (sum(values) for values in zip(*self._steps, strict=True))
        if waited <= MAX_WAIT * elapsed:
            return []
        self._quiet = True
        per_worker = self._images / max(sum(self._seconds.values()), 1e-12)
        cpus = allowed_cpus()
        return [
            f"data: the loop waited {100 * waited / elapsed:.0f} % of the last {WINDOW} steps. A worker makes "
            f"{per_worker:.0f} images/s ({shares(self._seconds)}), {max(self.workers, 1)} of them at most "
            f"{per_worker * min(max(self.workers, 1), cpus):.0f}.",
            f"data: {advise_workers(self.workers, cpus)}; {REMEDIES[bound_by(self._seconds)]}. "
            f"`mim bench data` with the recipe and options of this command measures what it brings.",
        ]
