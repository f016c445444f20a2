"""Real steps of a recipe on this machine's device: how long they take and what they hold, for `mim plan --measure`.

The batch is made up (noise, drawn masks, uint8 as the loader gives it); all that follows is the loop's: transfer,
frozen networks, forward, backward, clipping, optimizer, average. A step is one micro-batch and one update, timed apart,
so the time of any number of micro-batches follows. Between steps a matrix product of the run's precision is timed: the
peak that utilization is told against, on the machine as it is at that moment.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from mim import build, config, guard, launching, optim, sharding, train
from mim.contracts import Batch
from mim.data import mixture
from mim.experiment import device_name
from mim.job import Config
from mim.saving import checkpoint

STEPS, WARM_UP = 20, 3
LONGEST = 60.0  # seconds of the steps that are timed; of a slower device fewer are
RATE = 1e-6  # of learning: nobody keeps what is learned
SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrices whose product is the peak


@dataclass(frozen=True)
class Rehearsal:
    """What was measured. Times are medians."""

    device: str
    rows: int
    steps: int
    gradient: float  # seconds from a micro-batch in host memory to its gradient
    update: float  # seconds of clipping, optimizer, what the objective does after a step, and the average
    peak_flops: float  # operations per second of a matrix product
    held: int  # bytes at the fullest moment, above those before the networks were built

    def seconds(self, rows: int, micro_batches: int) -> float:
        """Of a step with other micro-batches."""
        return micro_batches * self.gradient * rows / self.rows + self.update


def rehearse(
    cfg: Config, *, rows: int, dataset: mixture.AnyDataset | None, trained: bool, longest: float = LONGEST
) -> Rehearsal:
    """Train `STEPS` steps, or as many as `longest` seconds allow, on one device, and forget them."""
    accelerator = launching.launch(cfg)
    device = accelerator.device
    product = matrix_product(device, cfg.train.precision)
    product()  # what it holds is there before anything is counted
    before = held_bytes(device)
    forget_peak(device)
    built = build.build(config.plain(cfg), dataset=dataset, load_frozen=trained)
    step = stepper(cfg, accelerator, built, rows)
    times: list[list[float]] = [[], [], []]  # gradient, update, product
    began = 0.0
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            began = time.perf_counter()
        elif number > WARM_UP and time.perf_counter() - began > longest:
            break
        marks = [now(device)]
        for work in (step.gradient, step.update, product):
            work()
            marks.append(now(device))
        for kind, (start, end) in zip(times, itertools.pairwise(marks), strict=True):
            kind.append(end - start)
    gradient, update, alone = (statistics.median(kind[WARM_UP:]) for kind in times)
    return Rehearsal(
        device=device_name(device),
        rows=rows,
        steps=len(times[0]) - WARM_UP,
        gradient=gradient,
        update=update,
        peak_flops=2 * SIDE[device.type] ** 3 / alone,
        held=peak_bytes(device) - before,
    )


class Halves(NamedTuple):
    """The two halves of a step."""

    gradient: Callable[[], Any]  # from a micro-batch in host memory to its gradient
    update: Callable[[], Any]  # all that follows once per step


def stepper(cfg: Config, accelerator: Accelerator, built: build.Built, rows: int) -> Halves:
    """Put networks and optimizer on the device as a training does; returns what takes its steps."""
    wrapped = launching.wrap(accelerator, built.objective, cfg)
    model, optimizer, objective = wrapped.model, wrapped.optimizer, built.objective
    for network in built.frozen.values():
        network.to(accelerator.device)
    present = sharding.local(checkpoint.averaged_tensors(objective).values()) if cfg.optim.ema is not None else []
    means = [tensor.clone() for tensor in present]
    average = guard.Average(means, present, 1 - cfg.optim.ema) if cfg.optim.ema is not None else None
    optim.allocate(optimizer.optimizer)
    optim.set_rates(optimizer, RATE, cfg.optim.weight_decay)
    raw, progress = synthetic(built, rows), torch.zeros((), device=accelerator.device)
    stage: Any = SimpleNamespace(cfg=cfg, accelerator=accelerator, built=built, objective=objective)  # a Job's part
    model.train()

    def gradient() -> None:
        batch = train.on_device(stage, dict(raw))
        out = model(batch, progress)
        accelerator.backward((out["loss"] * batch["weight"]).sum() / rows)

    def update() -> None:
        norm = train.clip(accelerator, model, cfg.optim.clip_grad)
        finite = torch.isfinite(norm)
        optim.update(optimizer, finite, accelerator.scaler)
        optimizer.zero_grad()
        if hasattr(objective, "after_step"):
            objective.after_step(1, progress)
        if average is not None:
            average.move(finite)

    return Halves(gradient, update)


def synthetic(built: build.Built, rows: int) -> Batch:
    """A micro-batch as the loader would give it, of noise."""
    rng, views = np.random.default_rng(0), built.views
    channels = views.data.channels
    batch: Batch = {
        name: torch.from_numpy(rng.integers(0, 256, (rows, channels, *size), dtype=np.uint8))
        for name, size in zip(("images", "tokenizer_images"), views.train_sizes)  # noqa: B905  the second is optional
    }
    if views.mask is not None:
        masks = [np.asarray(views.mask(rng)) for _ in range(rows)]
        batch["mask"] = torch.from_numpy(np.stack(masks))  # (B, N)
        batch["num_masked"] = int(masks[0].sum())
    if views.cache is not None:
        num_patches = int(np.prod(built.encoder.grid(views.sizes[0])))
        batch["codes"] = torch.from_numpy(rng.integers(0, built.objective.num_codes, (rows, num_patches)))
    if views.label_maps:
        batch["label_maps"] = torch.zeros(rows, *views.sizes[0], dtype=torch.uint8)  # (B, H, W)
    batch["labels"] = torch.zeros(rows, dtype=torch.int64)
    batch["noise"] = torch.from_numpy(rng.integers(0, 2**62, rows))
    batch["weight"] = torch.ones(rows)
    batch["range"] = [[0, 255]] * channels
    return batch | {"epoch": 0, "keys": [str(row) for row in range(rows)]}


# ---- the device ----------------------------------------------------------------------------------


def matrix_product(device: torch.device, precision: str) -> Callable[[], Any]:
    """A function that multiplies two large matrices in the type that a run of this precision multiplies in."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    return functools.partial(torch.mm, left, right, out=out)


def now(device: torch.device) -> float:
    """The time when everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU; that this process holds on CPUs."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_bytes("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # where it is not allowed, the peak is at least as high as it was before
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most that was held since."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM")


def process_bytes(name: str) -> int:
    """A figure of /proc/self/status, which is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
