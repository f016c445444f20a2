"""Does anything grow? The loader with the entries of its dataset, and a training with its steps.

The datasets are synthetic: every shard has an index of its own, but all are hard links to one tar of small JPEGs, so
that 10^8 entries take 3 GB of disk. Memory is what Linux says of each process: RSS, and PSS, in which a page that n
processes share counts as 1/n. Files are in the page cache, for they were just written.

    loader   start-up by its phases, a seek to the middle, and memory while batches are drawn: main process and workers
    train    `mim train` of a very small MAE on the first dataset: step time and memory over the run, as straight lines

python benchmarks/growth.py loader --entries 100000 100000000 --folder /tmp/growth --out loader.json
python benchmarks/growth.py train --steps 10000 --workers 0 2 --out train.json
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mim.config import to_yaml
from mim.data import augment, shuffle, stream
from mim.data.make import make
from mim.data.mixture import order_of
from mim.data.shards import LOCK, Dataset, dataset_id, write_lock

PER_SHARD = 1000  # entries
MAX_LINKS = 50_000  # ext4 refuses a file more than 65,000 names
BATCH, SIDE = 64, 32  # images of a loader, pixels
TRAIN_BATCH = 16
POLL = 1.0  # seconds between two looks at a training


# ---- synthetic datasets --------------------------------------------------------------------------


def synthesize(folder, entries):
    """A dataset of so many entries, in shards of PER_SHARD; one that is there is kept."""
    out = folder / f"entries-{entries}"
    if (out / LOCK).is_file():
        return out
    seed = folder / "seed"
    if not (seed / LOCK).is_file():
        write_images(folder / "images")
        make(folder / "images", seed, shard_size=PER_SHARD, workers=1)
    lock = json.loads((seed / LOCK).read_bytes())
    (shard,) = lock["shards"]
    index = (seed / shard["file"]).with_suffix(".npy").read_bytes()
    out.mkdir()
    lock["shards"] = []
    for number in tqdm(range(entries // PER_SHARD), desc=f"{entries} entries", unit=" shards", disable=None):
        name = f"shard-{number:06d}"
        if number % MAX_LINKS == 0:
            tar = out / f"{name}.tar"
            tar.write_bytes((seed / shard["file"]).read_bytes())
        else:
            os.link(tar, out / f"{name}.tar")
        (out / f"{name}.npy").write_bytes(index)
        lock["shards"].append(shard | {"file": f"{name}.tar", "sha256": f"{number:064x}"})
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    write_lock(out, lock)
    return out


def write_images(folder):
    """Small JPEGs of noise."""
    folder.mkdir(exist_ok=True)
    for number in range(PER_SHARD):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=75)


# ---- memory --------------------------------------------------------------------------------------


def memory(pid):
    """RSS and PSS of a process, MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0].lower(): int(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")}
    return {name: round(found[name], 1) for name in ("rss", "pss")}


def family(pid, children):
    """Memory of a process and of the workers of its loader; None when one of them has just ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return {"main": memory(pid), "workers": [memory(child) for child in children]}


def cpu_seconds(pid):
    """What a process has computed so far; other work on the machine does not change it much."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loader_workers(pid):
    """The processes of a training's loader: torch gives them a name."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().startswith("pt_data_worker"):
                found.append(int(child))
    return found


# ---- the loader ----------------------------------------------------------------------------------


def measure_loader(path, *, workers, batches, middle):
    """Phases of the start in seconds, and memory at ten points of the way. Runs in a process of its own."""
    at_first = memory(os.getpid())
    marks = [time.perf_counter()]
    dataset = Dataset.open(path)
    marks.append(time.perf_counter())
    order = order_of(dataset, seed=0)
    told = shuffle.report(order, dataset, batch_size=BATCH).summary
    marks.append(time.perf_counter())
    found = stream.loader(
        dataset,
        order=order,
        view=functools.partial(augment.crop, scale=(0.2, 1.0)),
        sizes=[(SIDE, SIDE)],
        batch_size=BATCH,
        position=len(dataset) // 2 if middle else 0,
        num_steps=batches,
        workers=workers,
    )
    iterator, points = iter(found), []
    for number in range(batches):
        batch = next(iterator)
        if number == 0:
            marks.append(time.perf_counter())
        if number == 0 or (number + 1) % (batches // 10) == 0:
            own = [child.pid for child in multiprocessing.active_children()]
            points.append({"batch": number + 1, **family(os.getpid(), own)})
    phases = dict(zip(("open", "order and report", "first batch"), np.diff(marks).round(3).tolist(), strict=True))
    return {
        "entries": len(dataset),
        "shards": len(dataset.counts),
        "order": told,
        "workers": workers,
        "middle": middle,
        "seconds": {**phases, "start-up": round(marks[-1] - marks[0], 3)},
        "imported": at_first,
        "points": points,
        "fingerprint": f"{batch['fingerprint']:016x}",
    }


def loader_table(results):
    lines = [
        f"{'entries':>10} {'from':>7} {'workers':>7} | {'open':>6} {'order':>6} {'batch':>6} {'all':>6} s | "
        f"main RSS, PSS MiB | worker RSS, PSS MiB | PSS of all, first to last batch"
    ]
    for found in results:
        first, last = found["points"][0], found["points"][-1]
        largest = max(last["workers"], key=lambda worker: worker["pss"], default={"rss": 0, "pss": 0})
        sums = [point["main"]["pss"] + sum(worker["pss"] for worker in point["workers"]) for point in (first, last)]
        lines.append(
            f"{found['entries']:>10} {'middle' if found['middle'] else 'start':>7} {found['workers']:>7} | "
            + " ".join(f"{seconds:6.2f}" for seconds in found["seconds"].values())
            + f"   | {last['main']['rss']:8.0f} {last['main']['pss']:8.0f}"
            + f" | {largest['rss']:9.0f} {largest['pss']:9.0f}"
            + f" | {sums[0]:.0f} to {sums[1]:.0f}"
        )
    return "\n".join(lines)


def run_loader(arguments, folder):
    results = []
    for entries in arguments.entries:
        path = synthesize(folder, entries)
        for workers in arguments.workers:
            for middle in (False, True):
                case = ["--workers", str(workers), "--batches", str(arguments.batches), *["--middle"] * middle]
                command = [sys.executable, __file__, "one-loader", str(path), *case]
                results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                print(loader_table(results[-1:]).splitlines()[1], file=sys.stderr)
    print(loader_table(results))
    return results


# ---- a training ----------------------------------------------------------------------------------


def write_recipe(file, path, *, steps, workers):
    """A very small MAE; its epochs, log, saves and average come often."""
    sections = {
        "data": {"path": str(path), "image_size": 16, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.75},
        "encoder": {
            "name": "vit",
            "model": "vit_tiny_patch16_224",
            "width": 24,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
        },
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "optim": {
            "batch_size": TRAIN_BATCH,
            "length": f"{steps} steps",
            "warmup": "100 steps",
            "lr": 1e-3,
            "ema": 0.999,
        },
        "train": {"log_every": "10 steps", "save_every": "500 steps", "workers": workers, "cpu": True},
    }
    file.write_text(to_yaml(sections))


def follow_training(folder, path, *, steps, workers):
    """Run `mim train`; return its log lines, and what its processes took in memory at which step."""
    recipe, run = folder / f"small-{workers}.yaml", folder / f"run-{workers}"
    write_recipe(recipe, path, steps=steps, workers=workers)
    log, points = run / "log.jsonl", []
    command = [sys.executable, "-m", "mim", "train", str(recipe), f"train.run={run}"]
    with (folder / f"run-{workers}.txt").open("w") as output, tqdm(total=steps, unit=" steps", disable=None) as bar:
        training = subprocess.Popen(command, stderr=output, stdout=output)
        while training.poll() is None:
            time.sleep(POLL)
            entries = read_lines(log)
            taken = family(training.pid, loader_workers(training.pid))
            if entries and taken and training.poll() is None:
                points.append({"step": entries[-1]["step"], "cpu_s": cpu_seconds(training.pid), **taken})
                bar.update(entries[-1]["step"] - bar.n)
    if training.returncode:
        raise SystemExit(f"the training ended with {training.returncode}; {folder}/run-{workers}.txt says why")
    return read_lines(log), points


def read_lines(log):
    """The train lines of a run log, without one that is being written."""
    if not log.is_file():
        return []
    lines = log.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["event"] == "train"]


def slope(x, y, per):
    """Slope of a straight line per so many of x, and its standard error."""
    x, y = np.asarray(x, float) / per, np.asarray(y, float)
    (rate, _), covariance = np.polyfit(x, y, 1, cov=True)
    return round(float(rate), 4), round(float(covariance[0, 0] ** 0.5), 4)


def summarize(entries, points, *, steps, workers):
    """Step times and memory of a training; its first tenth is a warm-up of allocators and left out of the slopes."""
    late = [entry for entry in entries if entry["step"] > steps // 10]
    ms = {entry["step"]: 1e3 * TRAIN_BATCH / entry["images_per_s"] for entry in entries}
    begin, end = ([ms[s] for s in ms if low < s <= low + steps // 10] for low in (0, steps - steps // 10))
    kept = [point for point in points if point["step"] > steps // 10 and len(point["workers"]) == workers]
    times = [point["step"] for point in kept]
    steps_between, cpu = np.diff(times), 1e3 * np.diff([point["cpu_s"] for point in kept])
    middles = (np.array(times[1:]) + np.array(times[:-1]))[steps_between > 0] / 2
    found = {
        "steps": steps,
        "workers": workers,
        "epochs": round(entries[-1]["epoch"], 1),
        "ms_first_tenth": round(statistics.median(begin), 2),
        "ms_last_tenth": round(statistics.median(end), 2),
        "ms_per_1000_steps": slope([e["step"] for e in late], [ms[e["step"]] for e in late], 1000),
        "cpu_ms_per_1000_steps": slope(middles, (cpu / np.maximum(steps_between, 1))[steps_between > 0], 1000),
        "data_wait": round(statistics.mean(entry["data_wait"] for entry in late), 4),
        "rss_first_last": [kept[0]["main"]["rss"], kept[-1]["main"]["rss"]],
        "rss_per_1000_steps": slope(times, [point["main"]["rss"] for point in kept], 1000),
        "pss_per_1000_steps": slope(times, [sum_of(point) for point in kept], 1000),
        "points": points,
    }
    for number in range(workers):
        values = [point["workers"][number]["rss"] for point in kept]
        found[f"worker_{number}"] = {"rss_first_last": [values[0], values[-1]], "slope": slope(times, values, 1000)}
    return found


def sum_of(point):
    return point["main"]["pss"] + sum(worker["pss"] for worker in point["workers"])


def run_train(arguments, folder):
    path, results = synthesize(folder, arguments.entries[0]), []
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            lines = follow_training(Path(place), path, steps=arguments.steps, workers=workers)
        results.append(summarize(*lines, steps=arguments.steps, workers=workers))
        print(json.dumps({name: value for name, value in results[-1].items() if name != "points"}, indent=1))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, entries in (("loader", [10**5, 10**8]), ("train", [20_000])):
        part = parts.add_parser(name)
        part.add_argument("--entries", type=int, nargs="+", default=entries)
        part.add_argument("--workers", type=int, nargs="+", default=[0, 2])
        part.add_argument("--folder", type=Path, help="keeps the datasets there (default: a temporary folder)")
        part.add_argument("--out", type=Path, help="JSON file")
        part.add_argument("--batches", type=int, default=500, help="drawn from a loader (default: %(default)s)")
        part.add_argument("--steps", type=int, default=10_000, help="of a training (default: %(default)s)")
    one = parts.add_parser("one-loader", help="one case of `loader`, in this process")
    one.add_argument("path", type=Path)
    one.add_argument("--workers", type=int, required=True)
    one.add_argument("--batches", type=int, required=True)
    one.add_argument("--middle", action="store_true")
    arguments = parser.parse_args()
    if arguments.part == "one-loader":
        options = {name: getattr(arguments, name) for name in ("workers", "batches", "middle")}
        print(json.dumps(measure_loader(arguments.path, **options)))
        return
    with contextlib.ExitStack() as at_exit:
        folder = arguments.folder or Path(at_exit.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        results = (run_loader if arguments.part == "loader" else run_train)(arguments, folder)
    if arguments.out:
        facts = {"date": time.strftime("%Y-%m-%d"), "part": arguments.part, "results": results}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
