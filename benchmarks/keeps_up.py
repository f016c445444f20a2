"""Does the data keep up? The share of the time for which `mim train` waits for data, on local pre-resized shards.

The images are repeated under other names until there are a thousand, and made into shards of short side 256. Then an
MAE is trained on them with each number of workers in turn; what is told is in its log, without the first interval, in
which workers start.

python benchmarks/keeps_up.py FOLDER_OF_JPEGS --model vit_tiny_patch16_224 --steps 120 --out keeps_up.json
python benchmarks/keeps_up.py FOLDER_OF_JPEGS --model vit_base_patch16_224 --batch-size 16 --steps 40
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mim.config import to_yaml
from mim.data.make import make
from mim.log import read_log

IMAGES, SHORT = 1000, 256


def write_shards(images, folder):
    """Shards of so many images, repeated under other names, resized."""
    (folder / "images").mkdir()
    files = [file for file in sorted(images.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise SystemExit(f"{images} holds no JPEG files")
    for number in range(IMAGES):
        (folder / f"images/{number:04d}.jpg").write_bytes(files[number % len(files)].read_bytes())
    make(folder / "images", folder / "shards", shard_size=250, short=SHORT)
    return folder / "shards"


def recipe_of(shards, arguments, workers):
    """MAE of the given model, in bfloat16."""
    return {
        "data": {"path": str(shards), "image_size": 224, "view": {"name": "crop", "scale": [0.2, 1.0]}},
        "mask": {"name": "random", "ratio": 0.75},
        "encoder": {"name": "vit", "model": arguments.model},
        "objective": {"name": "mae", "decoder_width": arguments.decoder_width},
        "optim": {
            "batch_size": arguments.batch_size,
            "length": f"{arguments.steps} steps",
            "warmup": "10 steps",
            "lr": 1e-4,
        },
        "train": {"precision": "bf16", "cpu": True, "log_every": "5 steps", "workers": workers},
    }


def train(shards, arguments, workers, folder):
    """Train; return images per second and the share of time spent waiting, from the second interval of the log on."""
    recipe, run = folder / f"keeps_up-{workers}.yaml", folder / f"run-{workers}-{time.monotonic_ns()}"
    recipe.write_text(to_yaml(recipe_of(shards, arguments, workers)))
    command = [sys.executable, "-m", "mim", "train", str(recipe), f"train.run={run}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    entries = [entry for entry in read_log(run / "log.jsonl") if entry["event"] == "train"][1:]
    waits = [100 * entry["data_wait"] for entry in entries]
    return {
        "model": arguments.model,
        "workers": workers,
        "images_per_s": statistics.median(entry["images_per_s"] for entry in entries),
        "wait_percent": round(statistics.mean(waits), 2),
        "most_percent": round(max(waits), 2),
        "epochs": round(entries[-1]["epoch"], 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="JPEG files, at any depth")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of timm (default: %(default)s)")
    parser.add_argument("--decoder-width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", type=Path, help="made before by this program (default: they are made)")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = arguments.shards or write_shards(arguments.folder, folder)
        print(f"{'model':24} {'workers':>7} {'images/s':>9} {'waiting, mean':>14} {'most':>7}")
        for workers in arguments.workers:
            results.append(found := train(shards, arguments, workers, folder))
            print(
                f"{found['model']:24} {workers:>7} {found['images_per_s']:9.1f} {found['wait_percent']:12.2f} % "
                f"{found['most_percent']:5.2f} %",
                flush=True,
            )
    if arguments.out:
        facts = {"date": time.strftime("%Y-%m-%d"), "cpus": len(os.sched_getaffinity(0)), "results": results}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
