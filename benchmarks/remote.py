"""Range reads over http: ours, obstore and fsspec, on a fault server of this machine. Speed, and what faults become.

python benchmarks/remote.py --json remote.json

Speed is measured interleaved, one reader after the other in each round, on one server process; the table gives the
median round. A fault is met by the first requests only, so a reader that retries gets the right bytes; each case
proves that its fault fired. Verdicts: right (the right bytes), error, SILENT (wrong or short bytes), hang (nothing
within the limit). obstore and fsspec get a request timeout as short as our silence limit.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import aiohttp
import fsspec
import obstore
from fault_server import Fault, FaultServer, cut, stall, status, trickle

from mim.data.cache import RemoteShard, ShardCache
from mim.data.remote import Remote
from mim.data.wire import Patience

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--json", type=Path, help="write the results here, too")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--reads", type=int, default=200, help="small reads per round")
arguments = parser.parse_args()

SILENCE, LIMIT = 1.0, 8.0  # seconds
SMALL = 64 * 1024
BODY = random.Random(0).randbytes(32 << 20)
FAULTS = {
    "503 twice": [status(503), status(503)],
    "cut, with length": [cut(20_000)],
    "cut, without length": [cut(20_000, length=False)],
    "reset": [cut(20_000, reset=True)],
    "wrong range": [Fault("wrong range", content_range="bytes 0-65535/33554432")],
    "stall": [stall(20_000)],
    "trickle 2 KB/s": [trickle(2_000)],
    "accepts, never answers": [Fault("silent", silent=True)],
}


def ours():
    remote = Remote(Patience(silence=SILENCE, first_wait=0.1))
    return remote.pread


def with_obstore():
    stores, etags = {}, {}

    def pread(url, offset, size):
        base, _, name = url.rpartition("/")
        client = {"timeout": f"{SILENCE}s", "connect_timeout": "1s", "allow_http": True}
        store = stores.setdefault(base, obstore.store.HTTPStore(base, client_options=client))
        options = {"range": (offset, offset + size)} | ({"if_match": etags[url]} if url in etags else {})
        found = obstore.get(store, name, options=options)
        etags[url] = found.meta["e_tag"]
        return bytes(found.bytes())

    return pread


def with_fsspec():
    timeout = aiohttp.ClientTimeout(total=60, sock_connect=1, sock_read=SILENCE)
    filesystem = fsspec.filesystem("http", client_kwargs={"timeout": timeout}, skip_instance_cache=True)
    return lambda url, offset, size: filesystem.cat_file(url, start=offset, end=offset + size)


READERS = {"ours": ours, "obstore": with_obstore, "fsspec": with_fsspec}


def rates(url):
    """Median small reads/s and MB/s of one large read, per reader."""
    rng = random.Random(1)
    readers = {name: make() for name, make in READERS.items()}
    small, large = {name: [] for name in readers}, {name: [] for name in readers}
    for number in range(arguments.rounds + 1):
        offsets = [rng.randrange(len(BODY) - SMALL) for _ in range(arguments.reads)]
        for name, pread in readers.items():
            began = time.perf_counter()
            for offset in offsets:
                assert pread(url, offset, SMALL) == BODY[offset : offset + SMALL]
            middle = time.perf_counter()
            pread(url, 0, len(BODY))
            if number:  # the first warms up
                small[name].append(len(offsets) / (middle - began))
                large[name].append(len(BODY) / 1e6 / (time.perf_counter() - middle))
    return {n: {"reads_per_s": statistics.median(small[n]), "mb_per_s": statistics.median(large[n])} for n in readers}


def attempt(name, url, pipe, first=None):
    """In a process of its own: read, and send what came of it."""
    try:
        pread = READERS[name]()
        if first is not None:
            pread(url, 0, SMALL)
            first.send(None)
            first.recv()
        pipe.send("right" if pread(url, SMALL, SMALL) == BODY[SMALL : 2 * SMALL] else "SILENT")
    except Exception as error:
        pipe.send(f"error ({type(error).__name__})")


def in_child(target, *args):
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=target, args=(*args[:2], theirs, *args[2:]))
    child.start()
    return mine, child


def verdict(mine, child):
    found = mine.recv() if mine.poll(LIMIT) else "hang"
    child.kill()
    return found


def overwritten(server, name):
    """Another object of the same size takes the address between two reads."""
    url = server.put("/over.tar", BODY)
    go, theirs = multiprocessing.Pipe()
    mine, child = in_child(attempt, name, url, theirs)
    go.recv()
    server.put("/over.tar", BODY[::-1], etag='"2"')
    go.send(None)
    return verdict(mine, child)


def forked(name, url, pipe):
    """A process that has read forks, as a loader does for its workers; the child reads."""
    pread = READERS[name]()
    pread(url, 0, SMALL)

    def child():
        try:
            pipe.send("right" if pread(url, SMALL, SMALL) == BODY[SMALL : 2 * SMALL] else "SILENT")
        except BaseException as error:
            pipe.send(f"error ({type(error).__name__})")

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(LIMIT)


def download_share():
    """MB/s of shards fetched into a cache one after the other, on a server of 50 ms and 20 MB/s; of its plain rate."""
    size, number, remote = 8 << 20, 4, Remote()
    with FaultServer(latency=0.05, bandwidth=20e6) as server, tempfile.TemporaryDirectory() as folder:
        bodies = [BODY[i * size : (i + 1) * size] for i in range(number)]
        found = [(server.put(f"/{i}.tar", body), size, sha256(body).hexdigest()) for i, body in enumerate(bodies)]
        plain = server.put("/plain.tar", BODY[: size * number])
        began = time.perf_counter()
        remote.pread(plain, 0, size * number)  # the limit: one request, nothing written or hashed
        middle = time.perf_counter()
        cache = ShardCache(folder)
        for shard in found:
            cache.fetch(RemoteShard(*shard))
        rates = [size * number / 1e6 / seconds for seconds in (middle - began, time.perf_counter() - middle)]
    return {"plain_mb_per_s": rates[0], "cache_mb_per_s": rates[1], "share": rates[1] / rates[0]}


def main():
    results = {"cpu_count": len(os.sched_getaffinity(0)), "faults": {}}
    with FaultServer() as server:
        for case, faults in FAULTS.items():
            results["faults"][case] = {}
            for name in READERS:
                path = f"/{case.replace(' ', '-')}/{name}.tar"
                found = verdict(*in_child(attempt, name, server.put(path, BODY, faults=faults)))
                fired = server.fired[path] == [fault.name for fault in faults][: len(server.fired[path])]
                results["faults"][case][name] = found if fired and server.fired[path] else "invalid: no fault"
        results["faults"]["overwritten"] = {name: overwritten(server, name) for name in READERS}
        url = server.put("/fork.tar", BODY)
        results["faults"]["after a fork"] = {name: verdict(*in_child(forked, name, url)) for name in READERS}
        results["rates"] = rates(server.put("/a.tar", BODY))
    print(f"{'':24}" + "".join(f"{name:>28}" for name in READERS))
    for case, found in results["faults"].items():
        print(f"{case:24}" + "".join(f"{found[name]:>28}" for name in READERS))
    for unit in ("reads_per_s", "mb_per_s"):
        print(f"{unit:24}" + "".join(f"{results['rates'][name][unit]:>28.0f}" for name in READERS))
    results["downloads"] = download_share()
    print(
        "shards of 8 MiB into the cache, 50 ms and 20 MB/s: {share:.0%} of the plain rate".format(
            **results["downloads"]
        )
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
