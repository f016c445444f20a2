"""What `make` decides before it reads the first image: which image goes into which shard, and the hash of it all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL

from mim.config import ConfigError
from mim.data.order import key64, permutation
from mim.data.pairs import Masks
from mim.data.shards import FORMAT
from mim.data.sources import Source
from mim.data.write import Item, Task

PARTIAL = ".partial"  # in OUT: what is being written; left by a killed process, finished by the next
KIND = "make"
QUALITY = 90  # of JPEGs, where images are shrunk


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a dataset, besides the images."""

    labels_from_folders: bool = False
    val_ratio: float = 0.0
    shard_size: int = 1000  # samples
    seed: int = 0
    labels: str | None = None  # "cls" of tars, or the column of a saved dataset
    short: int | None = None  # pixels
    quality: int | None = None
    masks: Masks | None = None  # None: no label maps

    def described(self) -> dict[str, Any]:
        """As plain data; without label maps the same as before there were any, so that made datasets stay known."""
        found = asdict(self)
        if self.masks is None:
            del found["masks"]
        return found

    @classmethod
    def restored(cls, found: dict[str, Any]) -> Options:
        """Undo `described`, after JSON."""
        masks = found.get("masks")
        if masks is not None:
            masks = Masks(**{**masks, "classes": tuple(masks["classes"]) if masks["classes"] is not None else None})
        return cls(**{**found, "masks": masks})


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first image is read."""

    out: Path
    options: Options
    identity: str  # hash of images and options
    classes: list[str] | None
    splits: dict[str, list[Task]]  # by the name of the folder in OUT; "" is OUT itself
    left_out: list[dict[str, str]]

    @property
    def work(self) -> Path:
        """The hidden folder where shards are written."""
        return self.out / PARTIAL / self.identity[:16]

    def content(self) -> dict[str, Any]:
        """What a part leaves, for `join`."""
        return {
            "format": FORMAT,
            "kind": KIND,
            "source": {"hash": self.identity, **self.options.described()},
            "classes": self.classes,
            "splits": {name: len(tasks) for name, tasks in self.splits.items()},
            "left_out": self.left_out,
        }


def plan_of(source: Source, out: Path, options: Options) -> Plan:
    """Deal the images of a source out to shards."""
    identity = identity_of(source, options)
    plan = Plan(out, options, identity, source.classes, {}, list(source.left_out))
    for name, items in _split(source, options).items():
        starts = range(0, len(items), options.shard_size)
        for number, start in enumerate(starts):
            target, some = plan.work / name / shard_name(number), items[start : start + options.shard_size]
            moved, quality = out / name / target.name, options.quality or QUALITY
            task = Task(source.reader, target, moved, some, options.short, quality, source.masks, options.masks)
            plan.splits.setdefault(name, []).append(task)
    return plan


def identity_of(source: Source, options: Options) -> str:
    """Hash of what a dataset is made from, without reading the images."""
    encodes = options.short is not None or (options.masks is not None and options.masks.zero_ignored)
    encoder = PIL.__version__ if encodes else None  # another one writes other bytes
    return source.identity(FORMAT, options.described(), encoder)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def _split(source: Source, options: Options) -> dict[str, list[Item]]:
    """Return the shuffled items of each dataset to write ("" is OUT itself).

    An image is in val by a hash of its own name, so it stays there when others are added.
    """
    number = {name: label for label, name in enumerate(source.classes or [])}
    parts: dict[str, list[Item]] = {"train": [], "val": []} if options.val_ratio else {"": []}
    for i in permutation(len(source.names), "make", options.seed).tolist():
        held_out = key64("val", options.seed, source.names[i]) < options.val_ratio * 2**63
        part = ("val" if held_out else "train") if options.val_ratio else ""
        label = number[source.labels[i]] if source.labels is not None else None
        mask = source.mask_places[i] if source.mask_places is not None else None
        parts[part].append(Item(source.names[i], source.keys[i], source.places[i], label, mask))
    if empty := [part for part, items in parts.items() if not items]:
        raise ConfigError(
            f"val_ratio={options.val_ratio} leaves no image of {len(source.names)} for {empty[0]}; choose another"
        )
    return parts
