"""Shards on a server that fails as it is told (`tests/fault_server.py`), and how each reader is pointed at them.

Ours reads a dataset folder whose lock names the URLs, the usual recipe the URLs themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, Bench, fired
from benchmarks.reliability.fixtures import Fixture, fixture
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, Verdict, delivered
from mim.data.shards import LOCK
from tests.fault_server import Fault, FaultServer

PATIENT = 45.0  # seconds for a trial in which a reader has to notice a silence
TOGETHER = 8  # readers at a time, where each waits more than it works


def pair(bench: Bench) -> Fixture:
    """2 shards, 24 samples; the first one gets the faults."""
    return fixture(bench.scratch(), 24, shard_size=12, first=8000)


@contextlib.contextmanager
def serving(found: Fixture) -> Iterator[FaultServer]:
    """A fault server that holds the shards of a fixture."""
    with FaultServer() as server:
        put(server, found)
        yield server


def put(server: FaultServer, found: Fixture, prefix: str = "") -> list[str]:
    """Serve the shards of a fixture; return their URLs."""
    return [server.put(f"{prefix}/{tar.name}", tar.read_bytes()) for tar in found.tars]


def pointed(
    bench: Bench, reader: str, found: Fixture, urls: Sequence[str], *, cache: Path | None = None, **store: Any
) -> dict[str, Any]:
    """Options of a trial that reads the shards of a fixture at their URLs.

    Ours always reads through a cache, an empty one unless one is given; the usual recipe where a cache is given.
    """
    if reader != OURS:
        if cache is not None:
            cache.mkdir(exist_ok=True)  # WebDataset wants it to exist
        return {"tars": list(urls), "store": {"cache_dir": str(cache)} if cache is not None else {}}
    copy = found.copy(bench.scratch())
    lock = json.loads((copy.path / LOCK).read_bytes())
    for entry, url in zip(lock["shards"], urls, strict=True):
        entry["url"] = url
    (copy.path / LOCK).write_text(json.dumps(lock))
    for tar in copy.tars:
        tar.unlink()
    return {"path": str(copy.path), "store": {"cache_dir": str(cache or bench.scratch()), **store}}


def read_urls(
    bench: Bench, reader: str, found: Fixture, urls: Sequence[str], *, cache: Path | None = None, **options: Any
) -> list[Result]:
    """Read the shards of a fixture at their URLs."""
    places = pointed(bench, reader, found, urls, cache=cache)
    return bench.trials.run(reader, **{"batch_size": 12, "limit": PATIENT} | places | options)


def read_despite(
    bench: Bench, reader: str, answers: Mapping[str, Sequence[Fault]], *, limit: float = PATIENT
) -> list[Verdict]:
    """Deliver everything although the first requests of the first shard are answered like this; several at a time.

    Ours must also keep its order.
    """
    found, verdicts = pair(bench), []
    path = found.tars[0].name
    straight = bench.read(reader, found.path, batch_size=12)[0]
    names = iter(answers)
    while pack := list(itertools.islice(names, TOGETHER)):
        with FaultServer() as server:
            each = []
            for number, name in enumerate(pack):
                urls = put(server, found, f"/{number}")
                server.put(f"/{number}/{path}", found.tars[0].read_bytes(), faults=answers[name])
                each.append(pointed(bench, reader, found, urls))
            results = bench.trials.run(reader, each=each, batch_size=12, limit=limit)
            for number, (name, result) in enumerate(zip(pack, results, strict=True)):
                fired(server.fired[f"/{number}/{path}"], f"{name} did not happen")
                verdict = delivered([result], found.rows)
                if reader == OURS and verdict.kind == PASS and result.batches != straight.batches:
                    verdict = Verdict(SILENT, "in another order")
                verdicts.append(verdict.of(name))
    return verdicts
