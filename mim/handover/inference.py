"""A run as one function of its pixels, for programs that know nothing of training: what ONNX and torch.export get.

Pixels in [0, 1] go in, normalisation is inside, so nobody can get it wrong; tokens, their pooled value and the logits
of a classifier come out. The backbone is timm's at one fixed size: positions are a table of that size and are never
resampled, because other runtimes have no antialiased bicubic resampling, or another one.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim.build import size_of
from mim.config import ConfigError
from mim.contracts import ExportError, LoadedRun
from mim.handover import timm_folder, timm_head
from mim.handover.export_folder import fixed_batch

POOLS = ("mean", "class")


class Inference(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> prefix (B, R, D), patches (B, N, D), pooled (B, D) and logits (B, classes).

    An encoder without prefix tokens has no `prefix` among its outputs, a run that is no classifier no `logits`. Tokens
    are those after the final norm; of a classifier that pools before any norm, those before it.
    """

    def __init__(self, encoder: Any, *, pool: str, classifier: Any = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.raw = self.frozen = False
        if classifier is not None:
            self.pool, self.frozen = classifier.cfg.pool, classifier.cfg.frozen
            self.raw = self.pool == "mean" and not self.frozen
            self.norm, self.head, self.distill_head = classifier.norm, classifier.head, classifier.distill_head
        else:
            self.norm, self.head, self.distill_head = nn.Identity(), None, None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, in a fixed order."""
        features = self.encoder.layers(images, [-1])[0] if self.raw else self.encoder(images)
        outputs = {"prefix": features.prefix} if features.prefix.shape[1] else {}
        pooled = features.patches.mean(dim=1) if self.pool == "mean" else features.prefix[:, 0]  # (B, D)
        outputs |= {"patches": features.patches, "pooled": pooled}
        if self.head is None:
            return outputs
        pooled = self.norm(pooled[..., None, None]).flatten(1) if self.frozen else self.norm(pooled)  # (B, D)
        logits = self.head(pooled)  # (B, classes)
        if self.distill_head is not None:  # the mean of two softmaxes
            second = self.distill_head(features.prefix[:, 1])
            logits = torch.logaddexp(logits.log_softmax(dim=1), second.log_softmax(dim=1)) - math.log(2)
        return {**outputs, "logits": logits}


@torch.no_grad()
def fixed_size(loaded: LoadedRun, size: tuple[int, int]) -> Any:
    """A copy of the run's encoder whose backbone is built for images of one size (H, W) alone."""
    with tempfile.TemporaryDirectory() as folder:
        timm_folder.write(loaded, Path(folder), license="unknown", head=False)
        changed = {} if size == tuple(loaded.views.sizes[0]) else {"img_size": size}
        backbone = timm_folder.open_folder(Path(folder), num_classes=0, **changed)
    (name,) = (name for name, child in loaded.encoder.named_children() if hasattr(child, "pretrained_cfg"))
    twin = copy.deepcopy(loaded.encoder)
    setattr(twin, name, backbone)
    return twin.float().eval().requires_grad_(False)


def inference(loaded: LoadedRun, *, size: tuple[int, int], pool: str) -> Inference:
    """The function of a run at one image size."""
    if pool not in POOLS:
        raise ConfigError(f"pool={pool!r} is unknown; choose {' or '.join(POOLS)}")
    try:
        loaded.encoder.grid(size)
    except ValueError as error:
        raise ConfigError(f"image_size={size[0]}x{size[1]} cannot be exported: {error}") from error
    classifier = copy.deepcopy(timm_head.classifier(loaded))
    return Inference(fixed_size(loaded, size), pool=pool, classifier=classifier).eval().requires_grad_(False)


@dataclass
class Prepared:
    """What an export of the function at one size needs."""

    network: Inference
    images: Tensor  # (3, C, H, W), the fixed batch
    expected: dict[str, Tensor]  # outputs of the run for them, by name
    notes: tuple[str, ...]  # for the model card
    facts: dict[str, Any]  # for the report


def prepare(loaded: LoadedRun, *, image_size: Any, pool: str) -> Prepared:
    """The function at `image_size` (null: the run's), and what the run gives at that size."""
    size = loaded.views.sizes[0] if image_size is None else size_of(image_size, "image_size")
    network = inference(loaded, size=size, pool=pool)
    images = fixed_batch(loaded, rows=3, size=size)
    outputs = expected(loaded, images, pool=pool)
    facts = {"image_size": list(size), "outputs": {name: list(t.shape[1:]) for name, t in outputs.items()}}
    return Prepared(network, images, outputs, notes(size, outputs), facts)


@torch.no_grad()
def expected(loaded: LoadedRun, images: Tensor, *, pool: str) -> dict[str, Tensor]:
    """What the training modules, as they are, make of images in [0, 1]: the outputs of `Inference`."""
    classifier = timm_head.classifier(loaded)
    try:
        found = Inference(loaded.encoder.cpu().float().eval(), pool=pool, classifier=classifier)(images)
    except (ValueError, AssertionError) as error:  # an encoder of one size
        raise ConfigError(str(error)) from error
    return found if classifier is None else found | {"logits": classifier.logits({"images": images})}


def traced(network: Inference, images: Tensor) -> Any:
    """The network as a program of torch.export for any number of images; the batch of the example must be above 1."""
    try:
        with quiet():
            program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch's own kinds differ by version
        raise ExportError(
            f"torch.export cannot trace this network: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    for node in program.graph.nodes:  # lines and paths of the source on this machine
        node.meta.pop("stack_trace", None)
    return program


def notes(size: tuple[int, int], outputs: dict[str, Tensor]) -> tuple[str, ...]:
    """What a model card tells of the function."""
    shapes = ", ".join(f"`{name}` (B, {', '.join(map(str, t.shape[1:]))})" for name, t in outputs.items())
    return (
        f"Input `images` (B, C, {size[0]}, {size[1]}) in [0, 1], any B: the normalisation is INSIDE the model, the "
        f"positions are of this size alone.",
        f"Outputs: {shapes}.",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the remarks of the tracers on their own inner workings."""
    before = logging.root.manager.disable
    logging.disable(max(logging.WARNING, before))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
