"""Recipe sections -> encoder, objective, frozen networks, view and mask, with a check that their numbers agree.

The first place that knows all names. Training, evaluations and exports build through here, so a run directory is read
back by the code that wrote it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenizer as tokenizers
from mim import classifying_teacher, config, frozen_networks
from mim.config import ConfigError
from mim.contracts import DataError, LoadedRun
from mim.data import make, randaugment, shards, stream, tokens
from mim.data.location import redact
from mim.data.mixture import AnyDataset, Mixture
from mim.log import say
from mim.pretrained import weights
from mim.saving import checkpoint

Sections = dict[str, Any]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class Views:
    """How a run renders its images."""

    data: stream.Config
    sizes: list[tuple[int, int]]  # of images, then of tokenizer_images if they differ
    train: Callable[..., Any]
    evaluation: Callable[..., Any]
    mask: Callable[[np.random.Generator], np.ndarray] | None  # bound to the patch grid
    cache: tokens.TokenCache | None = None  # of the codes, where the recipe names one
    label_maps: bool = False  # whether the objective reads them

    @property
    def train_sizes(self) -> list[tuple[int, int]]:
        """What training renders: nobody reads `tokenizer_images` where the codes are known."""
        return self.sizes if self.cache is None else self.sizes[:1]


@dataclass
class Built:
    """What one recipe makes."""

    objective: Any  # Objective: what is trained
    encoder: Any  # Encoder | None
    frozen: dict[str, Any]  # networks that only write into the batch; no tokenizer where a cache holds its codes
    views: Views
    sections: Sections  # resolved: complete with defaults, as saved in config.yaml

    @functools.cached_property
    def at_hand(self) -> dict[str, Any]:
        """The frozen networks as evaluations see them: with the tokenizer whose codes training reads from a cache."""
        cached = self.views.cache
        return (
            self.frozen
            if cached is None
            else {**self.frozen, "tokenizer": frozen_networks.Deferred(self.sections, cached)}
        )


def build(
    sections: Sections, *, dataset: AnyDataset | None = None, load_frozen: bool = True, trains: bool = True
) -> Built:
    """Build everything that a recipe names.

    `dataset` supplies the pixel statistics that the recipe leaves open. With `load_frozen=False` a frozen tokenizer
    or teacher is built from its own recipe with fresh weights instead of from its run (recipe tests). With
    `trains=False` a teacher that classifies is left out: only training asks it.
    """
    try:
        return _build(sections, dataset, load_frozen, trains)
    except (ConfigError, DataError):
        raise
    except (ValueError, RuntimeError) as error:  # what a component says about its own numbers
        raise ConfigError(str(error)) from error


def _build(sections: Sections, dataset: AnyDataset | None, load_frozen: bool, trains: bool) -> Built:
    data = config.typed(stream.Config, sections["data"], "data")
    size = image_size(data)
    objective_module, objective_cfg = config.component("mim.objectives", sections.get("objective"), "objective")
    if hasattr(objective_cfg, "num_classes"):
        of_pixels = getattr(objective_module, "CLASSES", "labels") == "label_maps"
        objective_cfg.num_classes = num_classes(objective_cfg.num_classes, dataset, of_pixels=of_pixels)
    resolved = {**sections, "data": config.plain(data)}
    resolved["objective"] = {"name": sections["objective"]["name"], **config.plain(objective_cfg)}

    frozen: dict[str, Any] = {}
    sizes = [size]
    cache = _open_cache(sections) if load_frozen else None
    if sections.get("encoder") is None:  # the objective trains the tokenizer itself
        module, cfg = config.component("tokenizer", sections.get("tokenizer"), "tokenizer")
        inner = module.build(cfg)
        inner.grid(size)
        resolved["tokenizer"] = {"name": sections["tokenizer"]["name"], **config.plain(cfg)}
        encoder = None
    else:
        # `init` is read by mim/pretrained/weights.py
        section = {key: value for key, value in sections["encoder"].items() if key != "init"}
        module, cfg = config.component("mim.encoders", section, "encoder")
        mean, std = statistics(data.channels, dataset)
        cfg.mean, cfg.std = cfg.mean or mean, cfg.std or std
        inner = encoder = module.build(cfg, image_size=size, channels=data.channels)
        resolved["encoder"] = {**sections["encoder"], **config.plain(cfg)}
        if sections.get("tokenizer") is not None:
            _check_keys(sections["tokenizer"])
            if cache is None:
                frozen["tokenizer"] = _frozen_tokenizer(sections["tokenizer"], load_frozen)
            if load_frozen and (cache is None or frozen_networks.has_tokenizer(sections["tokenizer"])):
                # the checkpoint that was read, so that a later one cannot take its place
                folder = str(frozen_networks.tokenizer_path(sections["tokenizer"]).absolute())
                resolved["tokenizer"] = {**sections["tokenizer"], "path": folder}
            known = cache.tokenizer if cache is not None else frozen["tokenizer"]
            sizes.append(_tokenizer_size(sections["tokenizer"], known, encoder.grid(size)))
    objective = objective_module.build(inner, objective_cfg)
    distils = "teacher_logits" in objective.reads
    if distils and trains:
        frozen["teacher"], resolved["teacher"] = _classifier(sections.get("teacher"), load_frozen, data.channels)
    elif sections.get("teacher") is not None and not distils:
        frozen["teacher"], resolved["teacher"] = _frozen_teacher(sections["teacher"], load_frozen, data.channels)
        theirs, ours = frozen["teacher"].grid, inner.grid(size)
        if theirs != ours:
            raise ConfigError(
                f"the teacher sees {theirs[0]}x{theirs[1]} patches of an image, but the tokenizer makes "
                f"{ours[0]}x{ours[1]} codes; choose data.image_size and tokenizer.stride so that they agree"
            )
    objective.per_micro_batch |= normalises_batches(objective)
    _check_agreement(objective, sections, frozen if cache is None else {**frozen, "tokenizer": cache.tokenizer})

    mask = None
    if sections.get("mask") is not None and encoder is not None:
        mask = functools.partial(config.bind("mim.masking", sections["mask"], "mask"), encoder.grid(size))
        mask(np.random.default_rng(0))  # impossible counts are refused here, not in a worker
    view = config.bind("mim.data.augment", data.view, "data.view")
    eval_view = config.bind("mim.data.augment", data.eval_view, "data.eval_view")
    _check_views(data, dataset)
    if reads_maps := "label_maps" in objective.reads:
        _check_label_maps(data)
    sizes = sizes[:1] if sizes[-1] == sizes[0] else sizes
    views = Views(data, sizes, view, eval_view, mask, cache, reads_maps)
    if cache is not None and encoder is not None:
        resolved["tokens"] = str(cache.path.absolute())
        if dataset is not None:
            cache.check(token_binding(views, resolved, dataset, encoder.grid(size)))
    return Built(objective, encoder, frozen, views, resolved)


def normalises_batches(network: torch.nn.Module) -> bool:
    """Whether a loss depends on the other images of its micro-batch, because the network has a BatchNorm."""
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _check_views(data: stream.Config, dataset: AnyDataset | None) -> None:
    """Refuse photometric changes of images that cannot have them."""
    if not 0 <= data.jitter <= 1:
        raise ConfigError(f"data.jitter={data.jitter} must be from 0 to 1")
    if data.jitter and data.channels != 3:
        raise ConfigError(f"data.jitter={data.jitter} changes colours, but data.channels={data.channels}; use jitter=0")
    dtype = dataset.dtype if dataset is not None else "uint8"
    if "policy" in data.view:
        randaugment.transform_of(data.view["policy"], (0, 0, 0), 1)  # refused here, not in a worker
    for key, view in (("view", data.view), ("eval_view", data.eval_view)):
        limited = view["name"].startswith(("gray_", "rand_"))
        if limited and (data.channels not in (1, 3) or dtype != "uint8"):
            raise ConfigError(
                f"data.{key}.name={view['name']} takes 8-bit images of 1 or 3 channels, not {data.channels} of "
                f"{dtype}; use {view['name'].removeprefix('gray_').removeprefix('rand_augment_')}"
            )


def _check_label_maps(data: stream.Config) -> None:
    """Refuse views that leave label maps aside."""
    for key, view in (("view", data.view), ("eval_view", data.eval_view)):
        if not view["name"].startswith("segment_"):
            raise ConfigError(
                f"data.{key}.name={view['name']} shows no label maps, which the objective reads; use "
                f"{'segment_crop' if key == 'view' else 'segment_whole'}"
            )


def image_size(data: stream.Config) -> tuple[int, int]:
    """The size (H, W) of `data.image_size`."""
    return size_of(data.image_size, "data.image_size")


def size_of(value: Any, where: str) -> tuple[int, int]:
    """A size (H, W) stated as one number or two; `where` is its key, for the message."""
    size = value if isinstance(value, list) else [value] * 2
    if len(size) != 2 or not all(isinstance(pixels, int) and pixels >= 1 for pixels in size):
        raise ConfigError(f"{where}={value!r} must be one number of pixels or [height, width]")
    return size[0], size[1]


def statistics(channels: int, dataset: AnyDataset | None) -> tuple[list[float], list[float]]:
    """Pixel mean and std per channel: the dataset's own; without one ImageNet's for three channels, 0.5 otherwise.

    A gray dataset read in colour repeats its values; a colour dataset read in gray has statistics of its own in the
    lock. Without them (older locks) it gets the means over its channels, which is approximate: the decoder weighs
    channels unequally, and the std of gray depends on how they correlate.
    """
    if dataset is None:
        return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.5] * channels, [0.5] * channels)
    found = len(dataset.mean)
    if found == channels:
        return list(dataset.mean), list(dataset.std)
    if {found, channels} != {1, 3}:
        raise ConfigError(
            f"data.channels={channels}, but the images of {dataset.path} have {found}; set data.channels={found}"
        )
    if channels == 1 and dataset.gray is not None:
        return [dataset.gray["mean"]], [dataset.gray["std"]]
    return [float(np.mean(dataset.mean))] * channels, [float(np.mean(dataset.std))] * channels


def num_classes(stated: int | None, dataset: AnyDataset | None, *, of_pixels: bool) -> int:
    """The classes of an objective, of images or of pixels: as its recipe states them, or the dataset's; both agree."""
    if dataset is None:
        if stated is None:
            raise ConfigError(
                "objective.num_classes is missing: without its dataset a recipe must state it, e.g. "
                "objective.num_classes=1000"
            )
        return stated
    classes = dataset.pixel_classes if of_pixels else dataset.classes
    if classes is None:
        missing = (
            "label maps; make its shards with `mim shards make IMAGES OUT --masks DIR`"
            if of_pixels
            else "labels; make its shards with `mim shards make --labels-from-folders`, or set "
            "data.labels_from_folders=true for an image folder"
        )
        raise ConfigError(f"{dataset.path} has no {missing}")
    if stated not in (None, found := len(classes)):
        raise ConfigError(
            f"objective.num_classes={stated}, but {dataset.path} has {found}; set objective.num_classes={found}, or "
            f"leave it out"
        )
    return found


def open_data(sections: Sections) -> tuple[AnyDataset, shards.Dataset | None]:
    """Open the training and the held-out dataset, both with one range of raw values."""
    data = config.typed(stream.Config, sections["data"], "data")
    train, held_out = _open(sections)
    train.map_range(raw_range(data, train))
    if held_out is not None:
        convertible = held_out.channels == train.channels or {held_out.channels, train.channels} == {1, 3}
        if not convertible or held_out.dtype != train.dtype:
            raise ConfigError(
                f"{held_out.path} has {held_out.channels} channels of {held_out.dtype}, but {train.path} has "
                f"{train.channels} of {train.dtype}; hold out images of the same kind"
            )
        if None not in (both := (train.pixel_classes, held_out.pixel_classes)) and both[0] != both[1]:
            raise ConfigError(
                f"{held_out.path} has other classes of pixels than {train.path}; make both with the same --classes"
            )
        same = held_out.channels == train.channels
        held_out.map_range(train.range if same else raw_range(data, held_out))
    return train, held_out


def raw_range(data: stream.Config, dataset: AnyDataset) -> list[list[float]]:
    """Raw values [low, high] per channel of the dataset that become 0 and 1: the recipe's, else the dataset's."""
    if data.range is None:
        return dataset.range
    pairs = data.range if data.range and isinstance(data.range[0], list) else [data.range] * dataset.channels
    right = len(pairs) == dataset.channels and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(v, int | float) for v in pair)
        and pair[0] < pair[1]
        for pair in pairs
    )
    if not right:
        raise ConfigError(
            f"data.range={data.range} must be [low, high] with low < high, or one such pair for each of the "
            f"{dataset.channels} channels of {dataset.path}"
        )
    return pairs


def _open(sections: Sections) -> tuple[AnyDataset, shards.Dataset | None]:
    """Open the datasets; an image folder is made into shards once, in the cache.

    Of several sources, only `data.val_path` holds out.
    """
    data = config.typed(stream.Config, sections["data"], "data")
    cache = Path(sections.get("train", {}).get("cache_dir") or "~/.cache/mimstream").expanduser()
    limit = sections.get("train", {}).get("cache_limit")
    settings: Any = {"cache_dir": cache / "shards", "cache_limit": None if limit is None else int(limit * 2**30)}
    inside: AnyDataset
    if data.sources:
        folders = [_dataset_folder(source.path, data, cache, val_ratio=0.0) for source in data.sources]
        datasets = [shards.Dataset.open(_part(folder, "train") or folder, **settings) for folder in folders]
        inside, held_out = Mixture(datasets, [source.weight for source in data.sources]), None
    else:
        root = _dataset_folder(str(data.path), data, cache, val_ratio=data.val_ratio)
        inside, held_out = shards.Dataset.open(_part(root, "train") or root, **settings), _part(root, "val")
    if data.val_path is not None:
        held_out = _dataset_folder(data.val_path, data, cache, val_ratio=0.0)
    return inside, shards.Dataset.open(held_out, **settings) if held_out is not None else None


def _dataset_folder(path: str, data: stream.Config, cache: Path, *, val_ratio: float) -> Path:
    """A dataset folder, or the one that holds its `train` and `val`; of an image folder, what was made of it."""
    if "://" in path:
        shown = redact(path)  # it may hold a password
        raise ConfigError(f"{shown} is an address where `data` wants a folder; make one: mim shards index {shown} OUT")
    root = Path(path).expanduser()
    if shards.is_dataset(root) or _part(root, "train"):
        return root
    labels = data.labels_from_folders
    return make.cached(root, cache, labels_from_folders=labels, val_ratio=val_ratio, seed=data.seed)


def _part(root: Path, name: str) -> Path | None:
    """The dataset `name` inside a folder, if it is one."""
    return root / name if shards.is_dataset(root / name) else None


def load_run(path: Path | str, *, step: int | None = None, report: Callable[[str], None] = say) -> LoadedRun:
    """Open a run directory as plain modules in evaluation mode, with averaged weights where the run has them."""
    run = Path(path)
    saved = checkpoint.read_config(run)
    folder = run / "checkpoints" / f"step-{step:08d}" if step is not None else checkpoint.newest(run, report=report)
    if folder is None or not folder.is_dir():
        known = ", ".join(str(checkpoint.step_of(f)) for f in checkpoint.list_checkpoints(run)) or "none"
        raise ConfigError(f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; steps it has: {known}")
    if saved.get("tokens") is not None and frozen_networks.has_tokenizer(saved["tokenizer"]):
        saved = {**saved, "tokens": None}  # a cache serves training alone: a run is read without it
    built = build(saved, trains=False)
    model = built.objective
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if saved["optim"].get("ema") is not None:
        state |= {f"ema.{name}": torch.empty_like(value) for name, value in checkpoint.averaged_tensors(model).items()}
    checkpoint.load_tensors(folder, state, alone=True)
    model.load_state_dict(checkpoint.part(state, "model.") | checkpoint.part(state, "ema."))
    model.eval().requires_grad_(False)
    return LoadedRun(model, built.encoder, built.at_hand, built.views, built.sections, checkpoint.step_of(folder), run)


def load_tokenizer(folder: Path, data: dict[str, Any]) -> LoadedRun:
    """Open a tokenizer's folder as evaluations see a run of it, on the images of a section `data`.

    A folder has no recipe, and a tokenizer of features no teacher in it: what compares with a teacher is left out.
    """
    try:
        tokenizer = tokenizers.load(folder)
        found = config.typed(stream.Config, {"channels": tokenizer.channels, **data}, "data")
        tokenizer.grid(image_size(found))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_channels(tokenizer, found.channels)
    objective_module, objective_cfg = config.component("mim.objectives", {"name": "tokenize"}, "objective")
    objective = objective_module.build(tokenizer, objective_cfg).eval().requires_grad_(False)
    eval_view = config.bind("mim.data.augment", found.eval_view, "data.eval_view")
    views = Views(found, [image_size(found)], eval_view, eval_view, None)
    sections = {"data": config.plain(found), "objective": {"name": "tokenize"}}
    return LoadedRun(objective, None, {}, views, sections, 0, folder)


# ---- token cache ---------------------------------------------------------------------------------


def token_binding(views: Views, sections: Sections, dataset: AnyDataset, grid: tuple[int, int]) -> dict[str, Any]:
    """All that decides the codes of an image but rounding, as plain data; `sections` are resolved.

    The options of the view are complete with their defaults, so a recipe may state them or not.
    """
    data, section = views.data, sections["tokenizer"]
    options = {
        p.name: p.default for p in inspect.signature(views.train).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    tokenizer = views.cache.tokenizer.sha256 if views.cache is not None else None
    if frozen_networks.has_tokenizer(section):
        tokenizer = tokenizers.file_hash(frozen_networks.tokenizer_path(section))
    return config.plain(
        {
            "dataset_id": dataset.id,
            "tokenizer": tokenizer,
            "view": {"name": data.view["name"], **options},
            "jitter": data.jitter,
            "views": data.views,
            "repeats": data.repeats,
            "seed": data.seed,
            "sizes": views.sizes,  # of images, whose colours the jitter turns around, and of what the tokenizer sees
            "grid": grid,
            "channels": data.channels,
            "range": stream.value_range(dataset, data.channels),
        }
    )


def tokenizer_facts(sections: Sections, tokenizer: Any) -> tokens.TokenizerFacts:
    """What a cache keeps of the tokenizer that makes it; `sections` are resolved."""
    folder = frozen_networks.tokenizer_path(sections["tokenizer"])
    card = tokenizers.score_card(folder)
    return tokens.TokenizerFacts(
        tokenizers.file_hash(folder), tokenizer.num_codes, tokenizer.stride, tokenizer.channels, card
    )


def _open_cache(sections: Sections) -> tokens.TokenCache | None:
    """The token cache that a recipe names; None without one."""
    if sections.get("tokens") is None:
        return None
    if sections.get("encoder") is None or sections.get("tokenizer") is None:
        raise ConfigError(
            f"tokens={sections['tokens']} holds the codes of a frozen tokenizer, but this recipe has none; add "
            f"tokenizer: {{recipe: NAME, path: RUN}}, or leave `tokens` out"
        )
    return tokens.TokenCache.open(sections["tokens"])


# ---- frozen networks -----------------------------------------------------------------------------


def _check_keys(section: dict[str, Any]) -> None:
    unknown = set(section) - {"recipe", "path", "image_size", "force"}
    if unknown:
        raise ConfigError(f"tokenizer.{min(unknown)} is not a known key; known here: recipe, path, image_size, force")


def _frozen_tokenizer(section: dict[str, Any], load: bool) -> Any:
    if load:
        try:
            return tokenizers.load(frozen_networks.tokenizer_path(section))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    recipe = config.read(section["recipe"])
    module, cfg = config.component("tokenizer", recipe.get("tokenizer"), f"{section['recipe']}: tokenizer")
    return module.build(cfg).eval().requires_grad_(False)


def _frozen_teacher(
    section: dict[str, Any], load: bool, channels: int
) -> tuple[frozen_networks.Teacher, dict[str, Any]]:
    """A teacher, and its section with the identity of the weights that were read.

    Either the encoder of a run of ours (`recipe`, `path`), or any encoder with weights that others released
    (`encoder`, `init`, `image_size`).
    """
    released = section.get("encoder") is not None
    known = ("encoder", "init", "image_size") if released else ("recipe", "path", "step")
    unknown = set(section) - {*known, "experiment"}
    if unknown:
        raise ConfigError(f"teacher.{min(unknown)} is not a known key; known here: {', '.join(known)}")
    if released:
        return _released_teacher(section, load, channels)
    if not load:
        built = build(config.read(section["recipe"]), load_frozen=False)
        teacher = frozen_networks.Teacher(built.encoder, image_size(built.views.data))
        return teacher.eval().requires_grad_(False), section
    path = frozen_networks.teacher_path(section)
    run = load_run(path, step=section.get("step"))
    if run.encoder is None:
        raise ConfigError(
            f"teacher.path={str(path)!r} trained a tokenizer, which has no features; take the run of an encoder"
        )
    found = {"path": str(path.absolute()), "step": run.step, "experiment": config.digest(run.config["experiment"])}
    return frozen_networks.Teacher(run.encoder, image_size(run.views.data)), {**section, **found}


def _released_teacher(
    section: dict[str, Any], load: bool, channels: int
) -> tuple[frozen_networks.Teacher, dict[str, Any]]:
    """An encoder filled from `teacher.init`; without `load` it has fresh weights."""
    size = size_of(section.get("image_size", 224), "teacher.image_size")
    module, cfg = config.component("mim.encoders", section["encoder"], "teacher.encoder")
    mean, std = statistics(channels, None)
    cfg.mean, cfg.std = cfg.mean or mean, cfg.std or std
    encoder = module.build(cfg, image_size=size, channels=channels)
    resolved = {**section, "encoder": {**section["encoder"], **config.plain(cfg)}, "image_size": list(size)}
    if load:
        frozen_networks.teacher_path(section)
        report = weights.initialize_encoder(encoder, str(section["init"]))
        say(report.lines()[0].replace("weights", "teacher: weights", 1))
        resolved["experiment"] = frozen_networks.weights_hash(encoder)
    return frozen_networks.Teacher(encoder, size).eval().requires_grad_(False), resolved


def _classifier(
    section: dict[str, Any] | None, load: bool, channels: int
) -> tuple[classifying_teacher.Classifier, dict[str, Any]]:
    """A teacher that classifies, and its section with the identity of the weights that were read."""
    if section is None:
        raise ConfigError(
            "objective.distill needs a teacher; add teacher: {path: RUN} of objective.name=classify, or teacher: "
            "{model: regnety_160.deit_in1k, pretrained: true}"
        )
    if section.get("model") is not None:
        return classifying_teacher.of_timm(section, load=load, channels=channels)
    known = ("recipe", "path", "step")
    if unknown := set(section) - {*known, "experiment"}:
        raise ConfigError(
            f"teacher.{min(unknown)} is not a known key; known here: {', '.join((*known, *classifying_teacher.KEYS))}"
        )
    if not load:
        built = build(config.read(section["recipe"]), load_frozen=False, trains=False)
        size = image_size(built.views.data)
        return classifying_teacher.of_objective(built.objective, size, section["recipe"]), section
    path = frozen_networks.teacher_path(section)
    run = load_run(path, step=section.get("step"))
    found = {"path": str(path.absolute()), "step": run.step, "experiment": config.digest(run.config["experiment"])}
    teacher = classifying_teacher.of_objective(run.objective, image_size(run.views.data), str(path))
    return teacher, {**section, **found}


def _tokenizer_size(section: dict[str, Any], tokenizer: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """The image size at which the tokenizer's grid equals the patch grid; a size that the recipe states must fit."""
    fitting = grid[0] * tokenizer.stride, grid[1] * tokenizer.stride
    stated = section.get("image_size")
    if stated is None:
        return fitting
    given = (stated, stated) if isinstance(stated, int) else tuple(stated)
    if given != fitting:
        h, w = tokenizer.grid(given)
        right = fitting[0] if fitting[0] == fitting[1] else list(fitting)
        raise ConfigError(
            f"tokenizer.image_size={stated} gives a grid of {h}x{w} codes, but the encoder has {grid[0]}x{grid[1]} "
            f"patches; use tokenizer.image_size={right}, or leave it out"
        )
    return fitting


def _check_agreement(objective: Any, sections: Sections, frozen: dict[str, Any]) -> None:
    """Refuse what an objective reads and nobody writes, and numbers that contradict each other."""
    name = sections["objective"]["name"]
    crops = sections["data"].get("view", {}).get("name") == "multi_crop"
    if crops != ("local_images" in objective.reads):
        raise ConfigError(
            f"data.view.name={'multi_crop' if crops else 'a single crop'}, but objective.name={name} reads "
            f"{'one crop; use crop' if crops else 'several; use multi_crop'}"
        )
    if "mask" in objective.reads and sections.get("mask") is None:
        raise ConfigError(f"objective.name={name} needs a mask; add e.g. mask: {{name: random, ratio: 0.75}}")
    if "codes" in objective.reads:
        if "tokenizer" not in frozen:
            raise ConfigError(f"objective.name={name} needs a tokenizer; add tokenizer: {{recipe: NAME, path: RUN}}")
        theirs = frozen["tokenizer"].num_codes
        if objective.num_codes != theirs:
            raise ConfigError(
                f"objective.num_codes={objective.num_codes}, but the tokenizer has {theirs} codes; "
                f"set objective.num_codes={theirs}"
            )
    if "teacher" in frozen and not {"targets", "teacher_logits"} & set(objective.reads):
        raise ConfigError(
            f"there is a teacher, but objective.name={name} reads nothing of it; "
            + ("set objective.distill.kind=hard, or teacher=null" if name == "classify" else "set teacher=null")
        )
    if "teacher_logits" in objective.reads and "teacher" in frozen:
        theirs, ours = frozen["teacher"].num_classes, objective.num_classes
        if theirs != ours:
            raise ConfigError(
                f"the teacher knows {theirs} classes, but objective.num_classes={ours}; choose a teacher of the same "
                f"classes in the same order"
            )
    if "targets" in objective.reads:
        if "teacher" not in frozen:
            raise ConfigError("tokenizer.target=features needs a teacher; add teacher: {path: RUN}, or target: pixels")
        theirs, ours = frozen["teacher"].width, objective.tokenizer.target_width
        if theirs != ours:
            raise ConfigError(f"tokenizer.target_width={ours}, but the teacher is {theirs} wide; make them equal")
    tokenizer = frozen.get("tokenizer") or getattr(objective, "tokenizer", None)
    if tokenizer is not None:
        _check_channels(tokenizer, sections["data"].get("channels", 3))


def _check_channels(tokenizer: Any, channels: int) -> None:
    if tokenizer.channels != channels:
        raise ConfigError(f"the tokenizer takes {tokenizer.channels} channels, but data.channels={channels}")
