"""What one device holds when a recipe's step is spread over devices in some way, and the way that fits.

The footprint of a micro-batch (mim/planning/footprint.py) is counted; how it is dealt out follows from the way:

    one device  weights, optimizer, average, frozen networks, and what a step holds at its fullest moment
    DDP         the same, with gradients that are held for the whole step (they lie in the buckets of the all-reduce)
    FSDP2       weights, optimizer and average in equal shares (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section
                5.3); gathered are what stands in no block and two blocks, the one that runs and the next, and the
                gradients of one; gradients in shares, too, but whole while micro-batches add up. Frozen networks whole

Left out: the device's context and workspaces, fragmentation, and buffers of the network's library. That is what the
margin is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from mim import build, config, optim
from mim.blocks import blocks, recompute
from mim.config import ConfigError
from mim.data import mixture
from mim.data.order import Plan
from mim.job import Config
from mim.planning import footprint

GIB = 2**30
MARGIN, CONTEXT = 0.1, GIB  # of a device: a share for fragmentation and ECC, bytes for context and workspaces
FEW = 8  # images at once, below which memory is sought elsewhere than in smaller micro-batches


@dataclass(frozen=True)
class Way:
    """How a step is executed: ranks, and the keys of section `train` that decide what a device holds."""

    ranks: int = 1
    micro_batches: int = 1
    precision: str = "no"
    shard: bool = False
    activation_checkpointing: bool = False

    @classmethod
    def of(cls, cfg: Config, ranks: int) -> Way:
        """The way of a recipe."""
        machine = cfg.train
        return cls(
            ranks,
            machine.micro_batches,
            machine.precision,
            machine.shard and ranks > 1,
            machine.activation_checkpointing,
        )

    def settings(self) -> list[str]:
        """The way as overrides of a recipe."""
        flags = {"shard": self.shard, "activation_checkpointing": self.activation_checkpointing}
        return [
            f"train.precision={self.precision}",
            f"train.micro_batches={self.micro_batches}",
            *(f"train.{name}={str(value).lower()}" for name, value in flags.items() if value),
        ]


@dataclass(frozen=True)
class Load:
    """What one device holds and does. Bytes are those at the fullest moment of a step."""

    rows: int  # of a micro-batch
    flops: float  # per image, frozen networks included; recomputed blocks count twice
    width: int | None  # of the encoder
    state: dict[str, int]  # bytes of weights, optimizer, average, frozen
    gathered: int  # bytes of whole parameters and gradients beside the shares
    gradients: int  # bytes that stay for the step
    activations: int  # bytes of all else: it grows with the rows
    traffic: int  # bytes that an update reads and writes

    @property
    def total(self) -> int:
        return self.total_at(self.rows)

    def total_at(self, rows: int) -> int:
        """Bytes with micro-batches of another size; a little too many for smaller ones."""
        fixed = sum(self.state.values()) + self.gathered + self.gradients
        return fixed + self.activations * rows // self.rows


def rows_of(cfg: Config, way: Way) -> int:
    """Images of a micro-batch on one device, those included that only fill it up."""
    repeats = int(cfg.data.get("repeats") or 1)
    return Plan(repeats, cfg.optim.batch_size, world=way.ranks, micro_batches=way.micro_batches).micro_size


def load(
    cfg: Config, way: Way, *, dataset: mixture.AnyDataset | None = None, trained: bool = False, rows: int | None = None
) -> Load:
    """Count what a device holds; `trained`: the frozen networks are there. Other `rows` than the batch's may be asked.

    Raises ConfigError for a recipe that cannot be built.
    """
    with torch.device("meta"):
        built = build.build(config.plain(cfg), dataset=dataset, load_frozen=trained)
    if way.activation_checkpointing:
        recompute(built.objective)
    trainable = {name: p.numel() * p.element_size() for name, p in built.objective.named_parameters()}
    blockwise = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks(built.objective).values()]
    held = 2 if way.ranks > 1 else way.micro_batches  # DDP's buckets stay, as gradients between two micro-batches do
    cost = footprint.measure(
        built, cfg.optim, rows=rows or rows_of(cfg, way), micro_batches=held, precision=way.precision
    )
    gradients = cost.weights["gradients"]
    state = {name: size for name, size in cost.weights.items() if name != "gradients"}
    moved = 2 * (gradients + state["optimizer"] + state["average"]) + gradients  # read and written; gradients are read
    gathered, divisor = 0, 1
    if way.shard:
        largest, divisor = max(blockwise, default=0), way.ranks
        gathered = sum(trainable.values()) - sum(blockwise) + 3 * largest
        state |= {name: -(-state[name] // divisor) for name in ("weights", "optimizer", "average")}
    return Load(
        rows=cost.rows,
        flops=cost.flops(),
        width=getattr(built.encoder, "width", None),
        state=state,
        gathered=gathered,
        gradients=gradients // (divisor if way.micro_batches == 1 else 1),
        activations=max(cost.peak - gradients, 0),
        traffic=moved // divisor,
    )


# ---- the way that fits ---------------------------------------------------------------------------


def usable(memory: float) -> int:
    """Bytes of a device of so many GiB that a step may hold."""
    return round(memory * GIB * (1 - MARGIN) - CONTEXT)


def propose(
    cfg: Config, wanted: Way, *, memory: float, fixed: frozenset[str], count: Callable[[Way], Load]
) -> tuple[Way, Load]:
    """The first way, in order of what it costs in speed, that fits a device of `memory` GiB; and what it holds.

    The fewest micro-batches that fit come first, then FSDP2, then recomputed blocks; a way that leaves fewer than `FEW`
    images at once is taken only if no other leaves more. `fixed` names the fields of `wanted` that stay. Raises
    ConfigError where nothing fits.
    """
    limit, whole = usable(memory), rows_of(cfg, replace(wanted, micro_batches=1))
    found: list[tuple[Way, Load]] = []
    least = math.inf
    for way in ways(cfg, wanted, fixed):
        counted = count(way)
        least = min(least, counted.total_at(1))
        for split in splits(cfg, way, fixed):
            if counted.total_at(rows_of(cfg, split)) > limit:
                continue
            exact = counted if split == way else count(split)
            if exact.total <= limit:
                found.append((split, exact))
                break
        if found and found[-1][1].rows >= min(FEW, whole):
            return found[-1]
    if not found:
        raise ConfigError(
            f"not even one image at a time fits {memory:.0f} GiB: a device would hold {least / GIB:.1f} GiB; take more "
            f"or larger devices, or a smaller network"
        )
    return max(found, key=lambda pair: pair[1].rows)


def ways(cfg: Config, wanted: Way, fixed: frozenset[str]) -> Iterator[Way]:
    """What may be tried beside the number of micro-batches, the fastest first."""
    can_shard = wanted.ranks > 1 and wanted.precision != "fp16" and cfg.optim.name in optim.ELEMENTWISE
    for recomputed in (False, True) if "activation_checkpointing" not in fixed else (wanted.activation_checkpointing,):
        for shard in (False, True) if "shard" not in fixed else (wanted.shard,):
            if can_shard or not shard:
                yield replace(wanted, shard=shard, activation_checkpointing=recomputed)


def splits(cfg: Config, way: Way, fixed: frozenset[str]) -> Iterator[Way]:
    """A way with 1, 2, 4 ... micro-batches, or with those that are fixed."""
    micro = 1
    while "micro_batches" not in fixed and cfg.optim.batch_size >= way.ranks * micro:
        yield replace(way, micro_batches=micro)
        micro *= 2
    if "micro_batches" in fixed:
        yield way
