"""The whole pipeline on real photographs in a few CPU minutes: crops, shards, dVAE, BEiT, MAE, probes, exports, table.

The photographs ship inside scikit-image and scikit-learn, so nothing is downloaded. A crop's label is its photograph;
training and held-out crops come from disjoint regions of it. All networks see gray crops with random contrast,
brightness and inversion: on plain colour crops a colour histogram alone answers three questions out of four.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim import build, train
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data.listing import list_images
from mim.data.make import make
from mim.data.order import rng
from mim.evals import codebook, knn, ridge
from mim.exports import timm as timm_export
from mim.features import Embed, labelled_splits, pooled
from mim.log import clock, say

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


def main(images: Path | None, out: Path, *, seed: int = 0, overrides: tuple[str, ...] = ()) -> None:
    """Run every stage (each resumes or is skipped when done before), and print the table and where things are.

    `overrides` are applied to all three recipes.
    """
    stages = Stages()
    with stages("crops and shards"):
        photographs = dict(_photographs() if images is None else _own_photographs(images, seed))
        say(f"cutting {TRAIN_CROPS} + {VAL_CROPS} crops of {SIZE} px from each of {len(photographs)} photographs")
        shards = {split: _shards(photographs, out, split, seed) for split in ("train", "val")}
    common = [f"data.path={shards['train']}", f"data.val_path={shards['val']}", f"data.seed={seed}"]
    runs = {name: out / "runs" / name for name in ("dvae", "beit", "mae")}
    for name, run in runs.items():
        tokenizer = [f"tokenizer.path={runs['dvae']}"] if name == "beit" else []
        with stages({"dvae": "tokenizer (dVAE)", "beit": "BEiT", "mae": "MAE"}[name]):
            arguments = [*common, f"optim.seed={seed}", f"train.run={run}", *tokenizer, *overrides]
            if train.main(f"{name}_demo", arguments) != train.DONE:
                raise ConfigError(f"the demo was stopped; `mim demo --out {out}` goes on from there")
    with stages("probes"):
        loaded = {name: build.load_run(runs[name]) for name in runs}
        rows = dict(_probe_all(loaded))
        codes = dict(codebook.run(loaded["beit"], codebook.Config()))
    with stages("exports and their check"):
        checks = {name: _export(loaded[name], out / "exports" / name) for name in ("beit", "mae")}
    results = {
        "photographs": sorted(photographs),
        "accuracy": rows,
        "codes": codes,
        "images_per_s": {name: _images_per_s(run) for name, run in runs.items()},
        "seconds": stages.seconds,
        "export_difference": checks,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(_table(results, out, runs))


class Stages:
    """Announces and times stages: `with stages(name): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._current: tuple[str, float] | None = None

    def __call__(self, name: str) -> Stages:
        say(f"\n== {len(self.seconds) + 1}. {name}")
        self._current = (name, time.perf_counter())
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error: object) -> None:
        assert self._current is not None
        name, began = self._current
        self.seconds[name] = round(time.perf_counter() - began, 1)


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


def _probe_all(loaded: dict[str, LoadedRun]) -> Iterator[tuple[str, dict[str, float]]]:
    """kNN and ridge accuracy of the baselines and of both runs, on the same held-out crops."""
    torch.manual_seed(0)
    fresh = build.build(loaded["mae"].config).encoder.eval()
    random = LoadedRun(None, fresh, {}, loaded["mae"].views, loaded["mae"].config, 0, loaded["mae"].path)
    embeds: dict[str, tuple[LoadedRun, Embed]] = {
        "raw pixels": (random, lambda images: images.flatten(1)),
        "intensity histogram": (random, _histogram),
        "random initialisation": (random, pooled(random, "mean")),
        "BEiT": (loaded["beit"], pooled(loaded["beit"], "mean")),
        "MAE": (loaded["mae"], pooled(loaded["mae"], "mean")),
    }
    knn_cfg, ridge_cfg = knn.Config(), ridge.Config()
    for name, (run, embed) in embeds.items():
        bank, queries = labelled_splits(run, embed, batch_size=256, train_limit=BANK_CROPS, val_limit=None)
        yield (
            name,
            {
                "knn": knn.knn_accuracy(bank, queries, k=knn_cfg.k, temperature=knn_cfg.temperature),
                "ridge": ridge.ridge_accuracy(bank, queries, strengths=ridge_cfg.strengths),
            },
        )


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
        "time: " + ", ".join(f"{name} {clock(seconds)}" for name, seconds in results["seconds"].items())
        + f"; together {clock(sum(results['seconds'].values()))}",
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
