"""Health without labels: is something learned, and is the representation alive. docs/health.md explains each number.

Everything is taken on held-out images whose views, masks and draws are named by the sample, so the numbers of two
steps, and of two runs on the same images, can be compared. Ranks share the images as a bank does (probing/bank.py), the
numbers of images are summed by `math.fsum`, which rounds once, and the rest is counted in integers: the numbers of many
processes are those of one, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mim import build, config, frozen_networks, ranks
from mim.config import ConfigError
from mim.contracts import Batch, LoadedRun, NamedValues
from mim.data import stream
from mim.data.mixture import AnyDataset
from mim.data.order import rng
from mim.health import activity, baselines
from mim.health import feature_statistics as statistics
from mim.health.attention_maps import attention_maps
from mim.log import Pace, say
from mim.patches import mask_to_ids
from mim.probing.bank import extract
from mim.probing.features import Wanted, embedder
from tokenizer.quantize import code_counts

UNIFORM, COLLAPSED = 0.98, 0.02  # entropy of a head, as a share of the largest
VIEW_SCALE = 0.4, 1.0  # share of an image's area that a crop for LiDAR shows
ATTENTION_BATCH = 16  # images whose maps are held at once


@dataclass
class Config:
    limit: int = 1024  # held-out images, a fixed random subset
    batch_size: int = 64  # images on a device at once
    attention_images: int = 64  # whose attention maps are taken; 0: none
    lidar_images: int = 128  # of LiDAR; 0: none
    lidar_views: int = 8  # crops of each


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the numbers of docs/health.md that this run has."""
    if loaded.encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer; its health is its score card: mim eval codebook")
    if cfg.limit < 2 or min(cfg.attention_images, cfg.lidar_images) < 0 or cfg.lidar_views < 2:
        raise ConfigError(
            f"limit={cfg.limit} and lidar_views={cfg.lidar_views} must be at least 2, and attention_images="
            f"{cfg.attention_images} and lidar_images={cfg.lidar_images} at least 0"
        )
    if not all(parameter.isfinite().all() for parameter in loaded.encoder.parameters()):
        say(f"health: the weights of step {loaded.step} are not finite")
        return
    with ranks.main_first():  # an image folder is made into shards once
        train, val = build.open_data(loaded.config)
    if val is None:
        say_once(f"{train.path} holds nothing out: health looks at training images")
    dataset = val if val is not None else train
    if len(stream.evaluated(dataset, limit=cfg.limit)) < 2:
        say_once(f"{dataset.path} has no two images to compare: health looks at none")
        return
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling for a few images would take longer than they do
            yield from numbers(loaded, cfg, dataset)
    except FloatingPointError as error:  # the same on every rank
        say(f"health: {error} at step {loaded.step}, so their spectra and all that follows are left out")


def numbers(loaded: LoadedRun, cfg: Config, dataset: AnyDataset) -> NamedValues:
    """All of them."""
    yield from prediction(loaded, cfg, dataset)
    if loaded.views.label_maps:  # whose views are of pairs
        whole = config.bind("mim.data.augment", {"name": "center"}, "data.eval_view")
        loaded = dataclasses.replace(loaded, views=dataclasses.replace(loaded.views, evaluation=whole))
    yield from representation(loaded, cfg, dataset)
    if cfg.lidar_images > 1:
        yield "lidar", statistics.lidar(views(loaded, cfg, dataset))
    if cfg.attention_images:
        yield from attention(loaded, cfg, dataset)
    gammas = activity.gammas(loaded.encoder)
    if gammas:
        yield "layer_scale", math.fsum(gammas.values()) / len(gammas)
        yield "layer_scale_min", min(gammas.values())
        yield from ((f"layer_scale/{block}", value) for block, value in gammas.items())


@functools.cache
def say_once(message: str) -> None:
    """Say something that is as true at the next evaluation as now."""
    say(message)


# ---- what is predicted, and what would be without learning -----------------------------------------------------------


@torch.no_grad()
def prediction(loaded: LoadedRun, cfg: Config, dataset: AnyDataset) -> NamedValues:
    """The objective's loss and accuracies beside those of trivial predictions; nothing for one without masks."""
    objective = loaded.objective
    if "mask" not in objective.reads or not hasattr(objective, "truth"):
        return
    grid = loaded.encoder.grid(loaded.views.sizes[0])
    if loaded.views.mask is None or loaded.views.mask.args[0] != grid:
        say_once(f"health: the masks of {loaded.path} are not for images of {loaded.views.sizes[0]}: no loss is shown")
        return
    try:
        _ = "codes" in objective.reads and loaded.frozen["tokenizer"].encode
    except ConfigError as error:  # a run that has only the codes of its training images
        say_once(f"health without a loss: {error}")
        return
    device = next(objective.parameters()).device
    told: dict[str, list[float]] = {}
    counts = torch.zeros(getattr(objective, "num_codes", 0), dtype=torch.int64, device=device)
    for batch in batches(loaded, cfg, dataset, device):
        found = objective(batch, batch["weight"].new_ones(()))
        values = {f"val_{name}": value for name, value in found.items() if value.ndim}
        truth = objective.truth(batch)  # (B, N) codes, or (B, N, P)
        _, ids_mask, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        nearest = baselines.nearest_visible(batch["mask"], grid)
        if truth.ndim == 2:
            values["baseline_copy_accuracy"] = baselines.copied_codes(truth, ids_mask, nearest)
            counts += code_counts(truth.gather(1, ids_mask), len(counts))
        else:
            values |= baselines.of_pixels(truth, ids_mask, nearest, objective.error)
        for name, value in values.items():
            told.setdefault(name, []).extend(value.double().tolist())
    means = mean_over_ranks(told, device)
    if (total := int(ranks.add(counts).sum())) > 0:
        means["baseline_unigram"] = getattr(objective, "num_predictions", 1) * baselines.entropy(counts)
        means["baseline_unigram_accuracy"] = int(counts.max()) / total
    yield from means.items()
    trivial = min(means[name] for name in ("baseline_unigram", "baseline_mean_patch", "baseline_copy") if name in means)
    if trivial > 0:
        yield "skill", 1 - means["val_loss"] / trivial


def batches(loaded: LoadedRun, cfg: Config, dataset: AnyDataset, device: torch.device) -> Iterator[Batch]:
    """This rank's share of the held-out images with their masks, and with what the frozen networks write."""
    rank, world = ranks.place()
    num_images = len(stream.evaluated(dataset, limit=cfg.limit))
    pace = Pace(f"health on {dataset.path}", num_images, main=rank == 0)
    for batch in stream.evaluate(
        dataset,
        view=loaded.views.evaluation,
        sizes=loaded.views.sizes,
        mask=loaded.views.mask,
        channels=loaded.views.data.channels,
        batch_size=cfg.batch_size,
        limit=cfg.limit,
        only=range(-(-num_images // cfg.batch_size))[rank::world],
    ):
        batch = stream.to_device(batch, device)
        frozen_networks.write_targets(loaded.frozen, batch)
        yield batch
        pace.advance(len(batch["keys"]) * world)


def mean_over_ranks(told: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Means of the per-image numbers of all ranks, whatever rank has which."""
    rows = ranks.gather([list(told)] if told else [], device)
    names = rows[0] if rows else []
    columns = {name: ranks.gather(told.get(name, []), device) for name in names}
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}


# ---- the representation ----------------------------------------------------------------------------------------------


def representation(loaded: LoadedRun, cfg: Config, dataset: AnyDataset) -> NamedValues:
    """Rank, spread and likeness of the pooled features of all blocks, and the units that never fire."""
    encoder = loaded.encoder
    blocks = sorted(getattr(encoder, "stages", range(encoder.depth)))  # those that have an output
    layers = [block + 1 for block in blocks]
    with activity.fired(encoder) as fired:
        features = columns(loaded, dataset, embedder(loaded, Wanted(layers)), cfg.limit, cfg.batch_size)
    by_layer = [features[f"{layer}/mean"] for layer in layers]
    last = by_layer[-1]
    yield "rankme", statistics.rankme(last)
    if (alpha := statistics.alpha_req(last)) is not None:
        yield "alpha_req", alpha
    deviations = statistics.spread(last)
    yield "feature_std", float(deviations.mean())
    yield "feature_std_min", float(deviations.min())
    yield "uniformity", statistics.uniformity(last)
    likeness = [statistics.linear_cka(one, last) for one in by_layer[:-1]]
    if likeness:
        yield "cka_first_last", likeness[0]
        yield from ((f"cka/{layer}", value) for layer, value in zip(layers, likeness, strict=False))
    yield from dead_neurons(encoder, {name: ranks.add(counts) for name, counts in fired.items()})


def dead_neurons(encoder: Any, fired: dict[str, Tensor]) -> NamedValues:
    """The share of units that fired in no image, of all and by block."""
    dead: dict[int, list[int]] = {}
    for name, counts in fired.items():
        block = dead.setdefault(encoder.depth_of(f"{name}.weight"), [0, 0])
        block[0] += int((counts == 0).sum())
        block[1] += len(counts)
    if dead:
        yield "dead_neurons", sum(n for n, _ in dead.values()) / sum(units for _, units in dead.values())
        yield from ((f"dead_neurons/{block}", n / units) for block, (n, units) in sorted(dead.items()))


def views(loaded: LoadedRun, cfg: Config, dataset: AnyDataset) -> Tensor:
    """Features (n, q, D) of q crops of n images. The crops are fixed: that of number j is the same of every image."""
    embed = embedder(loaded, Wanted([-1]))
    boxes = [crop_box(number) for number in range(cfg.lidar_views)]

    def embed_views(images: Tensor) -> dict[str, Tensor]:
        found = [embed(cropped(images, box))["-1/mean"] for box in boxes]  # q of (B, D)
        return {"views": torch.stack(found, dim=1)}  # (B, q, D)

    return columns(loaded, dataset, embed_views, cfg.lidar_images, cfg.batch_size)["views"]


def crop_box(number: int) -> tuple[float, float, float, bool]:
    """Side, top and left of a square crop as shares of the image, and whether it is flipped."""
    draws = rng("lidar", 0, stream.EVALUATION, number)
    side = math.sqrt(draws.uniform(*VIEW_SCALE))
    return side, draws.uniform(0, 1 - side), draws.uniform(0, 1 - side), bool(number % 2)


def cropped(images: Tensor, box: tuple[float, float, float, bool]) -> Tensor:
    """A crop of images (B, C, H, W), in their own size."""
    side, top, left, flip = box
    height, width = images.shape[-2:]
    rows = slice(round(top * height), round(top * height) + max(round(side * height), 1))
    places = slice(round(left * width), round(left * width) + max(round(side * width), 1))
    found = F.interpolate(images[..., rows, places], (height, width), mode="bilinear", antialias=True)
    return found.flip(-1) if flip else found


def attention(loaded: LoadedRun, cfg: Config, dataset: AnyDataset) -> NamedValues:
    """How widely and how far the heads look; nothing for encoders that have no maps of all patches with all patches."""
    encoder = loaded.encoder
    grid = encoder.grid(loaded.views.sizes[0])
    reduce = functools.partial(activity.looks, grid=grid, patch_size=encoder.patch_size)

    def embed(images: Tensor) -> dict[str, Tensor]:
        found = attention_maps(encoder, images, range(encoder.depth), reduce=reduce)  # (B, heads, 2) of each block
        return {str(block): value for block, value in enumerate(found, start=1)}

    try:
        found = columns(loaded, dataset, embed, cfg.attention_images, ATTENTION_BATCH)
    except ConfigError as error:  # the same on every rank: it is a matter of the architecture
        say_once(f"health without attention: {error}")
        return
    means = [found[str(block)].mean(dim=0) for block in range(1, encoder.depth + 1)]  # (heads, 2) of each block
    heads = torch.cat(means)  # (depth heads, 2)
    for number, name in enumerate(("attention_entropy", "attention_distance")):
        yield name, float(heads[:, number].mean())
        yield f"{name}_min", float(heads[:, number].min())
        yield f"{name}_max", float(heads[:, number].max())
        yield from ((f"{name}/{i}", float(block[:, number].mean())) for i, block in enumerate(means, start=1))
    yield "heads_uniform", float((heads[:, 0] > UNIFORM).sum())
    yield "heads_collapsed", float((heads[:, 0] < COLLAPSED).sum())


def columns(loaded: LoadedRun, dataset: AnyDataset, embed: Any, limit: int, batch_size: int) -> dict[str, Tensor]:
    """What `embed` makes of the images, row by row on every rank, on the CPU. Raises FloatingPointError."""
    device = next(loaded.encoder.parameters()).device
    found = extract(dataset, loaded.views, embed, device=device, batch_size=batch_size, limit=limit).columns
    if not all(bool(column.isfinite().all()) for column in found.values()):
        raise FloatingPointError("features of the encoder are not finite")
    return found
