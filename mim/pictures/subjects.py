"""The images that a picture is made of: files, folders and shards that a user names, or the same held-out ones always.

Files and folders are shown whole, their short side brought to the asked size and both sides to the nearest multiple of
a patch. Shards and held-out images come as evaluations of the run see them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mim import build, ranks
from mim.config import ConfigError
from mim.contracts import Batch, DataError, LoadedRun
from mim.data import decode, listing, shards, stream
from mim.data.order import rng
from mim.log import say
from mim.probing.features import in_colour

ANY_SIZE = "dynamic_img_size"  # what timm's ViT and Eva have: positions of any grid


class Subject(NamedTuple):
    """One image on the device of the model."""

    name: str  # of its file or sample, without folder and ending; unique among those of a picture
    batch: Batch  # of this image alone: images (1, C, H, W) in [0, 1], tokenizer_images where the run has them

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.batch["images"].shape[-2:]
        return height, width

    @property
    def colours(self) -> torch.Tensor:
        """The image as (3, H, W), on the CPU."""
        return in_colour(self.batch["images"])[0].cpu()


def subjects(
    loaded: LoadedRun, images: Sequence[str], *, num_images: int, size: int | None = None, whole: bool = True
) -> list[Subject]:
    """Render the images that are named, or `num_images` held-out ones, also of each folder and dataset.

    size: pixels of the short side; null: the model's. Not `whole`, files are cut as evaluations of the run cut them.
    Raises ConfigError for what is no image, folder or dataset, DataError for what cannot be decoded.
    """
    if num_images < 1:
        raise ConfigError(f"num_images={num_images} must be at least 1")
    if size is not None and size < 1:
        raise ConfigError(f"size={size} must be at least 1 pixel")
    found: list[Subject] = []
    with ranks.main_first():  # a folder of the run may have to be made into shards
        datasets = [] if images else [_held_out(loaded)]
    for dataset in datasets:
        found += _of_dataset(loaded, dataset, num_images, size)
    for place in map(Path, images):
        path = place.expanduser()
        folder = next((part for part in (path, path / "val", path / "train") if shards.is_dataset(part)), None)
        if folder is not None:
            dataset = shards.Dataset.open(folder)
            dataset.map_range(build.raw_range(loaded.views.data, dataset))
            found += _of_dataset(loaded, dataset, num_images, size)
        elif path.is_dir():
            found += [_of_file(loaded, file, size, whole) for file in _files_of(path, num_images)]
        elif path.is_file():
            found.append(_of_file(loaded, path, size, whole))
        else:
            raise ConfigError(f"{place} is not a file, a folder of images or a dataset; name images that exist")
    return [subject._replace(name=name) for name, subject in zip(_unique(found), found, strict=True)]


def at_size(encoder: Any, size: tuple[int, int]) -> Any:
    """The encoder where it takes images of this size (H, W); else a copy with its positions resampled, as timm does."""
    backbone = next((child for child in encoder.children() if hasattr(child, "set_input_size")), None)
    if backbone is None or getattr(backbone, ANY_SIZE, False):
        return encoder
    if tuple(getattr(backbone.patch_embed, "img_size", None) or size) == size:
        return encoder
    twin = copy.deepcopy(encoder)
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # compiled for the original, whose weights it would still read
    inside = next(child for child in twin.children() if hasattr(child, "set_input_size"))
    try:
        inside.set_input_size(size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this model takes no images of {size[0]}x{size[1]} pixels: {error}; leave size out"
        ) from error
    return twin


def _held_out(loaded: LoadedRun) -> Any:
    train, val = build.open_data(loaded.config)
    return val if val is not None else train


def _of_dataset(loaded: LoadedRun, dataset: Any, num_images: int, size: int | None) -> Iterator[Subject]:
    """The first samples of those that evaluations look at."""
    views = loaded.views
    sizes = views.sizes if size is None else [_rounded(loaded, (size, size))]
    batches = stream.evaluate(
        dataset, view=views.evaluation, sizes=sizes, channels=views.data.channels, batch_size=1, limit=num_images
    )
    for batch in batches:
        yield Subject(Path(batch["keys"][0]).name, stream.to_device(batch, _device(loaded)))


def _of_file(loaded: LoadedRun, path: Path, size: int | None, whole: bool) -> Subject:
    """An image file, of 8 or 16 bits, as 8 bits."""
    views = loaded.views
    if views.data.range is not None:
        raise ConfigError(
            f"{path}: the run maps raw values with data.range; make shards of the images (mim shards make) and "
            f"name those"
        )
    try:
        pixels = decode.decode(path.read_bytes(), views.data.channels)  # (C, H, W)
    except decode.BadImage as error:
        raise DataError(f"{path} cannot be decoded: {error}; leave it out") from error
    short = size or min(views.sizes[0])
    if whole and (size is not None or _takes_any_size(loaded.encoder)):
        factor = short / min(pixels.shape[1:])
        height, width = (round(side * factor) for side in pixels.shape[1:])
        target = _rounded(loaded, (height, width))
        if target != tuple(pixels.shape[1:]):
            grid = "x".join(map(str, loaded.encoder.grid(target)))
            before = "x".join(map(str, pixels.shape[1:]))
            say(f"{path.name}: {before} pixels shown as {target[0]}x{target[1]}, a grid of {grid} patches")
        rendered = [F.interpolate(pixels[None], target, mode="bicubic", antialias=True)[0]]
    else:
        rendered = views.evaluation(pixels, rng("picture", 0, 0, 0), views.sizes)
    names = ("images", "tokenizer_images")[: len(rendered)]
    batch: Batch = {name: view[None] for name, view in zip(names, rendered, strict=True)}
    batch |= {"keys": [path.name], "range": [[0, 255]] * views.data.channels}
    return Subject(path.stem, stream.to_device(batch, _device(loaded)))


def _rounded(loaded: LoadedRun, size: tuple[int, int]) -> tuple[int, int]:
    """The nearest size that divides into patches."""
    unit = loaded.encoder.patch_size
    height, width = (max(round(side / unit), 1) * unit for side in size)
    return height, width


def _takes_any_size(encoder: Any) -> bool:
    """Whether images may have any shape: ViT and Eva compute positions for each grid, BEiT's tables are resampled."""
    backbone = getattr(encoder, "vit", None)
    return backbone is not None and (hasattr(backbone, ANY_SIZE) or hasattr(backbone, "rel_pos_bias"))


def _files_of(folder: Path, num_images: int) -> list[Path]:
    """The first images of a folder."""
    found = listing.list_images(folder).images
    if not found:
        raise ConfigError(f"{folder} holds no images; name a folder of images, image files or a dataset of shards")
    if len(found) > num_images:
        say(f"{folder}: the first {num_images} of {len(found)} images; num_images=... shows more")
    return [folder / image.path for image in found[:num_images]]


def _unique(found: Sequence[Subject]) -> list[str]:
    """Names, with a number from the second of the same name on."""
    names = [subject.name for subject in found]
    return [name if (n := names[:i].count(name)) == 0 else f"{name}-{n + 1}" for i, name in enumerate(names)]


def _device(loaded: LoadedRun) -> torch.device:
    return next(loaded.objective.parameters()).device
