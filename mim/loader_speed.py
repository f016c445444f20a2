"""The speed of a recipe's loader on its data: what `mim bench data` prints and `mim plan --measure` reckons with."""

from __future__ import annotations

import contextlib

import torch

from mim import build, config
from mim.data import diagnosis, mixture
from mim.job import Config, num_workers


def measure(cfg: Config, *, seconds: float) -> diagnosis.Diagnosis:
    """Time the stages of a recipe's loader, `seconds` for each of three measurements."""
    sections = config.plain(cfg)
    dataset, _ = build.open_data(sections)
    trained = bool((sections.get("tokenizer") or {}).get("path") or sections.get("tokens"))
    with contextlib.nullcontext() if trained else torch.device("meta"):  # sizes and mask are wanted, not the networks
        views = build.build(sections, dataset=dataset, load_frozen=trained).views
    data = views.data
    on_gpu = torch.accelerator.is_available() and not cfg.train.cpu
    device = torch.accelerator.current_accelerator() if on_gpu else None
    return diagnosis.measure(
        dataset,
        order=mixture.order_of(dataset, seed=data.seed, lanes=data.lanes, window=data.window, repeats=data.repeats),
        view=views.train,
        sizes=views.train_sizes,
        mask=views.mask,
        channels=data.channels,
        batch_size=min(cfg.optim.batch_size, 256),
        workers=num_workers(cfg.train.workers),
        device=device or torch.device("cpu"),
        label_maps=views.label_maps,
        seconds=seconds,
    )
