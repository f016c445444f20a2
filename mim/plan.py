"""`mim plan RECIPE`: what a run takes on named hardware: memory, split, images/s, hours, energy, disk, loader cores.

Operations and bytes are counted (mim/planning/footprint.py, spread.py); rates, memory and power are data sheets'
(mim/planning/devices.py); which share of the peak a training uses is assumed (mim/planning/utilization.py), given
(`mfu`) or measured by real steps on this machine (mim/rehearsal.py). `mim train --dry-run` checks a recipe as a
training here would; this looks at no data unless its size is needed, and at hardware that need not be here.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from mim import build, config, dry_run, loader_speed, looking, optim, plan_text, rehearsal
from mim.config import ConfigError
from mim.data import mixture
from mim.job import Config
from mim.log import say
from mim.planning import devices, spread, utilization
from mim.saving.retention import LEAST
from mim.watch import stopping

POWER_SHARE = 0.8  # of the board's power that a GPU in training draws: assumed
PER_CORE = 700.0  # images per second of a loader's core: ImageNet's JPEGs to 224 pixels, measured (docs/results.md)
ON_CPU = 32  # images of a micro-batch that is measured on a CPU; more are no faster there
KEYS = {"train.precision": "precision", "train.micro_batches": "micro_batches", "train.shard": "shard"} | {
    "train.activation_checkpointing": "activation_checkpointing"
}


@dataclass(frozen=True)
class Wish:
    """What `mim plan` was told beside the recipe."""

    gpu: str | None = None  # None: what this machine has
    gpus: int = 1
    mfu: float | None = None
    measure: bool = False
    images: int | None = None
    per_core: float | None = None


def main(recipe: str, overrides: list[str], wish: Wish, *, as_json: bool = False) -> int:
    """Print a plan as text or JSON. Returns the exit code."""
    cfg = config.typed(Config, config.read(recipe, overrides))
    device = devices.find(wish.gpu or (devices.CPU if cfg.train.cpu else None))
    if wish.measure and wish.gpu is not None:
        raise ConfigError(
            f"--measure takes its steps on what this machine has (train.cpu=true: on its CPUs); leave --gpu {wish.gpu} "
            f"out"
        )
    if wish.measure and wish.mfu is not None:
        raise ConfigError("--mfu gives what --measure finds out; leave one of them out")
    missing = list(dry_run.untrained(cfg))
    for name, own in missing:
        say(f"no trained {name} yet: planned from its {own}")
    dataset, num_images = size(cfg, wish.images)
    found = resolve(cfg, recipe, device, wish, dataset=dataset, num_images=num_images, trained=not missing,
                    fixed=frozenset(KEYS[key] for o in overrides if (key := o.partition("=")[0]) in KEYS))  # fmt: skip
    found["start"] = command(recipe, overrides, found)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(plan_text.lines(found)))
    return stopping.DONE


def size(cfg: Config, images: int | None) -> tuple[mixture.AnyDataset | None, int | None]:
    """The dataset, if it is at hand and its size was not stated, and its size, which durations in epochs need."""
    absent = [path for path in dry_run.data_paths(cfg) if not path.exists()]
    if images is None and not absent:
        dataset, _ = build.open_data(config.plain(cfg))
        return dataset, len(dataset)
    if images is None and (key := next(dry_run.epochs_in(config.plain(cfg)), None)):
        raise ConfigError(
            f"data.path={absent[0]} is not there, and {key} counts its epochs; give the data, or the number of its "
            f"images as --images (ImageNet-1k: --images 1281167)"
        )
    return None, images


# ---- numbers -------------------------------------------------------------------------------------


def resolve(
    cfg: Config,
    recipe: str,
    device: devices.Device,
    wish: Wish,
    *,
    dataset: mixture.AnyDataset | None,
    num_images: int | None,
    trained: bool,
    fixed: frozenset[str],
) -> dict[str, Any]:
    """The plan as plain data: what `--json` prints. `fixed`: fields of the way that the command line set."""

    @functools.cache
    def count(way: spread.Way) -> spread.Load:
        return spread.load(cfg, way, dataset=dataset, trained=trained)

    wanted = replace(spread.Way.of(cfg, wish.gpus), precision=precision(cfg, device, fixed))
    way, load = spread.propose(cfg, wanted, memory=device.memory, fixed=fixed, count=count)
    measured = measure(cfg, way, load, dataset, trained) if wish.measure else None
    speed = speed_of(cfg, way, load, device, wish.mfu, measured)
    rates = optim.resolve(cfg.optim, num_images or 1)  # without epochs the number of images is not used
    seconds = rates.total_steps * speed["seconds_per_step"]
    speed["loader"] = loader(cfg, speed["images_per_s"] / way.ranks, wish, dataset)
    return {
        "recipe": Path(recipe).stem,
        "objective": cfg.objective["name"],
        "device": asdict(device) | {"count": wish.gpus},
        "way": asdict(way) | {"batch_size": cfg.optim.batch_size, "rows": load.rows, "settings": way.settings()},
        "recipes_own": asdict(spread.Way.of(cfg, wish.gpus)),
        "memory": asdict(load) | {"total": load.total, "usable": spread.usable(device.memory)},
        "speed": speed,
        "measured": measured,
        "length": {"steps": rates.total_steps, "images": rates.total_steps * cfg.optim.batch_size, "of": num_images},
        "hours": seconds / 3600,
        "device_hours": seconds / 3600 * way.ranks,
        "energy": energy(device, way.ranks, seconds / 3600),
        "checkpoints": checkpoints(cfg, load, way, rates.total_steps, looking.intervals(cfg, num_images or 1)),
    }


def precision(cfg: Config, device: devices.Device, fixed: frozenset[str]) -> str:
    """bf16 where a GPU has it, else fp16; what the command line says stays, and the recipe's on a CPU.

    Raises ConfigError for a precision that the GPU does not have.
    """
    asked = cfg.train.precision
    if "precision" in fixed or device.float32 is None:  # a CPU, or a GPU of which nothing is known
        if device.float32 is not None and device.peak(asked) is None:
            raise ConfigError(f"train.precision={asked}, which {device.name} does not have; choose fp16 or no")
        return asked
    return "bf16" if device.bf16 is not None else "fp16"


def speed_of(
    cfg: Config,
    way: spread.Way,
    load: spread.Load,
    device: devices.Device,
    mfu: float | None,
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """Seconds of a step and what they are made of: operations at a share of the peak, then the update's bytes."""
    peak = device.peak(way.precision) if measured is None else measured["peak_flops"]
    if measured is not None:
        scale = load.rows / measured["rows"]
        gradient, update = way.micro_batches * scale * measured["gradient"], measured["update"]
        share, source = measured["mfu"], f"measured in {measured['steps']} steps on this machine"
    elif peak is None:
        raise ConfigError(
            f"nobody has told what {device.name} reaches, so its speed cannot be planned; measure it here with "
            f"--measure, or name a GPU as --gpu {' | '.join(devices.DEVICES)}"
        )
    else:
        share, source = (mfu, "given") if mfu is not None else utilization.assumed(cfg.objective["name"], load.width)
        gradient = way.micro_batches * load.rows * load.flops / (share * peak)
        update = load.traffic / (device.bandwidth * 1e9) if device.bandwidth else 0.0
    return {
        "flops_per_image": load.flops,
        "mfu": share,
        "mfu_source": source,
        "peak_flops": peak,
        "gradient": gradient,
        "update": update,
        "seconds_per_step": gradient + update,
        "images_per_s": cfg.optim.batch_size / (gradient + update),
    }


def measure(
    cfg: Config, way: spread.Way, load: spread.Load, dataset: mixture.AnyDataset | None, trained: bool
) -> dict[str, Any]:
    """Real steps on one device of this machine, beside what was predicted for just these."""
    on_cpu = devices.here().name == devices.CPU or cfg.train.cpu
    rows = min(load.rows, ON_CPU) if on_cpu else load.rows
    machine = replace(cfg.train, precision=way.precision, shard=False,
                      activation_checkpointing=way.activation_checkpointing)  # fmt: skip
    alone = replace(way, ranks=1, shard=False, micro_batches=1)
    predicted = spread.load(cfg, alone, dataset=dataset, trained=trained, rows=rows)
    say(f"measuring up to {rehearsal.STEPS} steps of {rows} images here, after {rehearsal.WARM_UP} to warm up")
    found = rehearsal.rehearse(replace(cfg, train=machine), rows=rows, dataset=dataset, trained=trained)
    return asdict(found) | {
        "mfu": load.flops * rows / (found.gradient * found.peak_flops),
        "images_per_s": rows / found.seconds(rows, 1),
        "predicted_held": predicted.total,
    }


def energy(device: devices.Device, count: int, hours: float) -> dict[str, float] | None:
    """Electricity of the GPUs alone; None where their power is not known."""
    if device.watts is None:
        return None
    return {"kwh": count * device.watts * POWER_SHARE * hours / 1000, "watts": device.watts, "share": POWER_SHARE}


def checkpoints(
    cfg: Config, load: spread.Load, way: spread.Way, steps: int, every: dict[str, int]
) -> dict[str, float | int]:
    """Bytes of one checkpoint, of those that retention keeps, at most, and of all that the run writes."""
    share = way.ranks if way.shard else 1
    one = share * sum(load.state[name] for name in ("weights", "optimizer", "average"))
    written = math.ceil(steps / every["save"])
    newest = min(max(cfg.train.keep, LEAST), written)
    kept = newest + min(steps // every["keep"] if "keep" in every else 0, written - newest)
    return {
        "one": one,
        "every_steps": every["save"],
        "written": written,
        "kept": kept,
        "kept_bytes": kept * one,
        "most_bytes": min(kept + 1, written) * one,  # an old one goes when the new one has been read again
        "written_bytes": written * one,
    }


def loader(cfg: Config, images_per_s: float, wish: Wish, dataset: mixture.AnyDataset | None) -> dict[str, Any]:
    """CPU cores that each device's loader needs to keep up."""
    if wish.per_core is not None:
        rate, source = wish.per_core, "given"
    elif wish.measure and dataset is not None:
        rate, source = loader_speed.measure(cfg, seconds=1.0).one_worker, "measured here"
    else:
        rate, source = PER_CORE, "assumed: ImageNet JPEGs of 105 KiB to 224 pixels; mim bench data measures yours"
    return {"images_per_s": images_per_s, "per_core": rate, "cores": images_per_s / rate, "source": source}


def command(recipe: str, overrides: list[str], found: dict[str, Any]) -> str:
    """What starts the run that was planned, on one machine."""
    settled = [o for o in overrides if o.partition("=")[0] not in KEYS]
    count = found["device"]["count"]
    launch = f"torchrun --nproc_per_node {count} -m mim" if count > 1 else "mim"
    return " ".join([launch, "train", recipe, *settled, *found["way"]["settings"]])
