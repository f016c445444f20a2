"""Group D: web servers and buckets that refuse, cut, stall, change what they hold, or share a cache.

The faults come from the server of the tests (`tests/fault_server.py`), which counts those that fired. Ours reads a
dataset folder whose lock names the URLs, the usual recipe the URLs themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import Fixture, fixture, member_starts
from benchmarks.reliability.trials import Result, free_port
from benchmarks.reliability.verdicts import PASS, SILENT, SKIPPED, Verdict, delivered, ended, joined, refused
from mim.data.shards import LOCK

NUM_CUTS = 20  # of each kind
PATIENT = 45.0  # seconds for a trial in which a reader has to notice a silence
PROMPT = 20.0  # seconds for a trial in which it is told at once that there is nothing


def needs_server(judge: Callable[[Bench, str, Any], Verdict]) -> Callable[[Bench, str], Verdict]:
    """Skip a case, saying so, where the fault server is not part of the checkout."""

    def judged(bench: Bench, reader: str) -> Verdict:
        try:
            faults = importlib.import_module("tests.fault_server")
        except ModuleNotFoundError as error:
            return Verdict(SKIPPED, f"{error}")
        return judge(bench, reader, faults)

    return judged


@contextlib.contextmanager
def serving(faults: Any, found: Fixture, prefix: str = "") -> Iterator[Any]:
    """A fault server that holds the shards of a fixture."""
    with faults.FaultServer() as server:
        for tar in found.tars:
            server.put(f"{prefix}/{tar.name}", tar.read_bytes())
        yield server


def pair(bench: Bench) -> Fixture:
    """2 shards, 24 samples; the first one gets the faults."""
    return fixture(bench.scratch(), 24, shard_size=12, first=8000)


def read_urls(bench: Bench, reader: str, found: Fixture, urls: Sequence[str], **options: Any) -> list[Result]:
    """Read the shards of a fixture at their URLs, ours through an empty cache unless one is given."""
    cache = options.pop("cache", None) or bench.scratch()
    options = {"batch_size": 12, "limit": PATIENT} | options
    if reader != OURS:
        cache.mkdir(exist_ok=True)  # WebDataset wants it to exist
        store = {"store": {"cache_dir": str(cache)}} if options.pop("cached", False) else {}
        return bench.trials.run(reader, tars=list(urls), **store, **options)
    options.pop("cached", None)
    path = at_urls(bench, found, urls)
    return bench.trials.run(reader, path=str(path), store={"cache_dir": str(cache)}, **options)


def at_urls(bench: Bench, found: Fixture, urls: Sequence[str]) -> Path:
    """The folder of a fixture without its tars, its lock naming the URLs."""
    copy = found.copy(bench.scratch())
    lock = json.loads((copy.path / LOCK).read_bytes())
    for entry, url in zip(lock["shards"], urls, strict=True):
        entry["url"] = url
    (copy.path / LOCK).write_text(json.dumps(lock))
    for tar in copy.tars:
        tar.unlink()
    return copy.path


def urls_of(server: Any, found: Fixture, prefix: str = "") -> list[str]:
    return [server.url(f"{prefix}/{tar.name}") for tar in found.tars]


@needs_server
def refusals(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D1: 404, 403, a name that does not resolve, a port at which nobody listens: refused by name, and soon."""
    found, verdicts = pair(bench), []
    for name in ("404", "403", "no such host", "refused"):
        with serving(faults, found) as server:
            urls = urls_of(server, found)
            if name.isdigit():
                server.put(f"/{found.tars[0].name}", b"", then=faults.status(int(name)))
            else:
                host = "nobody.invalid" if name == "no such host" else f"127.0.0.1:{free_port()}"
                urls[0] = f"http://{host}/{found.tars[0].name}"
            results = read_urls(bench, reader, found, urls, limit=PROMPT)
            fired(server.fired or not name.isdigit(), f"the server did not answer {name}")
        verdict = refused(results, found.tars[0].name)
        verdicts.append(Verdict(verdict.kind, f"{name}: {verdict.detail}"))
    return joined(verdicts)


@needs_server
def overload(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D2: 503 three times; 429 that asks for a second, and for an hour: delivered, the hour is not waited."""
    after = {seconds: faults.status(429, **{"Retry-After": str(seconds)}) for seconds in (1, 3600)}
    answers = {"503 x 3": [faults.status(503)] * 3, "429, 1 s": [after[1]], "429, 3600 s": [after[3600]]}
    return joined(_with_faults(bench, reader, faults, answers))


@needs_server
def silences(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D4: the server stalls in the body, sends 1 KB/s, or accepts and never answers: noticed, and asked again."""
    silent = faults.Fault("silent", silent=True)
    answers = {"stall": [faults.stall(30_000)], "1 KB/s": [faults.trickle(1024)], "never answers": [silent]}
    return joined(_with_faults(bench, reader, faults, answers, limit=2 * PATIENT if reader == OURS else PATIENT))


def _with_faults(
    bench: Bench, reader: str, faults: Any, answers: dict[str, list[Any]], **options: Any
) -> list[Verdict]:
    """Deliver everything although the first requests of the first shard are answered like this."""
    found, verdicts = pair(bench), []
    for name, planted in answers.items():
        with serving(faults, found) as server:
            path = f"/{found.tars[0].name}"
            server.put(path, found.tars[0].read_bytes(), faults=planted)
            results = read_urls(bench, reader, found, urls_of(server, found), **options)
            fired(server.fired[path], f"{name} did not happen")
        verdict = delivered(results, found.rows)
        verdicts.append(Verdict(verdict.kind, f"{name}: {verdict.detail}"))
    return verdicts


@needs_server
def cuts(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D3: the body ends at the border of a member, with and without its length, or by a reset: delivered."""
    found, generator = pair(bench), random.Random(3)
    starts = member_starts(found.tars[0])[1:-1]
    kinds = {"cut": {}, "cut, no length": {"length": False}, "reset": {"reset": True}}
    answers = {
        f"{name} at {at}": [faults.cut(at, **options)]
        for name, options in kinds.items()
        for at in generator.sample(starts, NUM_CUTS)
    }
    return joined(_with_faults(bench, reader, faults, answers))


@needs_server
def overwritten(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D5: the object is another one, from the start, or from the second request of a download on: refused by name."""
    found, other = pair(bench), fixture(bench.scratch(), 24, shard_size=12, first=8500)
    path, verdicts = f"/{found.tars[0].name}", []
    for when in ("before", "during"):
        with serving(faults, found) as server:
            swapped = other.tars[0].read_bytes()
            if when == "before":
                server.put(path, swapped, etag='"2"')
            else:
                server.put(path, found.tars[0].read_bytes(), faults=[faults.cut(30_000)])
                threading.Thread(target=_overwrite, args=(server, path, swapped), daemon=True).start()
            results = read_urls(bench, reader, found, urls_of(server, found))
            fired(server.count(path), "the object was not asked for")
            fired(when == "before" or server.fired[path], "the download was not cut")
        verdict = refused(results, found.tars[0].name)
        verdicts.append(Verdict(verdict.kind, f"{when} the download: {verdict.detail}"))
    return joined(verdicts)


def _overwrite(server: Any, path: str, content: bytes) -> None:
    while not server.fired[path] and not server.stopping.is_set():
        time.sleep(0.005)
    server.put(path, content, etag='"2"')


@needs_server
def shared_cache(bench: Bench, reader: str, faults: Any) -> Verdict:
    """D6: two hosts with one base name, cut and altered files, a kill in a download, four processes at once."""
    checks = (_one_name, _poisoned, _killed, _four_at_once)
    verdicts = {check.__doc__: check(bench, reader, faults) for check in checks}
    return joined(Verdict(verdict.kind, f"{name} {verdict.detail}") for name, verdict in verdicts.items())


def _one_name(bench: Bench, reader: str, faults: Any) -> Verdict:
    """Two hosts, one base name:"""
    first, second = (fixture(bench.scratch(), 12, shard_size=12, first=at) for at in (8100, 8200))
    cache, name = bench.scratch(), first.tars[0].name
    with serving(faults, first, "/a") as server:
        server.put(f"/b/{name}", second.tars[0].read_bytes())
        urls = [server.url(f"/a/{name}"), server.url(f"/b/{name}", host="localhost")]
        one = read_urls(bench, reader, first, urls[:1], cache=cache, cached=True)
        two = read_urls(bench, reader, second, urls[1:], cache=cache, cached=True)
    return ended(one) or delivered(two, second.rows)


def _poisoned(bench: Bench, reader: str, faults: Any) -> Verdict:
    """A cut, and an altered file in the cache:"""
    found, verdicts = pair(bench), []
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:30_000] + bytes(100) + data[30_100:]):
        cache = bench.scratch()
        with serving(faults, found) as server:
            urls = urls_of(server, found)
            if fault := ended(read_urls(bench, reader, found, urls, cache=cache, cached=True)):
                return fault
            files = [file for file in cache.rglob("*") if file.stat().st_size > 50_000]
            fired(files, "the cache is empty")
            for file in files:
                file.write_bytes(damage(file.read_bytes()))
            verdicts.append(delivered(read_urls(bench, reader, found, urls, cache=cache, cached=True), found.rows))
    return joined(verdicts)


def _killed(bench: Bench, reader: str, faults: Any) -> Verdict:
    """A kill during the download:"""
    found, cache = pair(bench), bench.scratch()
    with serving(faults, found) as server:
        path, urls = f"/{found.tars[0].name}", urls_of(server, found)
        server.put(path, found.tars[0].read_bytes(), faults=[faults.stall(30_000)])
        killed = read_urls(bench, reader, found, urls, cache=cache, cached=True, limit=3.0)
        fired(killed[0].hung and server.fired[path], "the reader was not killed in its download")
        return delivered(read_urls(bench, reader, found, urls, cache=cache, cached=True), found.rows)


def _four_at_once(bench: Bench, reader: str, faults: Any) -> Verdict:
    """Four processes at once:"""
    found, cache = pair(bench), bench.scratch()
    with serving(faults, found) as server:
        server.bandwidth = 200_000  # bytes/s: long enough for all four to come
        results = read_urls(
            bench, reader, found, urls_of(server, found), cache=cache, cached=True, processes=4, as_ranks=[0]
        )
        sent = sum(server.sent.values()) / sum(tar.stat().st_size for tar in found.tars)
    if fault := ended(results):
        return fault
    verdict = joined(delivered([result], found.rows) for result in results)
    if verdict.kind == PASS and sent > 1.5:
        return Verdict(SILENT, f"every byte was downloaded {sent:.1f} times")
    return Verdict(verdict.kind, f"{verdict.detail}; every byte was downloaded {sent:.1f} times")


def buckets(bench: Bench, reader: str) -> Verdict:
    """D8: an S3 server: everything is delivered; a missing bucket, a denied key and an outage are refused by name."""
    try:
        servers, botocore = importlib.import_module("moto.server"), importlib.import_module("botocore.session")
    except ModuleNotFoundError as error:
        return Verdict(SKIPPED, f"{error}")
    if reader == OURS and not Path(__file__).parents[2].joinpath("mim/data/remote.py").exists():
        return Verdict(SKIPPED, "remote shards are not part of the checkout")
    found, verdicts = pair(bench), []
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    moto = servers.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "planted", "AWS_SECRET_ACCESS_KEY": "planted-secret"}
        client = botocore.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=endpoint,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket="photos")
        for tar in found.tars:
            client.put_object(Bucket="photos", Key=tar.name, Body=tar.read_bytes())
        env = {**keys, "AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        urls = [f"s3://photos/{tar.name}" for tar in found.tars]
        verdicts.append(delivered(read_urls(bench, reader, found, urls, env=env), found.rows))
        gone = [f"s3://nowhere/{tar.name}" for tar in found.tars]
        verdicts.append(refused(read_urls(bench, reader, found, gone, env=env), "nowhere"))
    finally:
        moto.stop()
    verdicts.append(refused(read_urls(bench, reader, found, urls, env=env, limit=150), "photos"))
    return joined(verdicts)


CASES = (
    Case("D1", "404, 403, no such host, refused", refusals),
    Case("D2", "503 x 3, 429 for a second and an hour", overload),
    Case("D3", "bodies cut or reset between members, 60 x", cuts),
    Case("D4", "stall, 1 KB/s, accept and silence", silences),
    Case("D5", "an object overwritten before and during", overwritten),
    Case("D6", "cache: names, damage, kill, four processes", shared_cache),
    Case("D8", "S3: delivery, missing bucket, outage", buckets),
)
