"""Group B: any number of ranks and workers, any start, shards that do not divide."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import Fixture, Row, fixture
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, Verdict, ended, joined, same_rows

WORLDS = (*range(1, 17), 24)
GATHERED = (1, 2, 3, 4)  # worlds of real processes


def global_batches(results: list[Result], batch_size: int, position: int = 0) -> list[list[Row]]:
    """The global batches of all ranks, rows in the order of their positions (position p is read by rank p % world)."""
    world, streams = len(results), [iter(result.rows) for result in results]
    steps = len(results[0].batches)
    starts = range(position, position + steps * batch_size, batch_size)
    return [[next(streams[p % world]) for p in range(start, start + batch_size)] for start in starts]


def order_is_pure(bench: Bench, reader: str) -> Verdict:
    """B1: every world and every start give the same global batches; an epoch holds every sample once.

    The usual recipe has no order that could be pure; it is asked for every sample once per epoch.
    """
    batch, verdicts = 24, []
    if reader != OURS:
        for world in GATHERED:
            results = bench.read(reader, bench.whole.path, world=world, batch_size=batch)
            verdicts.append(_named(ended(results) or _once(results, bench.whole), f"{world} ranks"))
        return joined(verdicts)
    straight = bench.read(reader, bench.whole.path, batch_size=batch, num_steps=20)
    if fault := ended(straight):
        return fault
    wanted = straight[0].batches
    for epoch in (0, 1):
        verdicts.append(
            same_rows([row for rows in wanted[10 * epoch : 10 * epoch + 10] for row in rows], bench.whole.rows)
        )
    fired(wanted[:10] != wanted[10:], "two epochs came in the same order")
    starts = random.Random(0)
    for world in WORLDS:
        start = starts.randrange(18)
        options = {"batch_size": batch, "num_steps": 3, "position": start * batch}
        results = bench.read(OURS, bench.whole.path, as_world=world, as_ranks=list(range(world)), **options)
        fault = ended(results)
        found = [] if fault else global_batches(_by_rank(results[0], world), batch, start * batch)
        same = found == wanted[start : start + 3]
        verdicts.append(fault or Verdict(PASS if same else SILENT, f"{world} ranks from step {start}"))
    return joined(verdicts)


def _by_rank(result: Result, world: int) -> list[Result]:
    """Take apart what one process read for all ranks."""
    pairs = list(zip(result.batches, result.facts, strict=True))
    return [Result(batches=[rows for rows, facts in pairs if facts["rank"] == rank]) for rank in range(world)]


def tensors_are_the_same(bench: Bench, reader: str) -> Verdict:
    """B2: pixels after augmentation, and masks, for worlds of 1 to 4 processes with 0, 1 and 3 workers."""
    batch, wanted, verdicts = 20, None, []
    for world in GATHERED:
        for workers in (0, 1, 3):
            options = {"batch_size": batch, "num_steps": 6, "workers": workers, "augmented": True, "limit": 60}
            results = bench.read(reader, bench.whole.path, world=world, **options)
            if fault := ended(results):
                verdicts.append(_named(fault, f"{world} ranks, {workers} workers"))
                continue
            if reader == OURS:
                found = global_batches(results, batch)
            else:  # its ranks take slices of a batch that none of them names: any order of the rows is taken
                found = [
                    sorted(itertools.chain(*rows)) for rows in zip(*(result.batches for result in results), strict=True)
                ]
            wanted = wanted if wanted is not None else found
            differing = sum(a != b for a, b in zip(found, wanted, strict=True)) if len(found) == len(wanted) else -1
            where = f"{differing} of {len(wanted)} batches differ ({world} ranks, {workers} workers)"
            verdicts.append(Verdict(SILENT, where) if differing else Verdict(PASS))
    return joined(verdicts)


def few_shards(bench: Bench, reader: str) -> Verdict:
    """B7: one shard on 4 ranks with 2 workers, 3 shards, a number of samples that nothing divides."""
    verdicts = []
    for num, shard_size, world, workers in ((61, 61, 4, 2), (61, 24, 2, 2), (61, 24, 4, 0)):
        found = fixture(bench.scratch(), num, shard_size=shard_size, first=2000)
        fired(len(found.tars) in (1, 3), f"{len(found.tars)} shards were made")
        steps = {"num_steps": 61} if reader == OURS else {}  # 61 batches of 8 are 8 epochs
        results = bench.read(reader, found.path, world=world, workers=workers, batch_size=8, limit=60, **steps)
        where = f"{len(found.tars)} shards, {world} ranks, {workers} workers"
        if reader == OURS and not ended(results):
            verdicts.append(_named(_eight_times(results, found), where))
        else:
            verdicts.append(_named(ended(results) or _once(results, found), where))
    return joined(verdicts)


def _once(results: list[Result], found: Fixture) -> Verdict:
    """Every sample once, and as many steps on all ranks."""
    steps = {len(result.batches) for result in results}
    if len(steps) > 1:
        return Verdict(SILENT, f"ranks made {min(steps)} to {max(steps)} steps")
    return same_rows([row for result in results for row in result.rows], found.rows)


def _eight_times(results: list[Result], found: Fixture) -> Verdict:
    """Eight epochs, each with every sample once, and as many steps on all ranks."""
    rows = [row for batch in global_batches(results, 8) for row in batch]
    fired(len(rows) == 8 * len(found.rows), f"{len(rows)} samples are not eight epochs of {len(found.rows)}")
    epochs = [rows[i : i + len(found.rows)] for i in range(0, len(rows), len(found.rows))]
    bad = sum(Counter(epoch) != Counter(found.rows) for epoch in epochs)
    return Verdict(SILENT, f"{bad} of 8 epochs are not every sample once") if bad else Verdict(PASS, "8 exact epochs")


def _named(verdict: Verdict, where: str) -> Verdict:
    return Verdict(verdict.kind, f"{verdict.detail} ({where})")


CASES = (
    Case("B1", "order of 17 worlds from random starts", order_is_pure),
    Case("B2", "pixels and masks, 1 to 4 ranks x 0, 1, 3 workers", tensors_are_the_same),
    Case("B7", "one shard on 4 ranks, 3 shards, 61 samples", few_shards),
)
