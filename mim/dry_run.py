"""`mim train RECIPE --dry-run`: what a recipe comes to on this machine, before a step is taken or a file written.

With the data at hand, and the tokenizer or teacher if it needs one, everything is checked as a training would and the
start lines are told first. Without them the numbers are the same: a tokenizer and a teacher are planned from their own
recipes, and `--images` states the size of the data, without which durations in epochs have no length. `mim plan` tells
what a run takes on hardware that need not be here (mim/plan.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import click
import torch

from mim import build, config, frozen_networks, job, looking, optim, train
from mim.blocks import recompute
from mim.config import ConfigError
from mim.data import mixture, order, shards
from mim.log import say
from mim.planning import footprint
from mim.watch import stopping

TB, GIB = 1e12, 2**30
DEVICES = (16, 24, 40, 80, 141)  # GiB of usual accelerators
COLUMNS, ROWS = 60, 6  # of the learning rate's plot
BLOCKS = " ▁▂▃▄▅▆▇█"


def main(recipe: str, overrides: list[str], *, images: int | None = None, as_json: bool = False) -> int:
    """Print a recipe's plan as text or JSON; `images` stands for data that is not opened. Returns the exit code."""
    cfg = config.typed(job.Config, config.read(recipe, overrides))
    absent = [f"data.path={path}" for path in data_paths(cfg) if not path.exists()]
    missing = list(untrained(cfg))
    trained = not missing
    if images is None and not absent and trained:
        train.main(recipe, overrides, dry_run=True)
    state = accelerate.PartialState(cpu=cfg.train.cpu or not torch.accelerator.is_available())
    for name, own in missing:
        say(f"no trained {name} yet: planned from its {own}", main=state.is_main_process)
    dataset = None
    if images is None and not absent:
        dataset, _ = build.open_data(config.plain(cfg))
        images = len(dataset)
    elif images is None and (key := next(epochs_in(config.plain(cfg)), None)):
        raise ConfigError(
            f"{absent[0]} is not there, and {key} counts its epochs; give the data, or the number of its images as "
            f"--images (ImageNet-1k: --images 1281167)"
        )
    found = resolve(
        cfg, Path(recipe).stem, num_images=images, dataset=dataset, trained=trained, world=state.num_processes
    )
    if state.is_main_process:
        click.echo(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    return stopping.DONE


def data_paths(cfg: job.Config) -> list[Path]:
    """The folders of the training data."""
    sources = cfg.data.get("sources") or [{"path": cfg.data.get("path")}]
    return [Path(str(source["path"])).expanduser() for source in sources]


def untrained(cfg: job.Config) -> Iterator[tuple[str, str]]:
    """The frozen networks that a recipe needs and does not find, each with its own recipe; one without is refused."""
    frozen = {
        "tokenizer": cfg.tokenizer if cfg.encoder is not None and cfg.tokens is None else None,
        "teacher": cfg.teacher,
    }
    find = {"tokenizer": frozen_networks.tokenizer_path, "teacher": frozen_networks.teacher_path}
    for name, section in frozen.items():
        if section is not None and section.get("model") is not None:
            yield name, f"timm model {section['model']}, of which a plan reads no weights"
            continue
        try:
            if section is not None:
                find[name](section)
        except ConfigError:
            if not section or not (section.get("recipe") or section.get("encoder")):
                raise
            yield name, f"recipe {section['recipe']}" if section.get("recipe") else f"section {name}.encoder"


def epochs_in(value: Any, key: str = "") -> Iterator[str]:
    """`key='300 epochs'` of every duration in epochs inside a recipe."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from epochs_in(inside, f"{key}.{name}" if key else name)
    elif isinstance(value, str) and re.fullmatch(r"\s*[\d._e]+\s*epochs?\s*", value):
        yield f"{key}={value!r}"


# ---- numbers -------------------------------------------------------------------------------------


def resolve(
    cfg: job.Config,
    name: str,
    *,
    num_images: int | None,
    dataset: mixture.AnyDataset | None,
    trained: bool,
    world: int,
) -> dict[str, Any]:
    """What a recipe comes to, as plain data: what `--json` prints. `trained`: its frozen networks are there."""
    rates = optim.resolve(cfg.optim, num_images or 1)  # without epochs the number of images is not used
    every = looking.intervals(cfg, num_images or 1)
    with torch.device("meta"):
        built = build.build(config.plain(cfg), dataset=dataset, load_frozen=trained)
    if cfg.train.activation_checkpointing:
        recompute(built.objective)
    repeats, micro = built.views.data.repeats, cfg.train.micro_batches
    rows = order.Plan(repeats, cfg.optim.batch_size, world=world, micro_batches=micro).micro_size
    scales = [group["lr_scale"] for group in optim.parameter_groups(built.objective, cfg.optim)]
    cost = footprint.measure(built, cfg.optim, rows=rows, micro_batches=micro, precision=cfg.train.precision)
    steps, batch_size = rates.total_steps, cfg.optim.batch_size
    moments = {"start": 0, "end of warm-up": rates.warmup_steps, "half": steps // 2, "end": steps - 1}
    saved = sum(cost.weights[name] for name in ("weights", "optimizer", "average"))
    return {
        "recipe": name,
        "objective": built.sections["objective"]["name"],
        "encoder": built.sections["encoder"]["name"] if built.encoder is not None else None,
        "views": [list(size) for size in built.views.sizes],
        "images": num_images,
        "parts": {part: asdict(value) for part, value in cost.parts.items()},
        "flops_per_image": cost.flops(),
        "flops": cost.flops() * steps * batch_size,
        "tokens": cost.tokens,
        "batch": {"size": batch_size, "ranks": world, "micro_batches": micro, "rows": rows},
        "length": {
            "steps": steps,
            "images": steps * batch_size,
            "epochs": steps * batch_size / num_images if num_images else None,
            "steps_per_epoch": num_images / batch_size if num_images else None,
        },
        "warmup_steps": rates.warmup_steps,
        "lr": {moment: {"step": step, "lr": rates.at(step)[0]} for moment, step in moments.items()},
        "lr_curve": [rates.at(round(i * (steps - 1) / (COLUMNS - 1)))[0] for i in range(COLUMNS)],
        "lr_scale": [min(scales), max(scales)],
        "weight_decay": [rates.at(0)[1], rates.at(steps - 1)[1]],
        "optimizer": cfg.optim.name,
        "betas": list(cfg.optim.betas),
        "ema": cfg.optim.ema,
        "clip_grad": cfg.optim.clip_grad,
        "memory": {
            "precision": cfg.train.precision,
            **cost.weights,
            "activations": cost.activations,
            "peak": cost.peak,
            "total": cost.total,
        },
        "fits": {size: smallest_split(cost, size * GIB, batch_size, world, repeats) for size in DEVICES},
        "every": every,
        "checkpoint_bytes": saved,
        "bytes_per_epoch": round(bytes_per_image(dataset) * len(dataset) / repeats) if dataset is not None else None,
    }


def smallest_split(cost: footprint.Footprint, size: float, batch_size: int, world: int, repeats: int) -> int | None:
    """The fewest micro-batches, a power of two, with which a step fits `size` bytes; None: not one image fits."""
    micro = 1
    while batch_size >= world * micro:
        rows = order.Plan(repeats, batch_size, world=world, micro_batches=micro).micro_size
        if cost.total_at(rows) <= size:
            return micro
        micro *= 2
    return None


def bytes_per_image(dataset: mixture.AnyDataset) -> float:
    """Bytes that a shard holds per image, labels and tar headers included; of a mixture the mean of its draws."""
    if isinstance(dataset, mixture.Mixture):
        parts = zip(dataset.datasets, dataset.shares, strict=True)
        return sum(bytes_per_image(part) * share for part, share in parts) / sum(dataset.shares)
    return shards.inspect(dataset.path)["num_bytes"] / len(dataset)


# ---- text ----------------------------------------------------------------------------------------


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan for people."""
    yield f"{plan['recipe']}: {plan['objective']}" + (f" on {plan['encoder']}" if plan["encoder"] else "")
    yield from part_lines(plan)
    yield "tokens per image: " + ", ".join(f"{number} {name}" for name, number in plan["tokens"].items())
    batch, length = plan["batch"], plan["length"]
    yield (
        f"batch {batch['size']} = {batch['ranks']} rank{'s' * (batch['ranks'] > 1)} x {batch['micro_batches']} "
        f"micro-batch{'es' * (batch['micro_batches'] > 1)} of {batch['rows']}"
    )
    of = f"{length['epochs']:.6g} epochs of {plan['images']} images = " if length["epochs"] else ""
    yield f"run: {of}{length['steps']} steps = {length['images']} images"
    if length["steps_per_epoch"]:
        yield f"  1 epoch = {length['steps_per_epoch']:.1f} steps"
    yield f"  {plan['flops']:.3g} FLOP = {plan['flops'] / (100 * TB * 3600):.3g} device hours at 100 TFLOP/s"
    yield from rate_lines(plan)
    yield from memory_lines(plan)
    count = {name: math.ceil(length["steps"] / steps) for name, steps in plan["every"].items()}
    yield "every: " + ", ".join(f"{name} {steps} steps ({count[name]} times)" for name, steps in plan["every"].items())
    yield f"checkpoint: {plan['checkpoint_bytes'] / GIB:.2f} GiB"
    if plan["bytes_per_epoch"] is not None:
        yield f"reads {plan['bytes_per_epoch'] / GIB:.2f} GiB per epoch"


def part_lines(plan: dict[str, Any]) -> Iterator[str]:
    """A table: parameters and operations of each part."""
    yield f"{'':16}{'parameters':>12}{'trained':>12}{'forward':>12}{'backward':>12}  GFLOP per image"
    total = [0.0] * 4
    for name, part in plan["parts"].items():
        values = [part["parameters"] / 1e6, part["trained"] / 1e6, part["forward"] / 1e9, part["backward"] / 1e9]
        total = [a + b for a, b in zip(total, values, strict=True)]
        yield row(name, values)
    yield row("total", total)


def row(name: str, values: list[float]) -> str:
    millions, flops = values[:2], values[2:]
    return f"{name:16}" + "".join(f"{v:>10.2f} M" for v in millions) + "".join(f"{v:>12.3f}" for v in flops)


def rate_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The learning rate as a plot and at named steps, then what else the optimizer is told."""
    curve = plan["lr_curve"]
    top = max(curve)
    for level in reversed(range(ROWS)):
        eighths = [min(max(round(8 * (lr / top * ROWS - level)), 0), 8) for lr in curve]
        yield f"{f'{top:.3g}' if level == ROWS - 1 else '':>10} |" + "".join(BLOCKS[n] for n in eighths).rstrip()
    yield f"{'0':>10} +" + "-" * COLUMNS
    low, high = plan["lr_scale"]
    named = (f"{value['lr']:.3g} at step {value['step']} ({name})" for name, value in plan["lr"].items())
    yield "learning rate: " + ", ".join(named)
    if low < high:
        yield f"  times {low:.3g} in the lowest layer to {high:.3g} in the head"
    first, last = plan["weight_decay"]
    yield (
        f"weight decay {first:g}{f' to {last:g}' if last != first else ''}, {plan['optimizer']} betas {plan['betas']}, "
        + ("no average of the weights, " if plan["ema"] is None else f"average of the weights {plan['ema']}, ")
        + (f"gradient clipped at norm {plan['clip_grad']:g}" if plan["clip_grad"] else "gradient not clipped")
    )


def memory_lines(plan: dict[str, Any]) -> Iterator[str]:
    """Bytes of one device, and with how many micro-batches a step fits usual ones."""
    memory = plan["memory"]
    kept = ("weights", "optimizer", "average", "frozen")
    yield (
        f"memory of a device: {memory['total'] / GIB:.2f} GiB = "
        + " + ".join(f"{name} {memory[name] / GIB:.2f}" for name in kept if memory[name])
        + f" + {memory['peak'] / GIB:.2f} at the fullest moment of a step with train.precision={memory['precision']}"
    )
    yield (
        f"  of it gradients {memory['gradients'] / GIB:.2f}, activations of a micro-batch "
        f"{memory['activations'] / GIB:.2f} ({memory['activations'] / plan['batch']['rows'] / 2**20:.1f} MiB per image)"
    )
    fits = [f"{size} GiB with {n}" if n else f"{size} GiB not at all" for size, n in plan["fits"].items()]
    yield f"  train.micro_batches that fit about: {', '.join(fits)}"
