"""Accuracy of a classifier on the held-out images: top-1, top-5, the mean over classes, and the loss.

The split is streamed. Whole batches are dealt to the ranks, so a batch is the same on any number of them; counts are
summed as integers and losses by `math.fsum`, which rounds once, so the numbers are the same bit for bit, too.
Images without a label (-1) and rows of weight 0 are left out. A held-out dataset may number its classes in another
way than the training dataset, by whose names the head's outputs are called: they are matched by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim import ranks
from mim.config import ConfigError
from mim.contracts import Batch, LoadedRun, NamedValues
from mim.data import stages, stream
from mim.data.mixture import AnyDataset
from mim.log import Pace
from mim.probing.features import labelled_data

TOP = 5
MAX_WORKERS = 16  # loader processes of a rank on a GPU; on a CPU they would share it with the encoder


@dataclass
class Config:
    batch_size: int = 256  # images on a device at once
    val_limit: int | None = None  # images, a fixed random subset; null: all
    per_class: bool = False  # yield class/NAME, too


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield accuracy, top5 (above 5 classes), class_accuracy (mean over classes that occur), loss and count.

    All are shares in [0, 1] but the loss, cross-entropy in nats, and the count of labelled images.
    """
    if not hasattr(loaded.objective, "logits"):
        name = loaded.config["objective"]["name"]
        raise ConfigError(
            f"{loaded.path} is a run of {name}, which tells no classes; fine-tune it first, with objective.name="
            f"classify and encoder.init={loaded.path}, or judge its features: mim eval knn {loaded.path}"
        )
    train, val = labelled_data(loaded)
    outputs = outputs_of(val, train)
    counts, right, within, losses = count(loaded, cfg, val, outputs)
    total = int(counts.sum())
    if total == 0:
        raise ConfigError(f"{val.path} holds no image with a label; give another data.val_path")
    seen = counts > 0
    shares = right.double() / counts.double().clamp(min=1)  # (classes,)
    yield "accuracy", int(right.sum()) / total
    if within is not None:
        yield "top5", within / total
    yield "class_accuracy", math.fsum(shares[seen].tolist()) / int(seen.sum())
    yield "loss", math.fsum(losses) / total
    yield "count", float(total)
    if cfg.per_class:
        names = val.classes or []
        yield from ((f"class/{names[i]}", float(shares[i])) for i in seen.nonzero().flatten().tolist())


def outputs_of(val: AnyDataset, train: AnyDataset) -> Tensor:
    """The output of the head (classes,) that stands for each class of the held-out dataset."""
    names = val.classes or []
    number = {name: i for i, name in enumerate(train.classes or [])}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise ConfigError(
            f"{val.path} has the class {unknown[0]!r}, which is none of the {len(number)} classes of {train.path}; "
            f"hold out images of the same classes"
        )
    return torch.tensor([number[name] for name in names])


@torch.no_grad()
def count(
    loaded: LoadedRun, cfg: Config, val: AnyDataset, outputs: Tensor
) -> tuple[Tensor, Tensor, int | None, list[float]]:
    """Images and right answers of each class (classes,), those within the first five, and the losses of all batches.

    All over all ranks.
    """
    device = next(loaded.objective.parameters()).device
    outputs = outputs.to(device)
    counts, right = (torch.zeros(len(outputs), dtype=torch.int64, device=device) for _ in range(2))
    within = torch.zeros(2, dtype=torch.int64, device=device)  # within the first five, and batches with as many outputs
    losses: list[Tensor] = []
    for batch in batches(loaded, cfg, val, device):
        counted = (batch["labels"] >= 0) & (batch["weight"] > 0)  # (B,)
        labels = batch["labels"][counted]
        logits = loaded.objective.logits(batch)[counted].float()  # (b, classes)
        if len(outputs) > logits.shape[1] and int(outputs.max()) >= logits.shape[1]:
            raise ConfigError(
                f"{val.path} has {len(outputs)} classes, but the head of {loaded.path} has {logits.shape[1]}; "
                f"hold out images of the classes that it was trained on"
            )
        target = outputs[labels]
        hit = logits.argmax(dim=1) == target
        counts += torch.bincount(labels, minlength=len(counts))
        right += torch.bincount(labels[hit], minlength=len(counts))
        if logits.shape[1] > TOP:
            best = logits.topk(TOP, dim=1).indices  # (b, 5)
            within += torch.stack([(best == target[:, None]).sum(), torch.ones_like(within[0])])
        losses.append(F.cross_entropy(logits.double(), target, reduction="sum"))
    for sums in (counts, right, within):
        ranks.add(sums)
    found = ranks.gather(torch.stack(losses).tolist() if losses else [], device)
    return counts.cpu(), right.cpu(), int(within[0]) if within[1] else None, found


def batches(loaded: LoadedRun, cfg: Config, val: AnyDataset, device: torch.device) -> Iterator[Batch]:
    """This rank's share of the held-out images on the device, as evaluations of the run see them."""
    rank, world = ranks.place()
    num_images = len(stream.evaluated(val, limit=cfg.val_limit))
    mine = range(-(-num_images // cfg.batch_size))[rank::world]
    pace = Pace(f"accuracy on {val.path}", num_images, main=rank == 0)
    on_gpu = device.type != "cpu"
    for batch in stream.evaluate(
        val,
        view=loaded.views.evaluation,
        sizes=loaded.views.sizes[:1],
        channels=loaded.views.data.channels,
        batch_size=cfg.batch_size,
        limit=cfg.val_limit,
        only=mine,
        workers=min(stages.allowed_cpus(), MAX_WORKERS, len(mine) // 8) if on_gpu else 0,
        pin_memory=on_gpu,
    ):
        yield stream.to_device(batch, device)
        pace.advance(len(batch["keys"]) * world)
