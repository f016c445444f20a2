"""The borders between the parts: protocols and prose, no behaviour. docs/extending.md tells how to add one of each.

Images are (B, C, H, W), uint8 (uint16 or float32 where the files are) in the loader and float in [0, 1] once on the
device; H may differ from W. Each network
normalises its own input on its first line. The shape legend is in `mim/__init__.py`.

A `Batch` is a dict:
    images             (B, C, H, W), or (B, V, C, H, W): V global crops
    local_images       (B, n, C, h, w) local crops, of views that make some
    tokenizer_images   (B, C, H', W') the same crop and flip at the tokenizer's size
    mask               (B, N) bool, True = masked, row-major over the grid; the same count in every row
    num_masked         int, that count, known without asking the device
    range              [[low, high]] per channel: raw values that become 0 and 1; used up on the device
    jitter             float, strength of the colour jitter that the device does; absent when there is none
    weight             (B,) float, 0 on rows that only pad a micro-batch
    noise              (B,) int64, a seed per sample for draws on the device
    view_noise         (B,) int64, the seeds of the colour jitter, which come again with `data.views`; used up with it
    teacher_logits     (B, classes) written by a frozen classifier (DeiT)
    codes              (B, N) int64, written by the frozen tokenizer, or by the loader from a token cache
    labels             (B,) int64, -1 = unknown; absent when the dataset has none
    label_maps         (B, H, W) class of every pixel of `images`, uint8 in the loader, int64 on the device; IGNORE
                       where there is none: unlabelled, beyond the image, rows that only pad; absent unless asked for
    soft_labels        (B, classes), written by `classify` where it mixes images
    confidence         (B, N) float, probability of what is predicted at each patch, written by `reconstruct`
    predicted_codes    (B, N) int64, the codes predicted there, written by `reconstruct` of objectives of codes
    keys               list[str], "shard.tar/sample", for messages and pictures; of a mixture after the source's path
    position           int, global positions consumed after this step
    epoch              int, epoch of the first row
    bad                list[dict], samples that could not be decoded: sample, key, reason, and the substitute's key
    seconds            dict, what the worker spent in each stage: read, decode, augment, collate
    fingerprint        int, commutative hash of the consumed positions, to compare two streams
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

Batch = dict[str, Any]
IGNORE = 255  # in `label_maps`: no class


class DataError(ValueError):
    """Data that cannot be used: which file or sample, why, and what to do. Exit code 65."""


class StorageError(OSError):
    """A disk that is full or refuses to write. Exit code 74."""


class NumericsError(RuntimeError):
    """A training that goes wrong again after every rollback, or before there is anything to return to. Exit code 70."""


class ExportError(RuntimeError):
    """An export that is not what the run is: a feature differs, a tensor is unused or missing. Exit code 70."""


class Features(NamedTuple):
    """What an encoder returns: nobody slices prefix tokens by hand."""

    prefix: Tensor  # (B, R, D) class and register tokens
    patches: Tensor  # (B, N, D), or (B, K, D) when patches were dropped


class Encoder(Protocol):
    """A backbone that may replace patches by a mask token (`mask`) or drop them (`ids_keep`); at most one is given.

    With `ids_read` (B, M) the last block's features are those of these patches alone, (B, M, D): what a head over
    masked patches reads.
    """

    width: int
    depth: int
    channels: int  # of the images
    patch_size: int  # total stride in pixels
    can_drop: bool
    final_norm: nn.Module

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]: ...

    def normalize(self, images: Tensor) -> Tensor: ...

    def __call__(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
        ids_read: Tensor | None = None,
    ) -> Features: ...

    def layers(
        self,
        images: Tensor,
        indices: list[int],
        *,
        norm: bool = False,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
        ids_read: Tensor | None = None,
    ) -> list[Features]: ...

    def more_blocks(self, num: int, start: int) -> nn.Module:
        """Further trained blocks of the encoder's own kind on top of block `start` (counted from 1): BEiT v2's head.

        The forward takes `(features: Features, grid: tuple[int, int])`, of all patches, and returns `Features`,
        not normed. Its block j starts, and drops paths, as block start + 1 + j (counted from 1) of an encoder of depth
        max(depth, start + num) does. It shares the encoder's position bias or rotary table without owning it.
        """
        ...

    def no_weight_decay(self) -> set[str]: ...

    def depth_of(self, parameter: str) -> int: ...


class Objective(Protocol):
    """A loss over a batch. Built by `build(encoder, cfg)`; `tokenize` gets the tokenizer in the encoder's place."""

    encoder: Encoder | None
    per_micro_batch: bool  # True: the loss holds statistics of a micro-batch, so accumulation changes it; a BatchNorm
    # anywhere inside makes it so, and `build` sees to that

    def __call__(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return "loss" (B,) per sample and detached values: (B,) are weighted means, 0-d are logged as they are."""
        ...

    # optional: prepare(batch) -> Batch, of a training batch on the device, before frozen networks see it: erases or
    # mixes images, changes weights; draws from the default generators, which the loop seeds before each micro-batch
    # optional: logits(batch) -> (B, classes), of an objective that classifies
    # optional: truth(batch) -> (B, N) int64 codes below `num_codes`, or (B, N, P) values, of which `error` is "squared"
    # or "absolute": what is predicted at masked patches, so that trivial predictions can be judged beside the loss
    # optional: reconstruct(batch, frozen) -> (B, C, H, W) in [0, 1], what it makes of masked images, for pictures
    # optional: after_step(step: int, progress: Tensor) -> None, once per optimizer step (codebooks, moving teachers); a
    # skipped step gets its saved buffers back afterwards, so what it moves, and what forward moves, is a saved buffer


@dataclass
class LoadedRun:
    """A run as plain modules (EMA weights if the run has them), as evaluations and exports see it."""

    objective: Any  # Objective
    encoder: Any  # Encoder | None
    frozen: dict[str, Any]  # e.g. {"tokenizer": Tokenizer}
    views: Any  # build.Views: how the run renders images, and its mask
    config: dict[str, Any]  # the resolved recipe
    step: int
    path: Path  # the run directory


class Eval(Protocol):
    """`run` of a file in evals/: the same from the loop as from a directory.

    It runs on all ranks and yields the same on each, whether it deals its work out (`mim/ranks.py`) or not; only what
    the main rank yields is written and said, so whatever else it writes is its own care.
    """

    def __call__(self, loaded: LoadedRun, cfg: Any) -> Iterable[tuple[str, float | Image]]: ...


class Export(Protocol):
    """`export` of a file in exports/: writes a folder, reads it back, compares, and reports the difference."""

    def __call__(self, loaded: LoadedRun, out: Path, cfg: Any) -> dict[str, Any]: ...


NamedValues = Iterator[tuple[str, Any]]
