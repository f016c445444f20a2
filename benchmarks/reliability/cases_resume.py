"""Group A: a run that stops in the middle of an epoch and goes on."""

from __future__ import annotations

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import Row
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, Verdict, ended, joined

BATCH = 24  # samples: ten steps an epoch
STEPS = 15  # of the uninterrupted run
SLACK = 0.05  # of the bytes of the dataset: batches differ in size


def resumed(bench: Bench, reader: str, done: int, workers: int, batch: int = BATCH) -> list[Result]:
    """Go on in a new process after `done` steps, as each reader's documentation says."""
    way = {"position": done * batch} if reader == OURS else {"resume": divmod(done, 10)}
    options = {"batch_size": batch, "num_steps": STEPS - done, "workers": workers}
    return bench.read(reader, bench.whole.path, **options, **way)


def same_stream(bench: Bench, reader: str) -> Verdict:
    """A2: the steps before a stop and those after it are those of an uninterrupted run."""
    verdicts = []
    for workers in (0, 2):
        straight = bench.read(reader, bench.whole.path, batch_size=BATCH, num_steps=STEPS, workers=workers)
        if fault := ended(straight):
            verdicts.append(fault)
            continue
        for done in (1, 4, 9, 10, 11):
            first = bench.read(reader, bench.whole.path, batch_size=BATCH, num_steps=done, workers=workers)
            rest = resumed(bench, reader, done, workers)
            if fault := ended(first + rest):
                verdicts.append(fault)
                continue
            fired(first[0].batches, "the first process was stopped before its first step")
            verdicts.append(_equal(straight[0].batches, first[0].batches + rest[0].batches, workers, done))
    return joined(verdicts)


def _equal(straight: list[list[Row]], pieces: list[list[Row]], workers: int, done: int) -> Verdict:
    differing = sum(a != b for a, b in zip(straight, pieces, strict=False)) + abs(len(straight) - len(pieces))
    where = f"stop after step {done}, {workers} workers"
    if differing:
        return Verdict(SILENT, f"{differing} of {len(straight)} steps differ ({where})")
    return Verdict(PASS, "")


def nothing_read_twice(bench: Bench, reader: str) -> Verdict:
    """A7: the first batch after 90 % of an epoch reads what the first of all does, counted by the kernel."""
    num_bytes = sum(tar.stat().st_size for tar in bench.whole.tars)
    way = {"position": 9 * BATCH} if reader == OURS else {"resume": (0, 9)}
    fresh = bench.read(reader, bench.whole.path, batch_size=BATCH, num_steps=1)
    rest = bench.read(reader, bench.whole.path, batch_size=BATCH, num_steps=1, **way)
    every = bench.read(reader, bench.whole.path, batch_size=BATCH, num_steps=10)
    if fault := ended(fresh + rest + every):
        return fault
    fired(every[0].read > 0.9 * num_bytes, f"the whole epoch counted only {every[0].read} of {num_bytes} bytes")
    more = (rest[0].read - fresh[0].read) / num_bytes
    return Verdict(PASS if more <= SLACK else SILENT, f"{more:.0%} of the bytes more than a fresh start")


CASES = (
    Case("A2", "stop in the middle of an epoch, go on", same_stream),
    Case("A7", "going on reads no sample twice", nothing_read_twice),
)
