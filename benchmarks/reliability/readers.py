"""The two adapters: each reads a dataset through its real public path and hands over what it was given.

    ours    `mim.data.shards.Dataset` + `mim.data.order.Order` + `mim.data.stream.loader`, with quarantine and journal
            as `mim train` keeps them
    usual   `webdataset.WebDataset` + `torch.utils.data.DataLoader` + `accelerate.prepare`, with their defaults; the
            splitter by node where there are several, which WebDataset asks for
    cli     a `mim` command
    train, train usual, starts    benchmarks/reliability/trainers.py

`usual` resumes by `accelerate.skip_first_batches`, as its documentation shows.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import numpy as np
import torch
import webdataset
from accelerate.utils import set_seed
from PIL import Image

from benchmarks.reliability.fixtures import SIDE, Row, pixels_of, row_of
from benchmarks.reliability.trainers import TRAINERS, starts
from mim.__main__ import main, one_sentence
from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data.augment import center, crop
from mim.data.order import Order
from mim.data.quarantine import Bad, Journal, read_quarantine
from mim.data.shards import Dataset
from mim.data.stream import loader, to_device

Emit = Callable[[list[Row], dict[str, Any]], None]  # one batch: its rows, and what else is known of it
CODES = {ConfigError: 2, DataError: 65, StorageError: 74}  # as `mim` exits
GRID = 36  # patches of a mask


def read(trial: dict[str, Any], rank: int, emit: Emit) -> tuple[int, str]:
    """Run a trial's reader; return its exit code and the message of its end ("" when there is none)."""
    try:
        READERS[trial["reader"]](trial, rank, emit)
    except SystemExit as stop:
        return int(stop.code or 0), ""
    except tuple(CODES) as error:
        code = next(code for kind, code in CODES.items() if isinstance(error, kind))
        return code, one_sentence(str(error)) if trial["reader"] == "ours" else traceback.format_exc()
    except BaseException:  # whatever ends a program ends it with its traceback
        return 70 if trial["reader"] == "ours" else 1, traceback.format_exc()
    return 0, ""


def warm_up() -> None:
    """Load what the first reading loads, so that it is in every child and in no count."""
    list(torch.utils.data.DataLoader([pixels_of(0)], batch_size=None))
    Image.init()
    set_seed(0)


def cli(trial: dict[str, Any], _rank: int, _emit: Emit) -> None:
    """Run `mim` with the arguments of a trial."""
    sys.argv = ["mim", *trial["arguments"]]
    main()


whole = functools.partial(center, crop_ratio=1.0)  # the view that changes nothing


def random_mask(generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(GRID) < GRID // 2


def ours(trial: dict[str, Any], rank: int, emit: Emit) -> None:
    """Read `num_steps` global batches of a dataset folder from `position` on."""
    dataset = Dataset.open(trial["path"], **trial.get("store", {}))
    order = Order(dataset.id, dataset.counts, trial.get("seed", 0), repeats=trial.get("repeats", 1))
    journal = Journal(read_quarantine(dataset.path, dataset.id), dataset.counts, budget=trial.get("budget", 1e-4))
    show = trial.get("show", False)  # also hand over the pixels of the first row
    for one in trial.get("as_ranks", [rank if trial.get("world", 1) > 1 else 0]):
        for step, batch in enumerate(batches(trial, dataset, order, one, journal.bad), 1):
            journal.add(step, batch["bad"])
            rows = []
            for i in torch.nonzero(batch["weight"]).flatten().tolist():
                pixels = batch["images"][i].permute(1, 2, 0).numpy()  # (H, W, C)
                number, crc, label = row_of(pixels, int(batch["labels"][i]) if "labels" in batch else -1)
                rows.append(
                    (number, zlib.crc32(batch["mask"][i].numpy().tobytes(), crc) if "mask" in batch else crc, label)
                )
            facts = {"rank": one, "bad": batch["bad"]}
            emit(rows, facts | ({"pixels": shown(to_device(batch, torch.device("cpu"))["images"])} if show else {}))
            journal.collect(None, lambda found: found)
            journal.check()


def shown(images: torch.Tensor) -> list[Any]:
    """The first of images (B, C, H, W) in [0, 1], as a network is given it: (H, W, C) from 0 to 255."""
    return (255 * images[0]).permute(1, 2, 0).tolist()


def batches(trial: dict[str, Any], dataset: Dataset, order: Order, rank: int, bad: dict[int, Bad]) -> Any:
    """Our loader for one rank of a trial."""
    augmented, batch_size = trial.get("augmented", False), trial.get("batch_size", 8)
    return loader(
        dataset,
        order=order,
        view=crop if augmented else whole,
        sizes=[(SIDE // 2, SIDE // 2) if augmented else (SIDE, SIDE)],
        mask=random_mask if augmented else None,
        batch_size=batch_size,
        rank=rank,
        world=trial.get("as_world", trial.get("world", 1)),
        position=trial.get("position", 0),
        num_steps=trial.get("num_steps") or -(-len(dataset) // batch_size),
        known=bad,
        workers=trial.get("workers", 0),
        timeout=trial["limit"],
    )


def usual(trial: dict[str, Any], rank: int, emit: Emit) -> None:
    """Read `num_steps` batches (default: one epoch) of a list of tars; `resume` is the epoch and its batches done."""
    world = trial.get("world", 1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(trial["port"])}
    accelerator = accelerate.Accelerator(cpu=True)
    set_seed(trial.get("seed", 0))
    splitter = {"nodesplitter": webdataset.split_by_node} if world > 1 else {}
    view = random_crop if trial.get("augmented") else np.array
    dataset = (
        webdataset.WebDataset(trial["tars"], shardshuffle=100, **splitter, **trial.get("store", {}))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("png;jpg", "cls")
        .map_tuple(view, int)
    )
    batch_size = max(1, trial.get("batch_size", 8) // world)
    batches = accelerator.prepare(
        torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=trial.get("workers", 0))
    )
    for images, labels in _steps(batches, trial.get("num_steps"), *trial.get("resume", (0, 0))):
        rows = [row_of(image.numpy(), int(label)) for image, label in zip(images, labels, strict=True)]
        emit(rows, {"pixels": images[0].tolist()} if trial.get("show") else {})
    accelerator.end_training()


def random_crop(image: Any) -> np.ndarray:
    """A crop as any script draws it: from the process's generator."""
    left, top = np.random.randint(SIDE // 2, size=2)
    return np.array(image)[top : top + SIDE // 2, left : left + SIDE // 2]


def _steps(batches: Any, num_steps: int | None, epoch: int, skip: int) -> Iterator[Any]:
    """The first `num_steps` batches from batch `skip` of an epoch on; without a number, the rest of the epoch."""
    done = 0
    while True:
        batches.set_epoch(epoch)
        for batch in accelerate.skip_first_batches(batches, skip) if skip else batches:
            yield batch
            done += 1
            if done == num_steps:
                return
        if num_steps is None or not done:
            return
        epoch, skip = epoch + 1, 0


READERS = {"ours": ours, "usual": usual, "cli": cli, "starts": starts, **TRAINERS}
