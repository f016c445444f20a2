"""What a run learns, the directory that keeps it, and the lines that it starts with.

A run directory belongs to one experiment: the sections that decide what is learned, with the dataset's id and the
frozen tokenizer's hash, and without paths. The machine may change between two starts of a run, the experiment may not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import tokenizer as tokenizers
from mim import build, config, frozen_networks, optim
from mim.data import mixture, order, tokens
from mim.pretrained import weights
from mim.saving import checkpoint

PATCHES_PER_CODE = 256  # below which a smaller codebook is proposed
EXPERIMENT = ("data", "mask", "encoder", "tokenizer", "teacher", "objective", "optim")


def identity(sections: dict[str, Any], dataset: mixture.AnyDataset) -> dict[str, Any]:
    """What is learned: the experiment sections without paths, the dataset's id and the frozen tokenizer's hash."""
    found = {name: config.plain(sections.get(name)) for name in EXPERIMENT}
    looks = ("path", "sources", "val_path", "eval_view", "labels_from_folders", "val_ratio", "bad_budget")
    found["data"] = {key: value for key, value in found["data"].items() if key not in looks}
    found["dataset_id"] = dataset.id
    if sections.get("teacher") is not None:
        found["teacher"] = {key: sections["teacher"].get(key) for key in ("step", "experiment")}
    if (sections.get("encoder") or {}).get("init") is not None:  # a resume never reads it again, so it may move
        found["encoder"] = {**found["encoder"], "init": Path(sections["encoder"]["init"]).name}
    if (sections.get("init") or {}).get("run") is not None:
        found["init"] = {**sections["init"], "run": Path(sections["init"]["run"]).name}
    if sections.get("encoder") is not None and sections.get("tokenizer") is not None:
        cached = sections.get("tokens")  # its codes are those of the tokenizer that the cache names
        found["tokenizer"] = (
            tokens.TokenCache.open(cached).tokenizer.sha256
            if cached is not None
            else tokenizers.file_hash(sections["tokenizer"]["path"])
        )
    return found


def open_run(
    run: Path, recipe: str, sections: dict[str, Any], experiment: dict[str, Any], start: weights.Start
) -> None:
    """Create the run directory and write its resolved recipe, its parent, and the report on its first weights."""
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / ".config.yaml.tmp"
    saved = {"format": checkpoint.FORMAT, "recipe": recipe, **sections, "experiment": experiment}
    if start.report is not None:
        start.report.write(run)
        saved |= {"parent": start.parent}
    elif (run / "config.yaml").is_file():
        saved |= {"parent": checkpoint.read_config(run).get("parent")}
    temporary.write_text(config.to_yaml(saved))
    temporary.replace(run / "config.yaml")


def describe(
    run: Path,
    built: build.Built,
    rates: optim.Rates,
    dataset: mixture.AnyDataset,
    accelerator: Accelerator,
    *,
    micro_batches: int,
    workers: int,
) -> list[str]:
    """The start lines: what is really used, not what was asked for."""
    device = accelerator.device
    with accelerator.autocast():
        probe = torch.ones(8, 8, device=device)
        matmul = str((probe @ probe).dtype).removeprefix("torch.")
    batch_size, ranks, micro = rates.cfg.batch_size, accelerator.num_processes, micro_batches
    rows = order.Plan(built.views.data.repeats, batch_size, world=ranks, micro_batches=micro).micro_size
    count = sum(p.numel() for p in built.objective.parameters() if p.requires_grad) / 1e6
    inside = sum(p.numel() for p in built.encoder.parameters()) / 1e6 if built.encoder is not None else 0.0
    cache, dtype = built.views.cache, frozen_networks.dtype_of(accelerator.mixed_precision)
    epoch = len(dataset) / batch_size
    objective = built.sections["objective"]["name"]
    return [
        f"{objective} -> {run}: {count:.2f} M trained parameters" + (f", encoder {inside:.2f} M" if inside else ""),
        f"device {device_name(device)}, matmul in {matmul}, {ranks} rank{'s' * (ranks > 1)}, "
        f"batch {batch_size} = {ranks} x {micro} micro-batch{'es' * (micro > 1)} of {rows}, "
        f"{workers} loader workers per rank",
        f"data {dataset.path}: {len(dataset)} images in {len(dataset.counts)} shards, views {built.views.sizes}",
        *(
            [f"the loss of an image depends on the {rows} of its micro-batch: ranks and train.micro_batches change it"]
            if built.objective.per_micro_batch
            else []
        ),
        *([cache.describe(tokens.made_with(rows, device, dtype))] if cache is not None else []),
        *(dataset.describe(batch_size, rates.total_steps) if isinstance(dataset, mixture.Mixture) else []),
        *([patches_per_code(built, len(dataset))] if built.encoder is None else []),
        f"1 epoch = {len(dataset)} images = {epoch:.1f} steps; run = {rates.total_steps} steps; "
        f"learning rate {rates.lr:.3g} after {rates.warmup_steps} steps of warm-up",
    ]


def device_name(device: torch.device) -> str:
    """What people call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def patches_per_code(built: build.Built, num_images: int) -> str:
    """The start line of a tokenizer: how many patches of the dataset there are per code, and a proposal where few.

    A code stands for the mean of the patches that it takes, and that of 256 is known to 1/16 of their spread; k-means
    of faiss draws as many points per centroid (`max_points_per_centroid`), for more bring little. A code that is ten
    times rarer than the mean, which counts as just in use, still has 25. The proposal is the largest power of two that
    has them. Only the images count: further crops show the same patches again.
    """
    num_codes = built.objective.tokenizer.num_codes
    h, w = built.objective.tokenizer.grid(built.views.sizes[0])
    num_patches = num_images * h * w
    line = f"codebook: {num_patches} patches for {num_codes} codes, {num_patches / num_codes:.0f} per code"
    if num_patches >= PATCHES_PER_CODE * num_codes:
        return line
    proposed = 1 << max((num_patches // PATCHES_PER_CODE).bit_length() - 1, 1)
    key = "levels with a product of at most " if "levels" in built.sections["tokenizer"] else "num_codes="
    few = f"fewer than {PATCHES_PER_CODE}: many may stay unused"
    return f"{line}, {few}; consider tokenizer.{key}{proposed}, or more images"
