"""Group C: shards that are cut, flipped, replaced, oddly named, or hold images that are none."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import (
    SIDE,
    Fixture,
    Row,
    expected,
    fixture,
    flip,
    member_starts,
    members_of,
    png,
    row_of,
    write_tar,
)
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import LOUD, PASS, SILENT, Verdict, delivered, ended, joined, refused
from mim.data.shards import dataset_id

NUM_CUTS = 100  # of each kind
NUM_FLIPS = 400
NUM_INDEXED = 12  # cut tars that are also given to `mim shards index`, which starts a process for each
BLOCK = 512


def truncated(bench: Bench, reader: str) -> Verdict:
    """C1: cuts at random bytes, between members, inside headers, before the end blocks; and a tail of zeros."""
    generator = random.Random(1)
    tar = bench.small.tars[0]
    data, starts = tar.read_bytes(), member_starts(tar)
    whole = bench.small.copy(bench.scratch())
    cuts = [generator.randrange(1, starts[-1]) for _ in range(NUM_CUTS)]
    cuts += [generator.choice(starts[1:]) for _ in range(NUM_CUTS)]
    cuts += [generator.choice(starts[:-1]) + generator.randrange(1, BLOCK) for _ in range(NUM_CUTS // 4)]
    cuts += [starts[-1], starts[-1] + BLOCK]  # no end blocks, one of the two
    damaged = [data[:cut] for cut in cuts]
    damaged += [data[:cut] + bytes(len(data) - cut) for cut in cuts[:20]]  # what a crash leaves: the length, and zeros
    fired(all(one != data for one in damaged), "a cut left the shard as it was")
    verdicts = [refused([result], tar.name) for result in bench.read_each(reader, whole, damaged)]
    if reader == OURS:
        verdicts.append(_verify_names_all(bench, damaged))
        for one in generator.sample(damaged[: len(cuts)], NUM_INDEXED):  # zeros at the end are also how tars end
            cut = bench.scratch().with_suffix(".tar")
            cut.write_bytes(one)
            verdicts.append(refused([bench.mim("shards", "index", cut, bench.scratch(), "--workers", 1)], cut.name))
    return joined(verdicts)


def _verify_names_all(bench: Bench, damaged: list[bytes]) -> Verdict:
    """`mim shards verify` of a dataset of which every shard is one of the damaged ones must name each of them."""
    path = bench.scratch()
    lock, names = _repeated(bench.small, path, len(damaged))
    (path / "dataset.lock.json").write_text(json.dumps(lock))
    for name, content in zip(names, damaged, strict=True):
        (path / name).write_bytes(content)
    result = bench.mim("shards", "verify", path, "--json", "--workers", 1, limit=120)
    if result.exit != 65:
        return Verdict(SILENT, f"verify ended with {result.exit}")
    named = {finding["shard"] for finding in json.loads(result.output[result.output.index("{") :])["findings"]}
    missing = set(names) - named
    return Verdict(SILENT, f"verify does not name {len(missing)} shards") if missing else Verdict(PASS)


def _repeated(found: Fixture, path: Path, count: int) -> tuple[dict, list[str]]:
    """The lock and the indices of a dataset that holds the one shard of another `count` times."""
    path.mkdir()
    lock = json.loads((found.path / "dataset.lock.json").read_bytes())
    names = [f"copy-{number:05d}.tar" for number in range(count)]
    lock["shards"] = [{**lock["shards"][0], "file": name} for name in names]
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    index = found.tars[0].with_suffix(".npy").read_bytes()
    for name in names:
        (path / name).with_suffix(".npy").write_bytes(index)
    return lock, names


def flipped(bench: Bench, reader: str) -> Verdict:
    """C2: single bits, half of them in headers. Detected, or without effect on what is delivered."""
    generator = random.Random(2)
    tar = bench.small.tars[0]
    data, starts = tar.read_bytes(), member_starts(tar)
    copy = bench.small.copy(bench.scratch())
    bits = [generator.randrange(8 * len(data)) for _ in range(NUM_FLIPS // 2)]
    bits += [8 * generator.choice(starts[:-1]) + generator.randrange(8 * BLOCK) for _ in range(NUM_FLIPS // 2)]
    damaged = [flip(data, bit) for bit in bits]
    fired(all(one != data for one in damaged), "a flip left the shard as it was")
    verdicts = []
    for bit, result in zip(bits, bench.read_each(reader, copy, damaged), strict=True):
        verdict = refused([result], wanted=bench.small.rows)
        verdicts.append(Verdict(verdict.kind, f"bit {bit}: {verdict.detail}" if verdict.kind != PASS else ""))
    return joined(verdicts)


def bad_images() -> dict[int, bytes]:
    """Encoded images that no reader may show, by the number that they would have."""
    cut, plain = png(3001)[: len(png(3001)) // 2], png(3004)
    return {
        3001: cut,
        3002: b"this is no image\n" * 300,
        3003: b"",
        3004: flip(plain, 8 * (plain.index(b"IDAT") + 1000)),
        3005: plain[:20] + bytes(40) + plain[60:],
    }


def undecodable(bench: Bench, reader: str) -> Verdict:
    """C3: five broken images among 60, and a JPEG called .png. Named; the stream is equal when they are known."""
    bad = bad_images()
    jpeg, flat = io.BytesIO(), np.full((SIDE, SIDE, 3), 128, np.uint8)  # all decoders agree on it
    Image.fromarray(flat).save(jpeg, format="JPEG")
    renamed = row_of(flat, 0)
    fired(jpeg.getvalue()[:2] == b"\xff\xd8", "the JPEG is none")
    members = [member for number in range(3100, 3160) for member in members_of(number)]
    for number, data in bad.items():
        members += [(f"{number:05d}.png", data), (f"{number:05d}.cls", b"0")]
    members += [("03006.png", jpeg.getvalue()), ("03006.cls", b"0")]
    tar = write_tar(bench.scratch().with_suffix(".tar"), members)
    good = {expected(number) for number in range(3100, 3160)} | {renamed}
    if reader != OURS:
        return delivered(bench.read_tars(reader, [tar]), good)
    dataset = bench.scratch()
    if fault := ended([bench.mim("shards", "index", tar, dataset, "--labels", "cls", "--workers", 1)]):
        return fault
    found = bench.read(reader, dataset, num_steps=20)
    verify = bench.mim("shards", "verify", dataset, "--decode", "--workers", 1)
    if not (dataset / "quarantine.json").exists():
        return Verdict(SILENT, f"verify --decode wrote no quarantine: {verify.output[-200:]}")
    named = {entry["key"] for entry in json.loads((dataset / "quarantine.json").read_bytes())["samples"]}
    known = bench.read(reader, dataset, num_steps=20)
    if missing := {f"{number:05d}" for number in bad} - named:
        return Verdict(SILENT, f"accepted as images: {', '.join(sorted(missing))}")
    if fault := ended(found + known) or _only(found[0].rows, good):
        return fault
    same = found[0].batches == known[0].batches
    return Verdict(PASS if same else SILENT, f"{len(named)} named; streams {'equal' if same else 'differ'}")


def _only(rows: list[Row], good: set[Row]) -> Verdict | None:
    if strange := [row for row in rows if row not in good]:
        return Verdict(SILENT, f"{len(strange)} altered or broken images delivered")
    return None


def names(bench: Bench, reader: str) -> Verdict:
    """C5: each odd way of naming has a stated result: delivered exactly, left out by name, or refused by name."""
    one, two, three = (members_of(number) for number in (4000, 4001, 4002))
    plain, wanted = [*one, *two, *three], {expected(number) for number in (4000, 4001, 4002)}
    dots = [member for number in (4000, 4001, 4002) for member in members_of(number, f"img.{number}")]
    upper = [(name.replace(".png", ".PNG"), data) for name, data in plain]
    odd = [member for number in (4000, 4001, 4002) for member in members_of(number, f"a#b;c {number}")]
    sets = {
        "dots in the stem": [dots],
        "a member twice, adjacent": [[one[0], *plain]],
        "a key again, apart": [[*plain, *one]],
        "a key in two shards": [[*one, *two], [*one, *three]],
        "upper-case endings": [upper],
        "a label is missing": [[*one, two[0], *three]],
        "an image is missing": [[*one, two[1], *three]],
        "members not adjacent": [sorted(plain, key=lambda member: member[0].rpartition(".")[2])],
        "a member __bad__": [[*one, ("04001.__bad__", b""), *two, *three]],
        "# and ; in the key": [odd],
    }
    verdicts = []
    for name, tars in sets.items():
        files = [write_tar(bench.scratch() / "tars" / f"part-{i}.tar", tar) for i, tar in enumerate(tars)]
        results = bench.read_tars(reader, files, batch_size=1)
        verdict = _stated(results, wanted)
        verdicts.append(verdict.of(name))
    file = write_tar(bench.scratch() / "a#b;c?d.tar", plain)
    verdict = _stated(bench.read_tars(reader, [file], batch_size=1), wanted)
    return joined([*verdicts, verdict.of("#, ; and ? in the file name")])


def _stated(results: list[Result], wanted: set[Row]) -> Verdict:
    """Everything is delivered; or what is not was named, by a refusal or as left out."""
    (result,) = results
    if result.exit != 0:
        verdicts = [refused(results, word) for word in ("0400", "img", "part-")]
        return min(verdicts, key=lambda verdict: verdict.kind != PASS)
    left_out = result.output.partition("left out")[2]
    lost = [row for row in wanted if row not in result.rows]
    unnamed = [row for row in lost if f"{row[0]:05d}" not in left_out and "img" not in left_out]
    foreign = sum(row not in wanted for row in result.rows)
    if foreign or unnamed:
        return Verdict(SILENT, f"{len(unnamed)} of {len(wanted)} lost without a word, {foreign} altered or merged")
    return Verdict(PASS, f"{len(lost)} left out by name" if lost else "delivered")


def budget(bench: Bench, reader: str) -> Verdict:
    """C6: 5 bad images of 120 are within the budget and counted; 30 of 120 end the run, which names the first 10."""
    verdicts = []
    for num_bad in (5, 30):
        members, good = [], set()
        for number in range(5000, 5120):
            image, label = members_of(number)
            broken = number % (120 // num_bad) == 0
            members += [(image[0], image[1][:600] if broken else image[1]), label]
            good |= set() if broken else {expected(number)}
        fired(120 - len(good) == num_bad, f"{120 - len(good)} images are broken")
        tar = write_tar(bench.scratch().with_suffix(".tar"), members)
        results = bench.read_tars(reader, [tar], num_steps=15)
        if num_bad == 30:
            verdict = refused(results, "budget")
            named = {f"{number:05d}" for number in range(5000, 5120) if f"{number:05d}" in results[-1].message}
            if verdict.kind == PASS and len(named) != 10:
                verdict = Verdict(LOUD, f"{len(named)} offenders are named instead of the first 10")
        elif reader == OURS:
            met = {bad["sample"] for facts in results[-1].facts for bad in facts["bad"]}
            verdict = (
                ended(results)
                or _only(results[-1].rows, good)
                or Verdict(PASS if len(met) == num_bad else SILENT, f"{len(met)} of {num_bad} bad images named")
            )
        else:
            verdict = delivered(results, good)
        verdicts.append(verdict.of(f"{num_bad} bad"))
    return joined(verdicts)


def replaced(bench: Bench, reader: str) -> Verdict:
    """C7: a shard is replaced by another of the same name, size, keys and layout, with other pixels."""
    found = fixture(bench.scratch(), 20, shard_size=20, first=6000)
    first = bench.read(reader, found.path, num_steps=1)
    tar = found.tars[0]
    data, starts = bytearray(tar.read_bytes()), member_starts(tar)
    images = sorted(itertools.pairwise(starts), key=lambda pair: pair[0] - pair[1])[:20]
    for start, end in images:  # another whole PNG of another image, padded behind its end to the old length
        size = int(bytes(data[start + 124 : start + 136]).strip(b"\0 "), 8)
        other = io.BytesIO()
        Image.fromarray(np.full((SIDE, SIDE, 3), 7, np.uint8)).save(other, format="PNG")
        fired(len(other.getvalue()) <= size <= end - start - BLOCK, "the other image does not fit")
        data[start + BLOCK : start + BLOCK + size] = other.getvalue().ljust(size, b"\0")
    fired(len(data) == tar.stat().st_size and data != tar.read_bytes(), "the shard is as it was")
    tar.write_bytes(data)
    results = bench.read(reader, found.path)
    if reader == OURS:
        verify = bench.mim("shards", "verify", found.path, "--workers", 1)
        return joined([ended(first) or refused(results, tar.name), refused([verify], tar.name)])
    return ended(first) or refused(results, tar.name)


CASES = (
    Case("C1", "shards cut, 247 ways", truncated),
    Case("C2", "400 single bits flipped", flipped),
    Case("C3", "broken images, known or found", undecodable),
    Case("C5", "odd names of samples and shards", names),
    Case("C6", "bad images within and above the budget", budget),
    Case("C7", "a shard replaced under its name and size", replaced),
)
