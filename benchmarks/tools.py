"""Speed of the shard tools against the obvious stock way, in interleaved rounds, by the clock and by CPU time.

In each round every variant of a tool runs once, as a user would start it: processes are started, OUT is new, files are
synced. A ratio is the median over rounds of the ratio to the first variant of that round. CPU time is that of all
processes, so it says what a tool costs where the clock says how busy the machine was. MB/s are those of the encoded
images that go in. Files come from the page cache.

    make      webdataset's ShardWriter in a loop over the folder, which decodes nothing; to resize, Pillow in that loop
    index     `tar -t` of every shard, which hashes nothing; ours also decodes up to 1000 images for the statistics,
              which the rows "without statistics" leave out (they decode one)
    verify    `sha256sum` of every shard; with decode, WebDataset(...).decode("pil")
    reshard   WebDataset into ShardWriter

python benchmarks/tools.py FOLDER_OF_IMAGES --out tools.json
python benchmarks/tools.py FOLDER_OF_IMAGES --tools make verify --rounds 7
"""

import argparse
import functools
import io
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import PIL
import torch
import webdataset
from PIL import Image

from mim.data.index import index
from mim.data.listing import list_images
from mim.data.make import make
from mim.data.reshard import reshard
from mim.data.verify import verify

SHORT, QUALITY, NUM_SHARDS = 256, 90, 8
WORKERS = (1, 2)


# ---- what is compared with -----------------------------------------------------------------------


def shard_writer(out, size):
    return webdataset.ShardWriter(str(out / "shard-%05d.tar"), maxcount=size, verbose=0)


def write_folder(folder, files, size, out, *, change=lambda data: data):
    """A folder into shards as WebDataset's documentation does it; no label, no decoding, no shuffle."""
    with shard_writer(out, size) as writer:
        for number, file in enumerate(files):
            path = folder / file
            writer.write({"__key__": f"{number:06d}", path.suffix[1:].lower(): change(path.read_bytes())})


def shrink(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    share = SHORT / min(image.size)
    if share >= 1:
        return data
    image = image.resize([round(side * share) for side in image.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def tars(shards):
    return [str(file) for file in sorted(shards.glob("*.tar"))]


def list_tars(shards, out):
    for file in tars(shards):
        subprocess.run(["tar", "-tf", file], check=True, stdout=subprocess.DEVNULL)


def hash_tars(shards, out):
    subprocess.run(["sha256sum", *tars(shards)], check=True, stdout=subprocess.DEVNULL)


def decode_tars(shards, out):
    for _ in webdataset.WebDataset(tars(shards), shardshuffle=False).decode("pil"):
        pass


def copy_samples(shards, size, out):
    with shard_writer(out, size) as writer:
        for sample in webdataset.WebDataset(tars(shards), shardshuffle=False):
            writer.write({name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")})


# ---- variants: name -> function(out) -------------------------------------------------------------


def ours(name, run):
    return {
        f"ours: {name}, {count} worker{'s'[: count - 1]}": functools.partial(run, workers=count) for count in WORKERS
    }


def make_variants(folder, files, shards, size):
    change = functools.partial(write_folder, folder, files, size)
    return [
        {
            "ShardWriter over the folder": change,
            **ours("make", lambda out, workers: make(folder, out, shard_size=size, workers=workers)),
        },
        {
            f"Pillow to short side {SHORT}, ShardWriter": functools.partial(change, change=shrink),
            **ours(
                f"make --resize short={SHORT}",
                lambda out, workers: make(folder, out, shard_size=size, short=SHORT, workers=workers),
            ),
        },
    ]


def index_variants(folder, files, shards, size):
    def run(out, workers, **options):
        index([str(shards)], out, workers=workers, **options)

    def without_statistics(out, workers, **options):
        with mock.patch("mim.data.index.NUM_MEASURED", 1):
            run(out, workers, **options)

    return [
        {
            "tar -t of every shard": functools.partial(list_tars, shards),
            **ours("index", run),
            **ours("index without statistics", without_statistics),
            **ours("index --headers-only", functools.partial(run, headers_only=True)),
            **ours("same without statistics", functools.partial(without_statistics, headers_only=True)),
        }
    ]


def verify_variants(folder, files, shards, size):
    def run(out, workers, **options):
        assert verify(shards, workers=workers, **options).clean

    return [
        {"sha256sum of every shard": functools.partial(hash_tars, shards), **ours("verify", run)},
        {
            'WebDataset.decode("pil")': functools.partial(decode_tars, shards),
            **ours("verify --decode", functools.partial(run, decode=True)),
        },
    ]


def reshard_variants(folder, files, shards, size):
    count = NUM_SHARDS // 2
    run = functools.partial(copy_samples, shards, -(-len(files) // count))
    copy = ours("reshard", lambda out, workers: reshard(shards, out, num_shards=count, workers=workers))
    return [{"WebDataset into ShardWriter": run, **copy}]


# ---- rounds --------------------------------------------------------------------------------------


def cpu_seconds():
    """Of this process and of all that it has started and that have ended."""
    return sum(os.times()[:4])


def seconds_of(run):
    """Seconds by the clock, and of CPU time, of one run into a new folder."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        if isinstance(run, functools.partial) and run.func in (write_folder, copy_samples):
            out.mkdir()  # ShardWriter expects it
        began, cpu = time.perf_counter(), cpu_seconds()
        run(out)
        return time.perf_counter() - began, cpu_seconds() - cpu


def measure(variants, rounds, count, size):
    clocks, cpus = {name: [] for name in variants}, {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            clock, cpu = seconds_of(run)
            clocks[name].append(clock)
            cpus[name].append(max(cpu, 0.01))  # the resolution
    first, first_cpu = next(iter(clocks.values())), next(iter(cpus.values()))
    return {
        name: {
            "images_per_s": round(count / statistics.median(clock), 1),
            "mb_per_s": round(size / 1e6 / statistics.median(clock), 1),
            "min": round(count / max(clock), 1),
            "max": round(count / min(clock), 1),
            "ratio": ratio(first, clock),
            "images_per_cpu_s": round(count / statistics.median(cpu), 1),
            "cpu_ratio": ratio(first_cpu, cpu),
        }
        for (name, clock), cpu in zip(clocks.items(), cpus.values(), strict=True)
    }


def ratio(first, seconds):
    return round(statistics.median(a / b for a, b in zip(first, seconds, strict=True)), 2)


def show(table):
    print(
        f"\n{'':44} {'images/s':>9} {'(min - max)':>19} {'MB/s':>8} {'ratio':>6} {'/CPU s':>8} {'ratio':>6}", flush=True
    )
    for name, row in table.items():
        print(
            f"{name:44} {row['images_per_s']:9.0f} ({row['min']:8.0f} - {row['max']:6.0f}) {row['mb_per_s']:8.1f} "
            f"{row['ratio']:6.2f} {row['images_per_cpu_s']:8.0f} {row['cpu_ratio']:6.2f}",
            flush=True,
        )


def main():
    tools = {"make": make_variants, "index": index_variants, "verify": verify_variants, "reshard": reshard_variants}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images, at any depth")
    parser.add_argument("--tools", nargs="+", choices=list(tools), default=list(tools))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    images = list_images(arguments.folder).images
    files, num_bytes = [image.path for image in images], sum(image.size for image in images)
    cpus = len(os.sched_getaffinity(0))
    print(f"{len(files)} images, {num_bytes / len(files) / 1024:.1f} KiB each, {NUM_SHARDS} shards, {cpus} CPUs")
    results = {}
    size = -(-len(files) // NUM_SHARDS)
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "shards"
        make(arguments.folder, shards, shard_size=size)
        for tool in arguments.tools:
            tables = [
                measure(variants, arguments.rounds, len(files), num_bytes)
                for variants in tools[tool](arguments.folder, files, shards, size)
            ]
            for table in tables:
                show(table)
            results[tool] = {name: row for table in tables for name, row in table.items()}
    if arguments.out:
        versions = {module.__name__: module.__version__ for module in (torch, PIL, webdataset, np)}
        facts = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(), "cpus": cpus}
        content = {**facts, **versions, "rounds": arguments.rounds, "num_images": len(files), "num_bytes": num_bytes}
        arguments.out.write_text(json.dumps({**content, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
