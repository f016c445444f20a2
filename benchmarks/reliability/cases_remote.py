"""Group D: web servers that refuse, cut, stall, or change what they hold. The server counts the faults that fired."""

from __future__ import annotations

import random
import threading
import time

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import fixture, member_starts
from benchmarks.reliability.serving import PATIENT, pair, pointed, put, read_despite, read_urls, serving
from benchmarks.reliability.trials import free_port
from benchmarks.reliability.verdicts import Verdict, joined, refused
from tests.fault_server import Fault, FaultServer, cut, stall, status, trickle

NUM_CUTS = 200  # a third of each kind
PROMPT = 20.0  # seconds for a trial in which it is told at once that there is nothing


def refusals(bench: Bench, reader: str) -> Verdict:
    """D1: 404, 403, a name that does not resolve, a port at which nobody listens: refused by name, and soon."""
    found = pair(bench)
    name = found.tars[0].name
    with serving(found) as server:
        whole = put(server, found)
        wrong = {str(code): server.put(f"/{code}/{name}", b"", then=status(code)) for code in (404, 403)}
        wrong |= {"no such host": f"http://nobody.invalid/{name}", "refused": f"http://127.0.0.1:{free_port()}/{name}"}
        each = [pointed(bench, reader, found, [url, *whole[1:]]) for url in wrong.values()]
        results = bench.trials.run(reader, each=each, batch_size=12, limit=PROMPT)
        for code in (404, 403):
            fired(server.fired[f"/{code}/{name}"], f"the server did not answer {code}")
    return joined(refused([result], name).of(kind) for kind, result in zip(wrong, results, strict=True))


def overload(bench: Bench, reader: str) -> Verdict:
    """D2: 503 three times; 429 that asks for a second, and for an hour: delivered, the hour is not waited."""
    after = {seconds: status(429, **{"Retry-After": str(seconds)}) for seconds in (1, 3600)}
    answers = {"503 x 3": [status(503)] * 3, "429, 1 s": [after[1]], "429, 3600 s": [after[3600]]}
    return joined(read_despite(bench, reader, answers))


def cuts(bench: Bench, reader: str) -> Verdict:
    """D3: the body ends at the border of a member, with and without its length, or by a reset: delivered in order."""
    generator = random.Random(3)
    starts = member_starts(pair(bench).tars[0])[1:-1]
    kinds = {"cut": {}, "cut, no length": {"length": False}, "reset": {"reset": True}}
    answers = {}
    for number in range(NUM_CUTS):
        name, at = list(kinds)[number % len(kinds)], generator.choice(starts)
        answers[f"{name} at {at} ({number})"] = [cut(at, **kinds[name])]
    return joined(read_despite(bench, reader, answers))


def silences(bench: Bench, reader: str) -> Verdict:
    """D4: the server stalls in the body, sends 1 KB/s, or accepts and never answers: noticed, and asked again."""
    answers = {"stall": [stall(30_000)], "1 KB/s": [trickle(1024)], "never answers": [Fault("silent", silent=True)]}
    return joined(read_despite(bench, reader, answers, limit=2 * PATIENT if reader == OURS else PATIENT))


def overwritten(bench: Bench, reader: str) -> Verdict:
    """D5: the object is another one, from the start, or from the second request of a download on: refused by name."""
    found, other = pair(bench), fixture(bench.scratch(), 24, shard_size=12, first=8500)
    path, swapped, verdicts = f"/{found.tars[0].name}", other.tars[0].read_bytes(), []
    for when in ("before", "during"):
        with serving(found) as server:
            urls = put(server, found)
            if when == "before":
                server.put(path, swapped, etag='"2"')
            else:
                server.put(path, found.tars[0].read_bytes(), faults=[cut(30_000)])
                threading.Thread(target=_overwrite, args=(server, path, swapped), daemon=True).start()
            results = read_urls(bench, reader, found, urls)
            fired(server.count(path), "the object was not asked for")
            fired(when == "before" or server.fired[path], "the download was not cut")
        verdicts.append(refused(results, found.tars[0].name).of(f"{when} the download"))
    return joined(verdicts)


def _overwrite(server: FaultServer, path: str, content: bytes) -> None:
    while not server.fired[path] and not server.stopping.is_set():
        time.sleep(0.005)
    server.put(path, content, etag='"2"')


CASES = (
    Case("D1", "404, 403, no such host, refused", refusals),
    Case("D2", "503 x 3, 429 for a second and an hour", overload),
    Case("D3", f"bodies cut or reset between members, {NUM_CUTS} x", cuts),
    Case("D4", "stall, 1 KB/s, accept and silence", silences),
    Case("D5", "an object overwritten before and during", overwritten),
)
