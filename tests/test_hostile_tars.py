"""Tars made to do harm, through every tool that reads one: refused or harmless, in bounded memory, touching nothing."""

import gzip
import json
import multiprocessing
import os
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from benchmarks.reliability.fixtures import write_many
from mim.contracts import DataError
from mim.data.index import index
from mim.data.index_tar import Options, Task, index_shard
from mim.data.make import make
from mim.data.reshard import reshard
from mim.data.shards import LOCK, Dataset, read_lock
from mim.data.verify import check_shard, verify
from tests import tiny

BLOCK = 512
MEBI = 1 << 20
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TOUCHING = {"os.symlink", "os.link", "os.mkdir", "os.remove", "os.rename", "os.chmod", "os.truncate"}
FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "socket.connect"}


def picture(i=0):
    return tiny.picture(i, (8, 8), "PNG")


def header(name, size=0, kind=b"0", link=b"", number=None):
    """One ustar header, right in every checksum; `number` replaces the twelve bytes of the size."""
    block = bytearray(BLOCK)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = number if number is not None else b"%011o\0" % size
    block[136:148], block[148:156], block[156:157] = b"00000000000\0", b" " * 8, kind
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data, **more):
    return header(name, len(data), **more) + data + b"\0" * (-len(data) % BLOCK)


def pax(**records):
    lines = b""
    for key, value in records.items():
        line = f" {key.replace('_', '.')}={value}\n".encode()
        count = len(line) + len(str(len(line) + 3))
        lines += str(count).encode() + line
    return member(b"pax", lines, kind=b"x")


END = b"\0" * 2 * BLOCK
GOOD = member(b"good.png", picture())
OUTSIDE = "OUTSIDE"  # stands for a path of the test's own that no tool may touch
HOSTILE = {
    "traversal": member(b"../../escape.png", picture(1)),
    "traversal inside": member(b"a/../../../escape.png", picture(1)),
    "absolute": member(b"/OUTSIDE/escape.png", picture(1)),
    "pax traversal": pax(path="../../escape.png") + member(b"a.png", picture(1)),
    "pax absolute": pax(path="/OUTSIDE/escape.png") + member(b"a.png", picture(1)),
    "gnu long name traversal": member(b"././@LongLink", b"../../escape.png\0", kind=b"L")
    + member(b"a.png", picture(1)),
    "symbolic link": header(b"a.png", kind=b"2", link=b"/OUTSIDE/canary.png"),
    "hard link": header(b"a.png", kind=b"1", link=b"../canary.png"),
    "character device": header(b"a.png", kind=b"3"),
    "block device": header(b"a.png", kind=b"4"),
    "pipe": header(b"a.png", kind=b"6"),
    "contiguous file": header(b"a.png", kind=b"7"),
    "global pax": member(b"g", b"17 path=evil.png\n", kind=b"g"),
    "link by gnu long link": member(b"././@LongLink", b"/OUTSIDE/canary.png\0", kind=b"K"),
    "sparse": header(b"a.png", 600 << 20, kind=b"S"),
    "pax sparse": pax(GNU_sparse_major="1") + member(b"a.png", picture(1)),
    "NUL in a long name": member(b"././@LongLink", b"a\0.png\0", kind=b"L") + pax(path="a\0b.png") + member(b"a", b""),
    "negative size": header(b"a.png", number=b"\xff" * 12),
    "minus sign": header(b"a.png", number=b"-0000000512\0"),
    "base 256 size": header(b"a.png", number=b"\x80" + b"\0" * 3 + b"\x7f" * 8),
    "size beyond the file": header(b"a.png", 8 << 30),
    "pax size beyond the file": pax(size=1 << 60) + member(b"a.png", picture(1)),
    "pax negative size": pax(size=-512) + member(b"a.png", picture(1)),
    "pax of 4 GB": header(b"pax", 4 << 30, kind=b"x"),
    "pax lengths that lie": member(b"pax", b"99999999999999999999 path=a\n", kind=b"x") + member(b"a.png", b""),
    "pax length zero": member(b"pax", b"0 path=a\n", kind=b"x") + member(b"a.png", b""),
    "pax number of 5000 digits": member(b"pax", b"9" * 5000 + b" path=a\n", kind=b"x") + member(b"a.png", b""),
    "long name of 64 KiB": member(b"././@LongLink", b"n" * (64 << 10) + b"\0", kind=b"L") + member(b"a", b""),
    "name that is not UTF-8": member(b"\xff\xfe.png", picture(1)),
    "empty name": member(b"", picture(1)),
    "second archive": END + member(b"hidden.png", picture(1)),
}


@pytest.fixture
def place(tmp_path):
    """(tar's folder, outside folder): the hostile names lead from the first to the second."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary.png").write_bytes(picture(99))
    inside = tmp_path / "x" / "y" / "in"
    inside.mkdir(parents=True)
    return inside, outside


def tree(folder):
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


class Watch:
    """Records, by audit events, what is done outside a folder. An audit hook stays for ever, so there is one of it."""

    active: "Watch | None" = None
    hooked = False

    def __init__(self, allowed, canary):
        self.allowed, self.canary, self.seen = str(allowed), str(canary), []

    def __enter__(self):
        if not Watch.hooked:
            sys.addaudithook(Watch.hook)
            Watch.hooked = True
        Watch.active = self
        return self

    def __exit__(self, *_):
        Watch.active = None

    @staticmethod
    def hook(event, arguments):
        watch = Watch.active
        if watch is None:
            return
        if event in FORBIDDEN:
            watch.seen.append((event, arguments))
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            inside = os.path.abspath(path).startswith((watch.allowed, "/dev/null"))
            if "canary" in path or "escape" in path or (flags & WRITES and not inside):
                watch.seen.append((event, path))
        elif event in TOUCHING and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            below_a_folder = not os.path.isabs(path) and arguments[-1] > 0  # rmtree, which opened that folder first
            if not below_a_folder and not os.path.abspath(path).startswith(watch.allowed):
                watch.seen.append((event, arguments))


def refusal(call):
    """The one sentence with which a call refuses; "" when it does not."""
    try:
        call()
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_refused_by_index_and_make_and_nothing_else_is_touched(place, name):
    inside, outside = place
    content = GOOD + HOSTILE[name].replace(b"OUTSIDE", b"tmp") + END
    (inside / "x.tar").write_bytes(content)
    before = tree(outside.parent)
    with Watch(inside, outside / "canary.png") as watch:
        for headers_only in (False, True):
            task = Task(0, str(inside / "x.tar"), "x.tar", inside, Options(headers_only=headers_only))
            assert "x.tar, byte " in refusal(lambda task=task: index_shard(task))
        assert "x.tar, byte " in refusal(lambda: make(inside / "x.tar", inside / "out", workers=1))
    assert watch.seen == []
    assert tree(outside.parent) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_that_becomes_hostile_after_it_was_indexed_is_refused_by_verify_and_reshard(place, name):
    inside, outside = place
    shard = inside / "x.tar"
    shard.write_bytes(GOOD + member(b"a.png", picture(1)) + member(b"b.png", picture(2)) + b"\0" * 96 * BLOCK)
    index([str(shard)], inside / "out", workers=1)
    size = shard.stat().st_size
    content = (GOOD + HOSTILE[name].replace(b"OUTSIDE", b"tmp") + END).ljust(size, b"\0")[:size]
    shard.write_bytes(content)
    lock = read_lock(inside / "out")
    before = tree(outside)
    with Watch(inside, outside / "canary.png") as watch:
        assert check_shard(Dataset(inside / "out", lock), lock["shards"][0], 0, True).findings
        message = refusal(lambda: reshard(inside / "out", inside / "new", num_shards=1, workers=1))
        assert "x.tar" in message
    assert watch.seen == []
    assert tree(outside) == before


UNICODE = [
    "\ufb01le\u202egnp.png",  # a ligature, right to left
    "\uff0e\uff0e\uff0fescape.png",  # full-width dots and slash
    "a\u200f/b.png",
    "\u00e9.png",
    "e\u0301.png",  # the same letter, decomposed
    "a\nb.png",
    "a\\b.png",
]


def test_strange_but_harmless_names_stay_names(place):
    """Lookalikes of dots and slashes, right-to-left marks, line ends: samples as any other, under OUT alone."""
    inside, outside = place
    (inside / "x.tar").write_bytes(b"".join(member(name.encode(), picture(i)) for i, name in enumerate(UNICODE)) + END)
    before = tree(outside)
    with Watch(inside, outside / "canary.png") as watch:
        index([str(inside / "x.tar")], inside / "out", workers=1)
        make(inside / "x.tar", inside / "made", workers=1)
        reshard(inside / "out", inside / "new", num_shards=2, workers=1)
        reports = [verify(inside / folder, decode=True, workers=1) for folder in ("out", "made", "new")]
    assert all(report.clean and report.num_samples == len(UNICODE) for report in reports)
    assert [path for event, path in watch.seen if event != "open" or "canary" in path] == []
    assert tree(outside) == before
    assert {path.name for path in inside.iterdir()} == {"x.tar", "out", "made", "new"}


def test_compression_inside_a_tar_is_never_undone(place):
    inside, _ = place
    bomb = gzip.compress(b"\0" * (64 * MEBI))
    (inside / "x.tar").write_bytes(GOOD + member(b"a.jpg", bomb) + member(b"b.tar.gz", bomb) + END)
    tracemalloc.start()
    report = index([str(inside / "x.tar")], inside / "out", workers=1)
    lock = read_lock(inside / "out")
    checked = check_shard(Dataset(inside / "out", lock), lock["shards"][0], 0, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [finding.kind for finding in checked.findings] == ["unreadable"]
    assert report.num_samples == 2
    assert peak < 32 * MEBI
    (inside / "y.tar").write_bytes(gzip.compress(GOOD + END))
    assert "gunzip" in refusal(lambda: index([str(inside / "y.tar")], inside / "other", workers=1))


def test_an_image_larger_than_any_that_is_decoded_is_left_out_without_being_held(place):
    inside, _ = place
    with (inside / "x.tar").open("wb") as file:
        file.write(GOOD + header(b"large.png", 5 << 30))
        file.seek(len(GOOD) + BLOCK + (5 << 30))  # a hole: 5 GiB that take no room
        file.write(END)
    tracemalloc.start()
    facts = index_shard(Task(0, str(inside / "x.tar"), "x.tar", inside, Options(headers_only=True)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["left_out"][0]["reason"].startswith("its image has 5368709120 bytes")
    assert peak < 16 * MEBI


def test_a_label_far_from_its_image_is_left_out_without_being_held(place):
    inside, _ = place
    gap = 100 * MEBI
    with (inside / "x.tar").open("wb") as file:
        file.write(GOOD + member(b"good.cls", b"0") + member(b"a.png", picture(1)) + header(b"a.bin", gap))
        file.seek(gap, os.SEEK_CUR)
        file.write(member(b"a.cls", b"0") + END)
    facts = index_shard(Task(0, str(inside / "x.tar"), "x.tar", inside, Options(labels="cls")))
    assert facts["count"] == 1
    assert "bytes apart" in facts["left_out"][0]["reason"]


def test_the_memory_of_a_scan_is_bounded_by_the_number_of_members(tmp_path):
    write_many(tmp_path / "x.tar", 30_000, ending="png")
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.next().name == "0000000.png"
    tracemalloc.start()
    facts = index_shard(Task(0, str(tmp_path / "x.tar"), "x.tar", tmp_path, Options()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["count"] == 30_000
    assert peak < 24 * MEBI + 30_000 * 200  # buffers, and 200 bytes a member: below 256 MiB for a million
    assert "can be decoded" in refusal(lambda: index([str(tmp_path / "x.tar")], tmp_path / "out", workers=1))
    assert not (tmp_path / "out" / LOCK).exists()


def memory_of(path, queue):
    def status(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    message = refusal(lambda: index_shard(Task(0, str(path), "x.tar", path.parent, Options())))
    queue.put((status("VmHWM") - before, message))


@pytest.mark.slow
def test_a_million_empty_members_take_less_than_256_mebibytes(tmp_path):
    for count, refused in ((10**6, False), ((1 << 20) + 1, True)):
        write_many(tmp_path / "x.tar", count, ending="png")
        queue = multiprocessing.get_context("fork").Queue()
        process = multiprocessing.get_context("fork").Process(target=memory_of, args=(tmp_path / "x.tar", queue))
        process.start()
        grown, message = queue.get(timeout=300)
        process.join()
        print(json.dumps({"members": count, "grown_mebibytes": round(grown / MEBI, 1)}))
        assert grown < 256 * MEBI
        assert ("more than 1048576 members" in message) == refused
