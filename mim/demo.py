"""The whole pipeline on real photographs in a few CPU minutes: crops, shards, dVAE, BEiT, MAE, probes, exports, table.

The photographs ship inside scikit-image and scikit-learn, so nothing is downloaded. A crop's label is its photograph;
training and held-out crops come from disjoint regions of it. All networks see gray crops with random contrast,
brightness and inversion: on plain colour crops a colour histogram alone answers three questions out of four.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim import build
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data.listing import list_images
from mim.data.make import make
from mim.data.order import rng
from mim.evals import codebook, knn, ridge
from mim.exports import timm as timm_export
from mim.log import clock, say, write_json
from mim.probing.features import Wanted, embed_splits, embedder, ridge_accuracy
from mim.watch.stopping import DONE, STOPPED

SIZE = 64  # pixels of a crop
TRAIN_CROPS, VAL_CROPS = 400, 50  # per photograph
BANK_CROPS = 3600  # training crops that the probes see
NUM_PHOTOGRAPHS = 18
MIN_SIDE = 4 * SIZE  # pixels of an own image: 30 % of its width must hold a crop
SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
    "rocket",
)


LANES = (("dvae", "beit"), ("mae",))  # trained side by side, each in turn: small networks use one core better than two


def main(images: Path | None, out: Path, *, seed: int = 0, overrides: tuple[str, ...] = ()) -> int:
    """Run every stage (each resumes or is skipped when done before), and print the table and where things are.

    `overrides` are applied to all three recipes. Returns the exit code: 0 done, else that of the training that ended.
    """
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    with announced("1. crops and shards", seconds):
        photographs = dict(_photographs() if images is None else _own_photographs(images, seed))
        say(f"cutting {TRAIN_CROPS} + {VAL_CROPS} crops of {SIZE} px from each of {len(photographs)} photographs")
        shards = {split: _shards(photographs, out, split, seed) for split in ("train", "val")}
    common = [f"data.path={shards['train']}", f"data.val_path={shards['val']}", f"data.seed={seed}"]
    runs = {name: out / "runs" / name for lane in LANES for name in lane}
    commands = {
        name: [f"{name}_demo", *common, f"optim.seed={seed}", f"train.run={run}", *overrides]
        for name, run in runs.items()
    }
    commands["beit"] += [f"tokenizer.path={runs['dvae']}", "tokenizer.force=true"]  # of few pictures: go on in any case
    with announced("2. training: the tokenizer (dVAE), then BEiT on its codes; MAE beside them", seconds):
        code = Trainings(commands, seconds).run()
    if code != DONE:
        say(f"the demo ended early; `mim demo --out {out}` goes on from its last checkpoints")
        return code
    with announced("3. probes", seconds):
        loaded = {name: build.load_run(run) for name, run in runs.items()}
        rows = _probe(loaded)
        codes = dict(codebook.run(loaded["beit"], codebook.Config()))
    with announced("4. exports and their check", seconds):
        checks = {name: _export(loaded[name], out / "exports" / name) for name in ("beit", "mae")}
    results = {
        "photographs": sorted(photographs),
        "accuracy": rows,
        "codes": codes,
        "images_per_s": {name: _images_per_s(run) for name, run in runs.items()},
        "seconds": seconds | {"all": round(time.perf_counter() - began, 1)},
        "export_difference": checks,
    }
    write_json(out / "results.json", results)
    print(_table(results, out, runs))
    return DONE


@contextlib.contextmanager
def announced(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say that a stage begins, and note the seconds that it took."""
    say(f"\n== {stage}")
    began = time.perf_counter()
    yield
    seconds[stage.split(". ")[1].split(":")[0]] = round(time.perf_counter() - began, 1)


# ---- trainings -------------------------------------------------------------------------------------------------------


class Trainings:
    """Runs `mim train` for each name of each lane, the lanes side by side on an equal share of the cores.

    Their output is passed on line by line, marked by name. When one fails, the others save and stop; so they do after
    SIGTERM or Ctrl-C.
    """

    def __init__(self, commands: dict[str, list[str]], seconds: dict[str, float]) -> None:
        self.commands = commands
        self.seconds = seconds
        self.processes: list[subprocess.Popen[str]] = []
        self.stopping = False
        cores = len(os.sched_getaffinity(0))
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // len(LANES)))}

    def run(self) -> int:
        """Return 0, or the first other exit code."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(len(LANES)) as pool:
                codes = list(pool.map(self._lane, LANES))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        codes.sort(key=lambda code: code in (DONE, STOPPED))  # a failure before those that it stopped
        return next((code for code in codes if code != DONE), DONE)

    def _lane(self, names: tuple[str, ...]) -> int:
        for name in names:
            began = time.perf_counter()
            code = self._train(name)
            self.seconds[name] = round(time.perf_counter() - began, 1)
            if code != DONE:
                self._stop()
                return code
        return DONE

    def _train(self, name: str) -> int:
        arguments = ["train", *self.commands[name]]
        say(f"{name:4} | $ mim {shlex.join(arguments)}")
        process = subprocess.Popen(
            [sys.executable, "-m", "mim", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # Ctrl-C reaches it through _stop alone, once
        )
        self.processes.append(process)
        if self.stopping:
            process.terminate()
        assert process.stdout is not None
        for line in process.stdout:
            say(f"{name:4} | {line.rstrip()}")
        code = process.wait()
        return code if code >= 0 else STOPPED  # killed by a signal: its last checkpoint is there

    def _stop(self, *_signal: object) -> None:
        self.stopping = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()


# ---- photographs -----------------------------------------------------------------------------------------------------


def _photographs() -> Iterator[tuple[str, np.ndarray]]:
    """The photographs inside scikit-image and scikit-learn, uint8 (H, W) or (H, W, 3)."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ConfigError(
            f"the demo's photographs ship inside scikit-image and scikit-learn ({error}); "
            f"run `pip install 'mimstream[demo]'`, or give your own with `mim demo --images FOLDER`"
        ) from error
    for name in SKIMAGE:
        yield name, getattr(skimage.data, name)()
    yield "motorcycle", skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        yield name, load_sample_image(f"{name}.jpg")


def _own_photographs(folder: Path, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Up to 18 images of a folder, drawn by the seed, each large enough for a crop from 30 % of its width."""
    files = [folder / image.path for image in list_images(folder).images]
    found = 0
    for index in rng("demo", seed, 0, 0).permutation(len(files)):
        with Image.open(files[index]) as image:
            if min(image.size) >= MIN_SIDE and found < NUM_PHOTOGRAPHS:
                found += 1
                yield f"{found:02d}-{files[index].stem}", np.asarray(image.convert("RGB"))
    if found < 2:
        raise ConfigError(f"--images {folder} holds {found} images of at least {MIN_SIDE} px a side; 2 are needed")


def _shards(photographs: dict[str, np.ndarray], out: Path, split: str, seed: int) -> Path:
    """Cut the crops of a split into a folder per photograph and make shards of them."""
    folder, shards = out / "crops" / split, out / "shards" / split
    done = folder / ".done"
    if not done.exists():
        for number, (name, pixels) in enumerate(photographs.items()):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for index, crop in enumerate(_crops(pixels, split, seed, number)):
                crop.save(folder / name / f"{index:04d}.png", compress_level=1)
        done.touch()
    return make(folder, shards, labels_from_folders=True, seed=seed).path


def _crops(pixels: np.ndarray, split: str, seed: int, photograph: int) -> Iterator[Image.Image]:
    """Random squares of 64 to 128 px: for training from the left 70 % of a photograph, else from the right 30 %."""
    border = int(pixels.shape[1] * 0.7)
    region = pixels[:, :border] if split == "train" else pixels[:, border:]
    largest = min(2 * SIZE, *region.shape[:2])
    for index in range(TRAIN_CROPS if split == "train" else VAL_CROPS):
        draw = rng(f"demo/{split}", seed, photograph, index)
        side = int(draw.integers(SIZE, largest + 1))
        top, left = (int(draw.integers(0, n - side + 1)) for n in region.shape[:2])
        crop = Image.fromarray(np.ascontiguousarray(region[top : top + side, left : left + side]))
        yield crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


# ---- probes and exports ----------------------------------------------------------------------------------------------


def _probe(loaded: dict[str, LoadedRun]) -> dict[str, dict[str, float]]:
    """kNN and ridge accuracy of the baselines and of both runs, on the same held-out crops, each decoded once."""
    networks = {
        "random init, as BEiT": _untrained(loaded["beit"]),
        "BEiT": loaded["beit"],
        "random init, as MAE": _untrained(loaded["mae"]),
        "MAE": loaded["mae"],
    }
    embeds = {name: embedder(network, Wanted()) for name, network in networks.items()}

    def together(images: Tensor) -> dict[str, Tensor]:
        baselines = {"raw pixels": images.flatten(1), "intensity histogram": _histogram(images)}
        return baselines | {name: embed(images)["-1/mean"] for name, embed in embeds.items()}  # each (B, D)

    train, val = embed_splits(loaded["mae"], together, batch_size=64, train_limit=BANK_CROPS, val_limit=None)
    knn_cfg, ridge_cfg = knn.Config(), ridge.Config()
    rows = {}
    for name in train.columns:
        bank, queries = train.split(name), val.split(name)
        rows[name] = {
            "knn": knn.knn_accuracy(bank, queries, k=knn_cfg.k, temperature=knn_cfg.temperature),
            "ridge": ridge_accuracy(bank, queries, strengths=ridge_cfg.strengths),
        }
    return rows


def _untrained(loaded: LoadedRun) -> LoadedRun:
    """A run's encoder as it was before training."""
    torch.manual_seed(loaded.config["optim"]["seed"])
    return dataclasses.replace(loaded, encoder=build.build(loaded.config).encoder.eval())


def _histogram(images: Tensor) -> Tensor:
    """Share of pixels in each of 32 levels of gray: (B, C, H, W) -> (B, 32)."""
    levels = (images.mean(dim=1).flatten(1) * 31.999).long()  # (B, H * W)
    return torch.zeros(len(images), 32).scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float32))


def _export(loaded: LoadedRun, out: Path) -> float:
    """Export once; a folder of an earlier demo run is checked by reading its report."""
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())["max_difference"]
    return timm_export.export(loaded, out, timm_export.Config())["max_difference"]


def _images_per_s(run: Path) -> float:
    """Median training speed in the run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float(np.median([line["images_per_s"] for line in lines if line["event"] == "train"]))


def _table(results: dict[str, Any], out: Path, runs: dict[str, Path]) -> str:
    """The results for people."""
    codes, speed = results["codes"], results["images_per_s"]
    chance = 1 / len(results["photographs"])
    lines = [
        "",
        f"Which photograph is a held-out crop from? Accuracy in %, chance {100 * chance:.1f}",
        f"  {'features':24}{'kNN':>8}{'ridge':>8}",
        *(f"  {name:24}{100 * row['knn']:8.1f}{100 * row['ridge']:8.1f}" for name, row in results["accuracy"].items()),
        "",
        f"BEiT predicts {100 * codes['accuracy']:.1f} % of held-out masked codes; "
        f"always guessing the most frequent one: {100 * codes['unigram_accuracy']:.1f} %",
        f"codebook: {100 * codes['usage']:.0f} % of the codes in use, perplexity {codes['perplexity']:.0f}",
        "images/s: " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items()),
        "time: " + ", ".join(f"{name} {clock(value)}" for name, value in results["seconds"].items()),
        "",
        *(f"picture  {_newest_picture(run)}" for run in runs.values()),
        *(
            f"export   {out / 'exports' / name}  (reloaded with timm, largest difference {difference})"
            for name, difference in results["export_difference"].items()
        ),
        f"numbers  {out / 'results.json'}",
    ]  # fmt: skip
    return "\n".join(lines)


def _newest_picture(run: Path) -> Path:
    return max((run / "pictures").glob("reconstruction-*.png"))
