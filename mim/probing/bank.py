"""Features of a dataset row by row, made by all ranks: what probes, neighbours and exports of features read.

The rows are cut into micro-batches that do not depend on the number of processes, and ranks take whole ones, so a
feature has the same bits on one process and on many: kernels differ with the size of a batch. Rows are never padded,
and every one belongs to exactly one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mim import build, ranks
from mim.data import stages, stream
from mim.data.mixture import AnyDataset
from mim.log import Pace

Embed = Callable[[Tensor], dict[str, Tensor]]  # images (B, C, H, W) in [0, 1] -> columns (B, ...)
BLOCKS = 256  # at least so many, where there are as many micro-batches: the unit of sharing and of resuming
MAX_MICRO_BATCHES = 32  # of a block


@dataclass
class Split:
    """Features (n, D) and labels (n,) int64 of labelled samples, on the CPU."""

    features: Tensor
    labels: Tensor


@dataclass
class Bank:
    """Features of every sample of a dataset that an evaluation looks at, in the dataset's order, on the CPU."""

    keys: list[str]  # "shard.tar/sample"
    labels: Tensor  # (n,) int64, -1 = unknown
    columns: dict[str, Tensor]  # "<layer>/<pooling>" -> (n, D), or (n, N, D) of tokens; perhaps mapped from a file

    def split(self, column: str) -> Split:
        """One column of the labelled rows."""
        known = self.labels >= 0
        x = self.columns[column]
        return Split(x, self.labels) if known.all() else Split(x[known], self.labels[known])


@dataclass(frozen=True)
class Block:
    """Rows [start, end), of whole micro-batches."""

    number: int
    start: int
    end: int
    micro_batches: range


@dataclass
class Part:
    """What a block holds."""

    keys: list[str]
    labels: Tensor
    columns: dict[str, Tensor]


class Store(Protocol):
    """Where the parts go: memory, or a cache on a disk."""

    def missing(self, blocks: list[Block]) -> list[Block]:
        """What is still to be made; the same on all ranks."""
        ...

    def put(self, block: Block, part: Part) -> None: ...

    def finish(self, blocks: list[Block]) -> Bank:
        """All of it, on every rank; called by all."""
        ...


def blocks_of(num_rows: int, batch_size: int) -> list[Block]:
    """The blocks of a dataset: a function of these numbers alone."""
    num_batches = -(-num_rows // batch_size)
    each = min(max(num_batches // BLOCKS, 1), MAX_MICRO_BATCHES)
    found = []
    for number, first in enumerate(range(0, num_batches, each)):
        last = min(first + each, num_batches)
        found.append(Block(number, first * batch_size, min(last * batch_size, num_rows), range(first, last)))
    return found


def extract(
    dataset: AnyDataset,
    views: build.Views,
    embed: Embed,
    *,
    device: torch.device,
    batch_size: int,  # rows of a micro-batch
    limit: int | None = None,  # a fixed random subset of so many; None: all
    store: Store | None = None,  # None: memory
) -> Bank:
    """Embed every sample of a dataset once; called by all ranks, each gets everything."""
    store = store or Memory(device)
    blocks = blocks_of(len(stream.evaluated(dataset, limit=limit)), batch_size)
    fill(dataset, views, embed, store, blocks, device=device, batch_size=batch_size, limit=limit)
    return store.finish(blocks)


@torch.no_grad()
def fill(
    dataset: AnyDataset,
    views: build.Views,
    embed: Embed,
    store: Store,
    blocks: list[Block],
    *,
    device: torch.device,
    batch_size: int,
    limit: int | None = None,
) -> None:
    """Make this rank's share of the blocks that a store lacks."""
    rank, world = ranks.place()
    missing = store.missing(blocks)
    mine = missing[rank::world]
    micro_batches = [number for block in mine for number in block.micro_batches]
    pace = Pace(f"features of {dataset.path}", sum(b.end - b.start for b in missing), main=rank == 0)
    batches = iter(
        stream.evaluate(
            dataset,
            view=views.evaluation,
            sizes=views.sizes[:1],
            channels=views.data.channels,
            batch_size=batch_size,
            limit=limit,
            only=micro_batches,
            workers=_workers(device, len(micro_batches)),
            pin_memory=device.type == "cuda",
        )
    )
    for block in mine:
        found = [_part(next(batches), embed, device) for _ in block.micro_batches]
        store.put(block, _joined(found))
        pace.advance((block.end - block.start) * world)


def _workers(device: torch.device, num_batches: int) -> int:
    """Loader processes: none on the CPU, which they would share with the encoder, nor for a handful of batches."""
    return 0 if device.type == "cpu" else min(stages.allowed_cpus(), 16, num_batches // 8)


def _part(batch: Any, embed: Embed, device: torch.device) -> Part:
    batch = stream.to_device(batch, device)
    columns = {name: value.cpu() for name, value in embed(batch["images"]).items()}
    labels = batch["labels"].cpu() if "labels" in batch else torch.full((len(batch["keys"]),), -1)
    return Part(batch["keys"], labels, columns)


def _joined(parts: list[Part]) -> Part:
    keys = [key for part in parts for key in part.keys]
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Part(keys, torch.cat([part.labels for part in parts]), columns)


class Memory:
    """Keeps what this rank makes, and exchanges it with the others at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[int, Part] = {}

    def missing(self, blocks: list[Block]) -> list[Block]:
        return blocks

    def put(self, block: Block, part: Part) -> None:
        self.parts[block.number] = part

    def finish(self, blocks: list[Block]) -> Bank:
        _, world = ranks.place()
        facts = [
            [number, part.keys, {name: [str(x.dtype), *x.shape[1:]] for name, x in part.columns.items()}]
            for number, part in self.parts.items()
        ]
        told = sorted(ranks.gather(facts, self.device), key=lambda fact: fact[0])
        num_rows = blocks[-1].end if blocks else 0
        labels = torch.empty(num_rows, dtype=torch.int64)
        columns = {
            name: torch.empty(num_rows, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for name, (dtype, *shape) in (told[0][2] if told else {}).items()
        }
        for block in blocks:
            part = self.parts.pop(block.number, None)
            for name, rows in self._rows(block, labels, columns):
                if part is not None:
                    rows.copy_(part.labels if name is None else part.columns[name])
                rows.copy_(ranks.told_by(block.number % world, rows))
        return Bank([key for _, keys, _ in told for key in keys], labels, columns)

    @staticmethod
    def _rows(block: Block, labels: Tensor, columns: dict[str, Tensor]) -> Iterator[tuple[str | None, Tensor]]:
        yield None, labels[block.start : block.end]
        for name, column in columns.items():
            yield name, column[block.start : block.end]
