"""A run directory as a training of MAE leaves it, with losses, probes, pictures and incidents; made of a seed."""

import json
import math

import numpy as np
from PIL import Image

from mim.config import to_yaml

SECTIONS = {
    "format": 1,
    "recipe": "mae_vittiny_cifar10",
    "data": {"path": "shards/photos", "image_size": 32, "channels": 3, "seed": 0},
    "objective": {"name": "mae", "norm_pix_loss": True, "decoder_width": 128},
    "optim": {"name": "adamw", "batch_size": 256, "length": "10000 steps", "lr": 1e-3, "weight_decay": 0.05},
    "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "patch_size": 4},
    "mask": {"name": "random", "ratio": 0.75},
    "train": {"precision": "no", "log_every": "10 steps"},
    "experiment": {"dataset_id": "b96c6136cc8893817aba", "objective": {"name": "mae"}},
}


def write_run(folder, *, steps=10_000, log_every=10, picture_every=500, rate=1e-3, seed=0):
    """Write it, and return its folder."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    sections = {**SECTIONS, "optim": {**SECTIONS["optim"], "lr": rate}}
    (folder / "config.yaml").write_text(to_yaml(sections))
    saved = {"format": 1, "step": steps, "ranks": 2, "versions": {"mimstream": "0.1.0", "torch": "2.11.0"}}
    (folder / f"checkpoints/step-{steps:08d}/state.json").write_text(json.dumps(saved))
    status = {"state": "done", "step": steps, "of": steps, "recipe": "mae_vittiny_cifar10", "reason": None, "time": 0}
    (folder / "status.json").write_text(json.dumps(status))
    with (folder / "log.jsonl").open("w") as log:
        for step in range(log_every, steps + 1, log_every):
            log.writelines(json.dumps(line) + "\n" for line in _lines(step, steps, picture_every, rate, rng, folder))
    bad = {"event": "bad", "step": 70, "sample": 3, "key": "photos-0001.tar/0003", "reason": "truncated JPEG"}
    (folder / "journal.jsonl").write_text(json.dumps(bad) + "\n")
    return folder


def _lines(step, steps, picture_every, rate, rng, folder):
    progress = step / steps
    loss = 0.42 + 0.55 * math.exp(-6 * progress) + rng.normal(0, 0.004)
    if step == 200:
        yield {"event": "resumed", "step": step, "checkpoint": "step-00000200", "saved_by_ranks": 1, "ranks": 2}
    if step in (400, 420):
        yield {"event": "skipped", "step": step}
    yield {
        "event": "train", "step": step, "loss": loss,
        "grad_norm": 0.3 + 2 * math.exp(-20 * progress) + rng.gamma(1, 0.02),
        "skipped": 0.0, "lr": rate * min(step / 500, 0.5 + 0.5 * math.cos(math.pi * progress)), "weight_decay": 0.05,
        "epoch": progress * 40, "num_bad": 1, "images_per_s": 900 + rng.normal(0, 20), "data_wait": 0.03,
        "eta_s": steps - step, "position": 256 * step, "fingerprint": f"{step:016x}",
    }  # fmt: skip
    if step % picture_every == 0:
        yield {"event": "eval", "step": step, "eval": "knn", "knn": 0.6 - 0.4 * math.exp(-4 * progress)}
        yield {
            "event": "eval", "step": step, "eval": "health", "val_loss": loss + 0.01, "baseline_mean_patch": 0.98,
            "baseline_copy": 1.4, "skill": 1 - (loss + 0.01) / 0.98, "rankme": 150 * progress + 8,
            "attention_distance/1": 9.0,
        }  # fmt: skip
        for name in ("reconstruction", "attention"):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((240, 200), Image.Resampling.BICUBIC)
            picture.save(folder / f"pictures/{name}-{step:08d}.png")
