"""Training steps outside a run: what one step of the loop does to a batch, with the loop's own functions.

The order of the calls is that of `mim.train.fit`; what only looks at a step (log, guard, journal, saves) is left out.
Weights are fresh, frozen networks too. Batches are synthetic, uint8 as the loader leaves them and on the device
already, or come from the real loader over shards.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.rounds import Phases
from mim import build, config, frozen_networks, launching, optim, sharding, train
from mim.blocks import blocks
from mim.contracts import Batch
from mim.data import mixture, quarantine, stream
from mim.data.ahead import Ahead
from mim.guard import Average, Held
from mim.job import Config, Job
from mim.log import Averages
from mim.planning import footprint
from mim.saving import checkpoint

IMAGES = 1_281_167  # of ImageNet-1k: how long recipes are in steps where no data is at hand
DISTINCT = 2  # synthetic batches in turn
PHASES = ("data", "transfer", "frozen networks", "forward", "backward", "optimizer")

TINY = "{}_vittiny_cifar10"  # 32 pixels in patches of 4
SIZES = {  # width, depth, heads, patch size; tiny has recipes of its own
    "small": (384, 12, 6, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}
BASE = {
    "mae": "mae_vitb16_in1k",
    "simmim": "simmim_vitb16_in1k",
    "mpp": "mpp_vittiny_cifar10",
    "beit": "beit_vitb16_in1k",
    "beit2": "beit2_vitb16_in1k",
    "classify": "classify_maeb16_in1k",
    "tokenize": "dvae_dalle_in1k",
    "vqkd": "vqkd_clip_in1k",
}
TINIES = {"tokenize": "dvae_small_cifar10", "vqkd": "vqkd_mae_cifar10"}
OF_TOKENIZERS = ("tokenize", "vqkd")  # whose sizes are their recipes' alone
CODED = "-codes"  # beit-codes: as with a token cache, without the tokenizer


@dataclass
class Work:
    """What is trained: a recipe, and whether its codes are given instead of made by the tokenizer."""

    name: str
    cfg: Config
    codes_given: bool = False


def work(name: str, size: str, overrides: list[str], **machine: Any) -> Work:
    """The recipe of an objective at a size, or a recipe by its own name; `machine` are options of section `train`."""
    objective = name.removesuffix(CODED)
    known = objective in BASE
    recipe, own = objective, list[str]()
    if known and size == "tiny":
        recipe = TINIES.get(objective, TINY.format(objective))
    elif known:
        recipe, own = BASE[objective], of_size(objective, size)
    sections = config.read(recipe, [*own, *overrides, *(f"train.{key}={value}" for key, value in machine.items())])
    (sections.get("encoder") or {}).pop("init", None)  # fresh weights cost the same
    cfg = config.typed(Config, {**sections, "evals": {}})
    return Work(f"{name} {size}" if known else name, cfg, name.endswith(CODED))


def of_size(objective: str, size: str) -> list[str]:
    """Overrides that give the recipe of base size, or MPP's only one, another encoder."""
    if objective in OF_TOKENIZERS:
        if size != "base":
            raise config.ConfigError(f"{objective} has recipes of the sizes tiny and base, not {size}; choose one")
        return []
    width, depth, heads, patch = SIZES[size]
    found = [] if objective != "mpp" else ["data.image_size=224", "encoder.patch_size=16"]
    if size == "base" and objective != "mpp":
        return found
    found += [f"encoder.width={width}", f"encoder.depth={depth}", f"encoder.num_heads={heads}"]
    if patch != 16:
        found.append(f"encoder.patch_size={patch}")
    return [*found, f"objective.early_layer={depth * 3 // 4}"] if objective == "beit2" else found


def built_of(wanted: Work, dataset: Any = None) -> build.Built:
    """The networks with fresh weights."""
    torch.manual_seed(wanted.cfg.optim.seed)
    found = build.build(config.plain(wanted.cfg), dataset=dataset, load_frozen=False)
    if wanted.codes_given:
        found.frozen.pop("tokenizer")
    if "tokenizer" in found.frozen:
        found.frozen["tokenizer"].to(memory_format=torch.channels_last)  # as one that is loaded lies in memory
    return found


def compile_blocks(objective: Any, mode: str) -> None:
    """Compile each block as a run does, but in one of torch.compile's modes."""
    found, limits = blocks(objective).values(), torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(found))
    for block in found:
        block.forward = torch.compile(block.forward, dynamic=False, mode=mode)


def flops(wanted: Work, rows: int) -> float:
    """Operations per image of a training step: forward and backward, and what frozen networks do for it."""
    with torch.device("meta"):
        built = build.build(config.plain(wanted.cfg), load_frozen=False)
    cost = footprint.measure(built, wanted.cfg.optim, rows=rows, micro_batches=1, precision=wanted.cfg.train.precision)
    given = cost.parts["tokenizer"].forward if wanted.codes_given else 0.0
    return cost.flops() - given


def synthetic(built: build.Built, rows: int, seed: int = 0) -> Batch:
    """A batch of noise as the loader makes it, uint8 images of (B, h, w, C) in memory, with random labels and codes."""
    generator, views = torch.Generator().manual_seed(seed), built.views
    channels, rng = views.data.channels, np.random.default_rng(seed)
    batch: Batch = {"range": [[0, 255]] * channels, "weight": torch.ones(rows), "epoch": 0}
    for name, size in zip(stream.VIEWS, views.sizes, strict=False):
        pixels = torch.randint(256, (rows, *size, channels), generator=generator, dtype=torch.uint8)
        batch[name] = pixels.movedim(-1, -3)  # (B, C, h, w)
    if views.mask is not None:
        masks = torch.stack([torch.as_tensor(views.mask(rng)) for _ in range(rows)])  # (B, N)
        batch |= {"mask": masks, "num_masked": int(masks[0].sum())}
    for name in ("noise", "view_noise") if views.data.jitter else ("noise",):
        batch[name] = torch.randint(2**62, (rows,), generator=generator)
    if views.data.jitter:
        batch["jitter"] = views.data.jitter
    classes = getattr(built.objective, "num_classes", 10)
    batch["labels"] = torch.randint(classes, (rows,), generator=generator)
    if views.label_maps:
        batch["label_maps"] = torch.randint(classes, (rows, *views.sizes[0]), generator=generator, dtype=torch.uint8)
    if "codes" in built.objective.reads and "tokenizer" not in built.frozen:
        patches = math.prod(built.encoder.grid(views.sizes[0]))
        batch["codes"] = torch.randint(built.objective.num_codes, (rows, patches), generator=generator)
        batch.pop("tokenizer_images", None)  # nobody reads them
    return batch


def on(device: torch.device, batch: Batch) -> Batch:
    """The same batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class Training:
    """An objective with its optimizer on a device, as a run has them, and steps of it."""

    def __init__(
        self,
        wanted: Work,
        *,
        rows: int,
        built: build.Built | None = None,
        compile_mode: str | None = None,
        shards: bool = False,  # batches come from the recipe's data, through the real loader
    ) -> None:
        cfg = replace(wanted.cfg, optim=replace(wanted.cfg.optim, batch_size=rows))
        dataset = build.open_data(config.plain(cfg))[0] if shards else None
        self.built = built if built is not None else built_of(wanted, dataset)
        AcceleratorState._reset_state()  # another variant may have another precision
        accelerator = launching.launch(cfg)
        self.device = accelerator.device
        if compile_mode is not None:
            compile_blocks(self.built.objective, compile_mode)
            cfg = replace(cfg, train=replace(cfg.train, compile=False))
        wrapped = launching.wrap(accelerator, self.built.objective, cfg)
        for network in self.built.frozen.values():
            network.to(self.device)
        rates = optim.resolve(cfg.optim, len(dataset) if dataset is not None else IMAGES)
        objective = accelerator.unwrap_model(wrapped.model)
        moved = checkpoint.averaged_tensors(objective) if cfg.optim.ema is not None else {}
        self.job = _job(cfg, self.built, rates, dataset, accelerator, wrapped)
        self.job.ema = {name: value.clone() for name, value in moved.items()}
        self.averages, self.held, self.number = Averages(None), Held(objective), 0
        self.waited = 0.0  # seconds of the last step in which the host waited for data
        optim.allocate(wrapped.optimizer.optimizer)
        self.ahead, self.means = Ahead(self.device), None
        if cfg.optim.ema is not None:
            means, present = sharding.local(self.job.ema.values()), sharding.local(moved.values())
            self.means = Average(means, present, 1 - cfg.optim.ema)
        self.batches = self._loaded() if shards else self._repeated(rows)
        wrapped.model.train()

    def step(self, phases: Phases | None = None) -> Tensor:
        """One optimizer step; returns its loss, 0-d on the device."""
        job, phases = self.job, phases or Phases(torch.device("cpu"))
        cfg, accelerator, objective = job.cfg, job.accelerator, job.objective
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited = time.perf_counter() - began
        phases.begin()
        self.number += 1
        optim.set_rates(job.optimizer, *job.rates.at(self.number - 1), job.rates.encoder_scale(self.number - 1))
        progress = torch.full((), (self.number - 1) / job.rates.total_steps, device=self.device)
        self.held.hold()
        train.seed_draws(cfg.optim.seed, self.number, accelerator.process_index, 0)
        batch = stream.to_device(self.ahead(batch), self.device)
        if hasattr(objective, "prepare"):
            batch = objective.prepare(batch)
        phases.mark("transfer")
        with frozen_networks.computing(cfg.train.precision, self.device):
            frozen_networks.write_targets(job.built.frozen, batch)
        phases.mark("frozen networks")
        out = job.model(batch, progress)
        loss = (out["loss"] * batch["weight"]).sum() / cfg.optim.batch_size
        phases.mark("forward")
        accelerator.backward(loss)
        phases.mark("backward")
        self.averages.add(out, batch["weight"])
        norm = train.clip(accelerator, job.model, cfg.optim.clip_grad)
        finite = torch.isfinite(norm)
        optim.update(job.optimizer, finite, accelerator.scaler)
        job.optimizer.zero_grad()
        if hasattr(objective, "after_step"):
            objective.after_step(self.number, progress)
        self.held.put_back(finite)
        if self.means is not None:
            self.means.move(finite)
        phases.mark("optimizer")
        return loss.detach()

    def _repeated(self, rows: int) -> Iterator[Batch]:
        made = [on(self.device, synthetic(self.built, rows, seed)) for seed in range(DISTINCT)]
        return itertools.cycle(made)

    def _loaded(self) -> Iterator[Batch]:
        return iter(train.loader(self.job, 0))


def _job(cfg: Config, built: build.Built, rates: Any, dataset: Any, accelerator: Any, wrapped: Any) -> Job:
    """What the loop works on, as far as its functions read it; there is no run directory and nobody attends."""
    data, journal, sequence = built.views.data, None, None
    if dataset is not None:
        sequence = mixture.order_of(dataset, seed=data.seed, lanes=data.lanes, window=data.window, repeats=data.repeats)
        journal = quarantine.Journal(mixture.bad_samples(dataset), dataset.counts, budget=data.bad_budget)
    missing: Any = None
    return Job(
        cfg, missing, built, rates, missing if dataset is None else dataset, missing if sequence is None else sequence,
        missing if journal is None else journal, {}, accelerator, wrapped.model, wrapped.optimizer, {}, missing, "",
    )  # fmt: skip


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which accelerate runs a forward pass at a precision."""
    return nullcontext() if precision == "no" else torch.autocast(device.type, torch.bfloat16)
