"""Which tokenizer? Short runs of the CIFAR-10 recipes through the loop of `mim train`, and their score cards.

Each kind is a recipe with overrides. The score card is taken over all images of --test at the end of the run; a code is
used from a tenth of the uniform frequency. Rerunning the command resumes what was stopped and skips what is done.

    mim shards make data/cifar10/test shards/cifar10-test --labels-from-folders
    python benchmarks/tokenizers.py --steps 2000 --seeds 0 1 --json tokenizers.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from mim import train
from mim.watch import stopping

FEATURES, PIXELS = "vqkd_mae_cifar10", "vq_pixels_cifar10"
KINDS: dict[str, tuple[str, list[str]]] = {
    "vqkd": (FEATURES, []),
    "vq": (PIXELS, []),
    "fsq": ("fsq_pixels_cifar10", []),
    "dvae": ("dvae_small_cifar10", []),
    "vq without k-means": (PIXELS, ["tokenizer.k_means=0"]),
    "vq without revival": (PIXELS, ["tokenizer.num_revived=0"]),
    "vq without both": (PIXELS, ["tokenizer.k_means=0", "tokenizer.num_revived=0"]),
    "vqkd without revival": (FEATURES, ["tokenizer.num_revived=0"]),
    "vqkd without both": (FEATURES, ["tokenizer.k_means=0", "tokenizer.num_revived=0"]),
}
SHOWN = ("usage", "perplexity", "recon_mae", "teacher_cosine", "distinct", "stable_shift", "stable_jitter", "probe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shards/cifar10", help="dataset folder (default: %(default)s)")
    parser.add_argument("--test", default="shards/cifar10-test", help="dataset of the card (default: %(default)s)")
    parser.add_argument("--teacher", default="runs/mae_vittiny_cifar10", help="run of an MAE (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="updates of 64 images (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of all recipes")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cards: dict[str, list[dict[str, Any]]] = {}
    for kind in arguments.kinds:
        for seed in arguments.seeds:
            cards.setdefault(kind, []).append(card(kind, seed, arguments))
    print(f"\n{'kind':24}{'seed':>5}{'minutes':>9}" + "".join(f"{name:>15}" for name in SHOWN))
    for kind, found in cards.items():
        for row in found:
            values = "".join(f"{row[name]:15.3f}" if name in row else f"{'-':>15}" for name in SHOWN)
            print(f"{kind:24}{row['seed']:5}{row['minutes']:9.1f}{values}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "cards": cards}, indent=1) + "\n")


def card(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one tokenizer, or take what is there, and return its score card over the test images."""
    recipe, overrides = KINDS[kind]
    run = arguments.out / f"{kind.replace(' ', '-')}-{seed}"
    if recipe == FEATURES:
        overrides = [*overrides, f"teacher.path={arguments.teacher}"]
    began = time.monotonic()
    pictures = [] if recipe == FEATURES else [f"evals.reconstruction.every={arguments.steps} steps"]
    options = {
        "data.path": arguments.data,
        "data.val_path": arguments.test,
        "data.val_ratio": 0,
        "data.seed": seed,
        "optim.seed": seed,
        "optim.batch_size": 64,
        "optim.length": f"{arguments.steps} steps",
        "optim.warmup": f"{arguments.steps // 20} steps",
        "train.workers": 0,
        "train.save_every": f"{arguments.steps} steps",
        "train.run": run,
        "evals.codebook.every": f"{arguments.steps} steps",
        "evals.codebook.val_limit": "null",
    }
    code = train.main(
        recipe, [f"{key}={value}" for key, value in options.items()] + pictures + overrides + arguments.set
    )
    assert code == stopping.DONE, f"{run} was stopped"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = next(line for line in reversed(lines) if line.get("eval") == "codebook")
    minutes = run / "minutes.json"
    if not minutes.is_file():
        minutes.write_text(json.dumps((time.monotonic() - began) / 60))
    curve = [{key: line[key] for key in ("step", "usage", "perplexity")} for line in lines if line["event"] == "train"]
    return {**found, "seed": seed, "minutes": json.loads(minutes.read_text()), "curve": curve}


if __name__ == "__main__":
    main()
