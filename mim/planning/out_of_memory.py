"""What becomes of a training whose device has no memory left: one sentence with remedies, and what each would hold.

The error is a mistake of the recipe on this device, so it ends as one of the configuration does (exit code 2) and a
job is not queued again. The kernel's own killer on a CPU machine gives no chance to say anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from mim import optim, ranks
from mim.config import ConfigError
from mim.data import mixture
from mim.job import Config
from mim.planning import devices, spread

GIB = 2**30
REMEDIES = 3
ON_CPU = "can't allocate memory"  # in what torch's allocator for CPUs says


@contextlib.contextmanager
def explained(cfg: Config, dataset: mixture.AnyDataset, *, sharded: bool, where: Callable[[], str]) -> Iterator[None]:
    """Turn the error of an allocator inside the block into ConfigError; `where()` tells what the loop was doing."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        place, way = where(), replace(spread.Way.of(cfg, ranks.place()[1]), shard=sharded)
        try:
            text = sentence(cfg, way, dataset=dataset, place=place)
        except (ValueError, RuntimeError, MemoryError) as why:
            text = (
                f"out of memory in {place}, and what would hold less could not be counted ({why}); set "
                f"train.micro_batches={2 * way.micro_batches}"
            )
        raise ConfigError(text) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this process, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or ON_CPU in str(error)


def sentence(cfg: Config, way: spread.Way, *, dataset: mixture.AnyDataset | None, place: str) -> str:
    """What was too much, for what, and what would be less; figures are counted on tensors without memory."""
    used = spread.load(cfg, way, dataset=dataset, trained=True)
    memory = devices.here().memory if not cfg.train.cpu else devices.cpus().memory
    found = [
        f"{setting} ({load.total / GIB:.2f} GiB{note})"
        for setting, load, note in remedies(cfg, way, used, spread.usable(memory), dataset)
        if load.total < used.total
    ][:REMEDIES]
    held = f"about {used.total / GIB:.2f} GiB at once"
    said = f"out of memory in {place}: a step with micro-batches of {used.rows} images holds {held}"
    has = f", and the device has {memory:.1f} GiB"
    if not found:
        return f"{said}{has}; no setting makes it less: take a larger device or a smaller network"
    return f"{said}{has}; set {' or '.join(found)}"


def remedies(
    cfg: Config, way: spread.Way, used: spread.Load, limit: int, dataset: mixture.AnyDataset | None
) -> Iterator[tuple[str, spread.Load, str]]:
    """Settings that hold less, with what they hold and what they cost, the cheapest first."""

    def load(changed: spread.Way) -> spread.Load:
        return spread.load(cfg, changed, dataset=dataset, trained=True)

    if split := smaller(cfg, way, used, limit):
        yield f"train.micro_batches={split.micro_batches}", load(split), ", the same gradient"
    if way.precision == "no":
        half = replace(way, precision="bf16")
        yield "train.precision=bf16", load(half), ", faster where the device has it"
    if way.ranks > 1 and not way.shard and way.precision != "fp16" and cfg.optim.name in optim.ELEMENTWISE:
        yield "train.shard=true", load(replace(way, shard=True)), f" on each of {way.ranks} ranks"
    if not way.activation_checkpointing:
        again = replace(way, activation_checkpointing=True)
        yield "train.activation_checkpointing=true", load(again), ", a third more time"


def smaller(cfg: Config, way: spread.Way, used: spread.Load, limit: int) -> spread.Way | None:
    """The way with at least twice the micro-batches of which one fits, or as many as there can be."""
    found, micro = None, 2 * way.micro_batches
    while cfg.optim.batch_size >= way.ranks * micro:
        found = replace(way, micro_batches=micro)
        if used.total_at(spread.rows_of(cfg, found)) <= limit:
            break
        micro *= 2
    return found
