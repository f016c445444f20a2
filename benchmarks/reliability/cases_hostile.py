"""Group F: shards, images, locations and recipes that were made to do harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import expected, fixture, members_of, pixels_of, write_many, write_tar
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import (
    PASS,
    SILENT,
    Verdict,
    delivered,
    ended,
    joined,
    refused,
)

MEMORY = 256 << 20  # bytes that refusing may take
OWN = {"mim", "numpy", "torch", "builtins", "collections", "pathlib", "concurrent", "multiprocessing", "functools"}
# of what our processes send each other; a stranger's pickle that names nothing else is shown by its canary


class Harm:
    """Unpickling it runs a program that makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def npy_of_objects(canary: Path) -> bytes:
    """An array of objects, which numpy unpickles when it is allowed to."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    return head.getvalue() + pickle.dumps(Harm(canary))


def unharmed(results: list[Result], canary: Path) -> Verdict | None:
    """Judge that nothing foreign ran; None when nothing did."""
    if canary.exists():
        return Verdict(SILENT, f"code of the input ran: it made {canary.name}")
    if started := [line for result in results for line in result.started()]:
        return Verdict(SILENT, f"a program was started: {started[0]}")
    foreign = [event for result in results for event in result.events if event[0] == "pickle.find_class"]
    foreign = [event for event in foreign if event[1].partition(".")[0] not in OWN]
    return Verdict(SILENT, f"unpickled {foreign[0][1]}.{foreign[0][2]}") if foreign else None


def harmful_members(bench: Bench, reader: str) -> Verdict:
    """F1: members that hold pickles, beside the images. Everything is delivered and nothing is unpickled."""
    verdicts = []
    for ending in ("pyd", "pkl", "pickle", "pth", "npy"):
        folder = bench.scratch()
        canary = folder.with_name("canary")
        harm = npy_of_objects(canary) if ending == "npy" else pickle.dumps(Harm(canary))
        fired(b"system" in harm, "the planted pickle starts nothing")
        members = []
        for number in range(7000, 7006):
            members += [*members_of(number), (f"{number:05d}.{ending}", harm)]
        tar = write_tar(folder.with_suffix(".tar"), members)
        results = bench.read_tars(reader, [tar], batch_size=6, flags=("--image", "png"))  # .npy is an image, too
        wanted = {expected(number) for number in range(7000, 7006)}
        verdict = unharmed(results, canary) or delivered(results[-1:], wanted)
        verdicts.append(verdict.of(f".{ending}"))
    return joined(verdicts)


def harmful_images(canary: Path) -> dict[str, bytes]:
    """Images of formats that nobody asked for, under the name of one that somebody did."""
    pixels = Image.fromarray(pixels_of(0))
    found = {"npy of objects": npy_of_objects(canary)}
    for kind in ("PCX", "PPM", "TGA", "GIF", "ICO"):
        buffer = io.BytesIO()
        pixels.save(buffer, format=kind)
        found[kind] = buffer.getvalue()
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 72\n%%EndComments\n"
    found["EPS"] = head + b"showpage\n"
    found["endless PostScript"] = head + b"{} loop\n"
    found["WMF"] = b"\xd7\xcd\xc6\x9a" + struct.pack("<HhhhhHLH", 0, 0, 0, 720, 720, 720, 0, 0) + bytes(18)
    return found


def other_formats(bench: Bench, reader: str) -> Verdict:
    """F2: EPS, WMF, PCX and others named .png. Refused by name, no program is started, the other images come."""
    verdicts = []
    canary = bench.scratch().with_name("canary")
    for kind, data in harmful_images(canary).items():
        folder = bench.scratch()
        members = [member for number in range(7100, 7110) for member in members_of(number)]
        members += [("07110.png", data), ("07110.cls", b"0")]
        fired(not data.startswith(b"\x89PNG"), "the image is a PNG")
        results = bench.read_tars(reader, [write_tar(folder.with_suffix(".tar"), members)], num_steps=3)
        good = {expected(number) for number in range(7100, 7110)}
        verdict = unharmed(results, canary) or ended(results)
        if verdict is None:
            strange = [row for row in results[-1].rows if row not in good]
            named = any(bad["key"].endswith("07110") for facts in results[-1].facts for bad in facts.get("bad", []))
            text = "accepted as an image" if strange else "named" if named else "left out without a word"
            verdict = Verdict(PASS if named and not strange else SILENT, text)
        verdicts.append(verdict.of(kind))
    return joined(verdicts)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one gray level, a thousandth of a thousandth of the size that it has when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezer, rows = zlib.compressobj(6), bytes(1 + width)
    data = b"".join(squeezer.compress(rows) for _ in range(height)) + squeezer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """One tar header with any size field."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[156:157], head[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def hostile_tars() -> dict[str, bytes]:
    """Tars that are small and want to be large, or that lie about their sizes."""
    sparse = bytearray(_header("a.png", b"%011o" % 512, b"S"))
    sparse[386:410], sparse[483:495] = b"%011o\0%011o\0" % (0, 512), b"%011o" % (600 << 20)
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    end = bytes(1024)
    packed = zlib.compressobj(1, wbits=31)
    gz = b"".join(packed.compress(bytes(1 << 20)) for _ in range(400)) + packed.flush()
    return {
        "sparse member of 600 MB": bytes(sparse) + bytes(512) + end,
        "tar that is a gzip of 400 MB": gz,
        "pax header of 4 GB": _header("a", b"%011o" % (2**32 - 1), b"x") + bytes(512) + end,
        "negative size": _header("a.png", b"-0000000001") + bytes(512) + end,
        "base-256 size of 2^60": _header("a.png", b"\x80\0\0\0\x10" + bytes(7)) + bytes(512) + end,
    }


def bombs(bench: Bench, reader: str) -> Verdict:
    """F3: images and tars that unfold to much. Refused with a reason, within 256 MiB."""
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(jpeg, format="JPEG")
    tall = bytearray(jpeg.getvalue())
    frame = tall.index(b"\xff\xc0")
    tall[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    images = {"PNG of 144 Mpix": bomb(12000, 12000), "JPEG header of 65500^2": bytes(tall)}
    fired(len(images["PNG of 144 Mpix"]) < 200_000, "the PNG is not small")
    verdicts = []
    for name, data in images.items():
        folder = bench.scratch()
        members = [*members_of(7200), ("07201.png", data), ("07201.cls", b"0")]
        results = bench.read_tars(reader, [write_tar(folder.with_suffix(".tar"), members)], batch_size=1, num_steps=2)
        named = any("07201" in bad["key"] for facts in results[-1].facts for bad in facts.get("bad", []))
        verdict = Verdict(PASS, "named") if named else refused(results, "07201")
        verdicts.append(_within(name, verdict, results))
    for name, data in hostile_tars().items():
        tar = bench.scratch().with_suffix(".tar")
        tar.write_bytes(data)
        results = bench.read_tars(reader, [tar], batch_size=1)
        verdicts.append(_within(name, refused(results, tar.name), results))
    num_members = 10**5 if bench.quick else 10**6
    tar = write_many(bench.scratch().with_suffix(".tar"), num_members)
    results = bench.read_tars(reader, [tar], batch_size=1, limit=180)
    verdicts.append(_within(f"{num_members} empty members", refused(results, tar.name), results))
    tar.unlink()  # half a gigabyte
    return joined(verdicts)


def _within(name: str, verdict: Verdict, results: list[Result]) -> Verdict:
    grown = max(result.grown for result in results)
    kind = SILENT if verdict.kind == PASS and grown > MEMORY else verdict.kind
    return Verdict(kind, f"{name}: {verdict.detail} ({grown >> 20} MiB)")


def traversal(bench: Bench, reader: str) -> Verdict:
    """F4: names that leave the folder, links and devices. Refused or left alone; nothing outside is made or read."""
    verdicts = []
    outside = bench.scratch()
    outside.write_bytes(dict(members_of(7309))["07309.png"])
    kinds = {"symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    names = {
        "traversal": "../../07301.png",
        "absolute": f"{outside.parent}/07301.png",
        "NUL": "a\0b/07301.png",
        "right-to-left": "a‮gnp.07301.png",
    }
    odd: dict[str, list] = {kind: [_special("07301.png", code, outside)] for kind, code in kinds.items()}
    odd |= {kind: [(name, dict(members_of(7301))["07301.png"])] for kind, name in names.items()}
    for kind, members in odd.items():
        members = [*members_of(7300), *members, ("07301.cls", b"0")]
        tar = write_tar(bench.scratch().with_suffix(".tar"), members)
        results = bench.read_tars(reader, [tar], batch_size=1)
        rows = [row for result in results for row in result.rows]
        left_out = results[-1].output.partition("left out")[2]
        if expected(7309) in rows:
            verdict = Verdict(SILENT, "what lies outside was delivered")
        elif results[-1].exit != 0:
            verdict = refused(results, tar.name)
        elif expected(7300) in rows and (expected(7301) in rows or "07301" in left_out):
            verdict = Verdict(PASS, "delivered inside" if expected(7301) in rows else "left out by name")
        else:
            verdict = Verdict(SILENT, "samples lost without a word")
        verdicts.append(verdict.of(kind))
        if reader == OURS:
            verdicts += [verdict.of(kind) for verdict in _other_doors(bench, tar)]
        if made := list(bench.folder.rglob("*07301.png")):
            return Verdict(SILENT, f"{kind}: made {made[0]}")
    return joined(verdicts)


def _other_doors(bench: Bench, tar: Path) -> list[Verdict]:
    """`make` of such a tar, and `verify` and `reshard` of a dataset whose shard has become one."""
    found = fixture(bench.scratch(), 4, shard_size=4, first=7310)
    (shard,) = found.tars
    honest = shard.read_bytes()
    shard.write_bytes(tar.read_bytes().ljust(len(honest), b"\0")[: len(honest)])
    fired(shard.read_bytes() != honest, "the shard is as it was")
    made = bench.mim("shards", "make", tar, bench.scratch(), "--labels", "cls", "--workers", 1)
    verify = bench.mim("shards", "verify", found.path, "--workers", 1)
    reshard = bench.mim("shards", "reshard", found.path, bench.scratch(), "--shards", 1, "--workers", 1)
    taken = Verdict(PASS, "taken") if made.exit == 0 else refused([made], tar.name)
    return [taken.of("make"), refused([verify], shard.name).of("verify"), refused([reshard], shard.name).of("reshard")]


def _special(name: str, kind: bytes, target: Path) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, str(target)
    return info


CASES = (
    Case("F1", "pickles among the members", harmful_members),
    Case("F2", "EPS, WMF, PCX and others named .png", other_formats),
    Case("F3", "bombs: images, sparse, gzip, pax, sizes", bombs),
    Case("F4", "traversal, links, devices, odd names", traversal),
)
