"""Tiny trainings: their recipes, their starts, and what they end with, for both trainers.

24 images, 8 a step, so that three steps are an epoch; a checkpoint every two steps. What a run ends with is every
tensor of its last checkpoint (weights, optimizer, average) and its log without the clock: step, loss, norm of the
gradient, rates, position, and the stream's fingerprint, which counts every sample and crop that was trained on.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import tokenizer as tokenizers
from benchmarks.reliability.bench import OURS, Bench, fired
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, Verdict, ended
from mim.config import to_yaml
from mim.saving.checkpoint import list_checkpoints, verify
from tokenizer import dvae

KINDS = ("vqkd", "dvae", "beit", "mae")  # a tokenizer with a codebook, one without, and the two that need none of ours
USUAL_KINDS = ("usual",)
STEPS, EVERY, EPOCH = 12, 2, 3  # of a run, between saves, of an epoch
LIMIT = 90.0  # seconds for a start
LOGGED = ("event", "step", "loss", "grad_norm", "lr", "weight_decay", "skipped", "position", "fingerprint")
SMALL_DVAE = {"num_codes": 16, "width": 8, "num_groups": 3, "blocks_per_group": 1, "n_init": 8}
SMALL_VQKD = {"target": "pixels", "network": "conv", "stride": 4, "width": 8, "depth": 1, "decoder_width": 8,
              "num_codes": 16, "code_width": 4, "decay": 0.5, "dead_below": 0.5}  # fmt: skip


def kinds(reader: str) -> tuple[str, ...]:
    """The trainings of a reader."""
    return KINDS if reader == OURS else USUAL_KINDS


class Training:
    """A tiny training. Starting it again in the same folder goes on."""

    def __init__(self, bench: Bench, kind: str, *, steps: int = STEPS, every: int = EVERY, **changes: Any) -> None:
        self.bench, self.kind, self.steps, self.every = bench, kind, steps, every
        self.recipe = bench.scratch().with_name(f"{kind}.yaml")
        self.changes = changes
        if kind in KINDS:
            self.recipe.write_text(to_yaml(sections(bench, kind, steps, every, changes)))

    def folder(self) -> Path:
        """A new run directory."""
        return self.bench.scratch().with_name("run")

    def start(self, run: Path, *overrides: str, world: int = 1, limit: float = LIMIT, **options: Any) -> list[Result]:
        """Start it, or go on; a result per rank."""
        if "fault" in options:
            options["fault"] = {"folder": str(run / "checkpoints"), **options["fault"]}
        reader, told = self.told(run, *overrides)
        ranks = {"processes": world, "world": world, "grace": 5.0}
        return self.bench.trials.run(reader, limit=limit, **ranks, **told | options)

    def told(self, run: Path, *overrides: str) -> tuple[str, dict[str, Any]]:
        """The name of the trainer, and what a trial tells it."""
        if self.kind in KINDS:
            return "train", {"arguments": ["train", str(self.recipe), f"train.run={run}", *overrides]}
        data = self.bench.whole  # every rank needs a shard of its own
        settings = {"num_steps": self.steps, "save_every": self.every, "num_images": len(data.rows), **self.changes}
        return "train usual", {"run": str(run), "tars": [str(tar) for tar in data.tars], **settings}

    @functools.cached_property
    def reference(self) -> Path:
        """A run of one process that nothing interrupted."""
        return self.whole()

    def whole(self, *overrides: str, **options: Any) -> Path:
        """A run that nothing interrupted."""
        run = self.folder()
        results = self.start(run, *overrides, **options)
        fired(all(result.exit == 0 for result in results), f"{self.kind} does not train: {results[0].text[-600:]}")
        return run

    def judged(self, results: Sequence[Result], run: Path) -> Verdict:
        """Judge that starts ended well and left what the uninterrupted run did."""
        if fault := ended(results):
            return fault
        found = difference(run, self.reference)
        return Verdict(SILENT, found) if found else Verdict(PASS, f"{self.kind}: all tensors and the log are equal")


def sections(bench: Bench, kind: str, steps: int, every: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a tiny training; `changes` are of the form section__key."""
    found: dict[str, Any] = {
        "data": {"path": str(bench.small.path), "image_size": 16, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.75},
        "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 2, "num_heads": 2,
                    "patch_size": 4, "layer_scale": 0.1, "drop_path_rate": 0.2},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "optim": {"batch_size": 8, "length": f"{steps} steps", "warmup": "2 steps", "lr": 3e-3, "ema": 0.9,
                  "clip_grad": 1.0, "weight_decay_end": 0.2},
        "train": {"log_every": "1 steps", "save_every": f"{every} steps", "workers": 0, "cpu": True},
    }  # fmt: skip
    if kind == "beit":
        found["objective"] = {"name": "beit", "num_codes": 16}
        found["tokenizer"] = {"recipe": "dvae", "path": str(saved_tokenizer(bench))}
    if kind in ("vqkd", "dvae"):
        del found["mask"], found["encoder"]
        found["tokenizer"] = {"name": kind, **(SMALL_VQKD if kind == "vqkd" else SMALL_DVAE)}
        found["objective"] = {"name": "tokenize"}
    if kind == "dvae":  # with 1e-8 Adam makes full steps of gradients that are rounding alone, and ranks drift apart
        found["optim"]["eps"] = 1e-5
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if section in found:
            found[section][name] = value
    return found


def saved_tokenizer(bench: Bench) -> Path:
    """A folder with an untrained tokenizer, for BEiT."""
    folder = bench.folder / "tokenizer"
    if not folder.exists():
        folder.mkdir()
        torch.manual_seed(0)
        tokenizers.save(dvae.build(dvae.Config(**SMALL_DVAE)), folder, name="dvae", config=SMALL_DVAE, card={})
    return folder


# ---- what a run ends with ------------------------------------------------------------------------


def tensors(run: Path) -> dict[str, np.ndarray]:
    """Every tensor that a run ended with."""
    if (run / "final.safetensors").exists():
        return load_file(run / "final.safetensors")
    whole = [found for found in reversed(list_checkpoints(run)) if verify(found) is None]
    return saved(whole[0]) if whole else {}


def saved(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of one of our checkpoints."""
    found: dict[str, np.ndarray] = {}
    for file in sorted((checkpoint / "tensors").glob("*.safetensors")):
        found |= load_file(file)
    return found


def log(run: Path) -> list[dict[str, Any]]:
    """The training lines of a log, without what depends on the clock; a step that was made again counts once."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{key: entry[key] for key in LOGGED if key in entry} for entry in entries if entry["event"] == "train"]
    if (run / "final.safetensors").exists():  # the usual recipe never cuts its log: the last of a step is the one
        kept = list({entry["step"]: entry for entry in kept}.values())
    return kept


def difference(run: Path, reference: Path) -> str | None:
    """What differs between two runs, bit for bit; None when nothing does."""
    mine, theirs = tensors(run), tensors(reference)
    fired(theirs, f"the uninterrupted run {reference} saved nothing")
    if mine.keys() != theirs.keys():
        return f"{len(mine)} tensors instead of {len(theirs)}"
    unlike = [name for name, value in theirs.items() if mine[name].tobytes() != value.tobytes()]
    if unlike:
        most = max(float(np.abs(mine[name].astype(float) - theirs[name]).max()) for name in unlike)
        return f"{len(unlike)} of {len(theirs)} tensors differ, by up to {most:.2g} ({unlike[0]})"
    if log(run) != log(reference):
        steps = [a["step"] for a, b in zip(log(run), log(reference), strict=False) if a != b]
        return f"the logs differ from step {steps[0]} on" if steps else "the logs differ in length"
    return None


def distance(run: Path, reference: Path) -> float:
    """Largest absolute difference of any trained tensor and of any loss.

    Left out: the bias of the keys, whose gradient is zero but for rounding, so that Adam makes steps of noise.
    """
    mine, theirs = tensors(run), tensors(reference)
    fired(theirs, f"the uninterrupted run {reference} saved nothing")
    if mine.keys() != theirs.keys():
        return float("inf")
    found = [abs(a["loss"] - b["loss"]) for a, b in zip(log(run), log(reference), strict=True)]
    for name, value in theirs.items():
        if name.startswith(("model.", "ema.")):
            apart = np.abs(mine[name].astype(float) - value)
            if name.endswith("qkv.bias"):
                apart[len(apart) // 3 : 2 * len(apart) // 3] = 0
            found.append(float(apart.max(initial=0.0)))
    return max(found)


def resumed_at(result: Result) -> int:
    """The step that a start went on from; 0 for a fresh start."""
    found = re.search(r"resumed at step (\d+)", result.output)
    return int(found[1]) if found else 0


def was(results: Sequence[Result], event: str = "fault") -> list[list[str]]:
    """The faults that happened, as their own process said before they did."""
    return [found for result in results for found in result.events if found[0] == event]
