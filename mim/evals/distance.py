"""Picture: how far each head looks, block by block.

Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words", arXiv 2010.11929, figure 7 (right) and appendix D.7: the
distance between a patch and those that it attends to, weighted by the attention, averaged over patches and images.
The paper averages over 128 images. The title says what attention that is spread evenly over the patches comes to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.health.attention_maps import attention_maps, mean_distance
from mim.log import Pace
from mim.pictures.drawing import scatter
from mim.pictures.subjects import at_size, subjects

ARGUMENTS = ("images...",)  # may be given by their place


@dataclass
class Config:
    images: list[str] = field(default_factory=list)  # files, folders, datasets; none: held-out images of the run
    num_images: int = 32  # held-out ones, and of each folder and dataset
    size: int | None = None  # pixels of the short side; null: the model's


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the chart: a dot for each head over the number of its block, a line through the means."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer, which has no attention to show; take a run of an encoder")
    found = subjects(loaded, cfg.images, num_images=cfg.num_images, size=cfg.size)
    pace, sums, even = Pace("distance", len(found)), torch.zeros(()), 0.0
    for subject in found:
        fitting = at_size(encoder, subject.size)
        grid = fitting.grid(subject.size)
        of_map = partial(mean_distance, grid=grid, patch_size=encoder.patch_size)
        blocks = attention_maps(fitting, subject.batch["images"], list(range(encoder.depth)), reduce=of_map)
        sums = sums + torch.cat(blocks).cpu()  # (depth, heads)
        uniform = torch.ones(1, 1, grid[0] * grid[1], grid[0] * grid[1])
        even += float(of_map(uniform))
        pace.advance(1)
    far = sums / len(found)
    title = f"mean attention distance in pixels over {len(found)} images (evenly spread: {even / len(found):.0f})"
    yield "distance", scatter(far.tolist(), title=title, below="block", beside="pixels; a dot is a head")
