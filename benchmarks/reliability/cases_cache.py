"""Group D, continued: a cache of downloads that is damaged, shared, swept, too small, or on a disk that is full."""

from __future__ import annotations

import threading
from pathlib import Path

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import Fixture, fixture
from benchmarks.reliability.serving import pair, pointed, put, read_urls, serving
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, SKIPPED, Verdict, delivered, ended, joined, refused
from tests.fault_server import FaultServer, stall

SWEEP = 0.15  # seconds between two sweeps of a cache
SMALL_DISK = 48 << 10  # bytes, about half a shard


def shared_cache(bench: Bench, reader: str) -> Verdict:
    """D6: two hosts with one base name, cut and altered files, a kill in a download, four processes at once; files
    that are removed under a reader, by another program and by the cache's own limit; a full disk."""
    checks = {
        "two hosts, one base name": _one_name,
        "a cut, and an altered file in the cache": _poisoned,
        "a kill during the download": _killed,
        "four processes at once": _four_at_once,
        "files removed under the reader": _swept,
        "a disk that is full": _full_disk,
        "a disk that becomes full": _filling_disk,
    }
    if reader == OURS:  # the cache of WebDataset looks at its limit every 30 s
        checks["two readers, a limit of 60 %"] = _evicted
    return joined(check(bench, reader).of(name) for name, check in checks.items())


def _one_name(bench: Bench, reader: str) -> Verdict:
    first, second = (fixture(bench.scratch(), 12, shard_size=12, first=at) for at in (8100, 8200))
    cache, name = bench.scratch(), first.tars[0].name
    with FaultServer() as server:
        put(server, first, "/a")
        put(server, second, "/b")
        one = read_urls(bench, reader, first, [server.url(f"/a/{name}")], cache=cache)
        two = read_urls(bench, reader, second, [server.url(f"/b/{name}", host="localhost")], cache=cache)
    return ended(one) or delivered(two, second.rows)


def _poisoned(bench: Bench, reader: str) -> Verdict:
    found, verdicts = pair(bench), []
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:30_000] + bytes(100) + data[30_100:]):
        cache = bench.scratch()
        with serving(found) as server:
            urls = put(server, found)
            if fault := ended(read_urls(bench, reader, found, urls, cache=cache)):
                return fault
            files = kept(cache)
            fired(files, "the cache is empty")
            for file in files:
                file.write_bytes(damage(file.read_bytes()))
            verdicts.append(delivered(read_urls(bench, reader, found, urls, cache=cache), found.rows))
    return joined(verdicts)


def kept(cache: Path) -> list[Path]:
    """The shards in a cache."""
    return [file for file in cache.rglob("*") if file.stat().st_size > 10_000]


def _killed(bench: Bench, reader: str) -> Verdict:
    found, cache = pair(bench), bench.scratch()
    with serving(found) as server:
        path, urls = f"/{found.tars[0].name}", put(server, found)
        server.put(path, found.tars[0].read_bytes(), faults=[stall(30_000)])
        killed = read_urls(bench, reader, found, urls, cache=cache, limit=3.0)
        fired(killed[0].hung and server.fired[path], "the reader was not killed in its download")
        return delivered(read_urls(bench, reader, found, urls, cache=cache), found.rows)


def _four_at_once(bench: Bench, reader: str) -> Verdict:
    found, cache = pair(bench), bench.scratch()
    with serving(found) as server:
        server.bandwidth = 200_000  # bytes/s: long enough for all four to come
        urls = put(server, found)
        results = read_urls(bench, reader, found, urls, cache=cache, processes=4)
        sent = _times_sent(server, found)
    verdict = ended(results) or joined(delivered([result], found.rows) for result in results)
    if verdict.kind == PASS and sent > 1.5:
        return Verdict(SILENT, f"every byte was downloaded {sent:.1f} times")
    return Verdict(verdict.kind, f"{verdict.detail}; every byte was downloaded {sent:.1f} times")


def _times_sent(server: FaultServer, found: Fixture) -> float:
    return sum(server.sent.values()) / sum(tar.stat().st_size for tar in found.tars)


def many(bench: Bench) -> Fixture:
    """24 shards, 48 samples: more than readers keep open."""
    return fixture(bench.scratch(), 48, shard_size=2, first=8300)


def _swept(bench: Bench, reader: str) -> Verdict:
    """As a cluster's cleaner does: every file goes, whoever reads it."""
    found, cache, removed, done = many(bench), bench.scratch(), [], threading.Event()

    def sweep() -> None:
        while not done.wait(SWEEP):
            for file in cache.rglob("*.tar"):
                file.unlink(missing_ok=True)
                removed.append(file)

    sweeper = threading.Thread(target=sweep)
    with serving(found) as server:
        server.bandwidth = 400_000  # bytes/s: long enough for some sweeps
        sweeper.start()
        try:
            results = read_urls(bench, reader, found, put(server, found), cache=cache, batch_size=4)
        finally:
            done.set()
            sweeper.join()
        fired(len(removed) > 1, f"{len(removed)} files were removed from the cache")
    return delivered(results, found.rows)


def _evicted(bench: Bench, reader: str) -> Verdict:
    found, cache = many(bench), bench.scratch()
    limit = round(0.6 * sum(tar.stat().st_size for tar in found.tars))  # two readers hold and fetch up to half of them
    with serving(found) as server:
        place = pointed(bench, reader, found, put(server, found), cache=cache, cache_limit=limit)
        each = [place | {"seed": 0}, place | {"seed": 1}]  # each goes its own way through the shards
        results = bench.trials.run(reader, each=each, batch_size=4)
        if fault := ended(results):
            return fault
        fired(_times_sent(server, found) > 1.2, "nothing was removed and fetched again")
    held = sum(file.stat().st_size for file in kept(cache))
    if held > limit:
        return Verdict(SILENT, f"the cache holds {held} bytes and may {limit}")
    return joined(delivered([result], found.rows) for result in results)


def _full_disk(bench: Bench, reader: str) -> Verdict:
    cache = bench.scratch()
    cache.mkdir(mode=0o700)
    return _without_room(bench, reader, cache, disk=[str(cache), SMALL_DISK])


def _filling_disk(bench: Bench, reader: str) -> Verdict:
    return _without_room(bench, reader, bench.scratch(), file_limit=SMALL_DISK)


def _without_room(bench: Bench, reader: str, cache: Path, **disk: object) -> Verdict:
    """An error that names the place; and with room again, the right bytes."""
    found = pair(bench)
    with serving(found) as server:
        urls = put(server, found)
        results = read_urls(bench, reader, found, urls, cache=cache, **disk)
        if no_disk := _events(results, "no disk"):
            return Verdict(SKIPPED, f"no file system may be mounted here ({no_disk[0]})")
        fired(_events(results, "disk") or _events(results, "file limit"), "the disk was large enough")
        fired(_events(results, "disk") or sum(server.sent.values()) > SMALL_DISK, "no shard was on its way")
        verdict = refused(results, str(cache))
        return verdict if verdict.kind != PASS else _with_room(bench, reader, found, urls, cache, verdict)


def _events(results: list[Result], name: str) -> list[str]:
    return [event[1] for result in results for event in result.events if event[0] == name]


def _with_room(bench: Bench, reader: str, found: Fixture, urls: list[str], cache: Path, before: Verdict) -> Verdict:
    after = delivered(read_urls(bench, reader, found, urls, cache=cache), found.rows)
    return before if after.kind == PASS else after.of("with room again")


CASES = (Case("D6", "cache: names, damage, kill, sharing, eviction, full disk", shared_cache),)
