"""Any timm backbone as a masked encoder: Swin, XCiT, CaiT, CrossViT, Hiera, MobileViT, Mixer, ConvNeXt and the like.

SimMIM: Xie et al. 2022, arXiv 2111.09886, section 3, which replaces the tokens of the stem of Swin (Liu et al. 2021,
arXiv 2103.14030). Here masked pixels are set to the encoder's mean first, because the stems of many families overlap
(XCiT, Hiera, MobileViT, hybrids) or see the image twice (CrossViT), and replacing tokens alone would leak them. The
module inside is timm's own; what is particular to a family stands in `mim/survey.py`.

The mask lies on the grid of the output, one cell per total stride. The mask token has the width D of the output; the
stem of a pyramid is narrower, S wide, and takes the first S values. The others are never read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mim.backbone import check, keep_statistics
from mim.contracts import Features
from mim.patches import blank, gather, grid_of, replace
from mim.survey import Refused, Stem, Survey, as_tokens, final_norm, survey

RESERVED = {"cfg", "img_size", "in_chans", "num_classes", "drop_path_rate", "device", "dtype", "kwargs"}
REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)


@dataclass
class Config:
    model: str = "swin_tiny_patch4_window7_224"  # any timm model with `forward_intermediates`
    options: dict[str, Any] = field(default_factory=dict)  # of the model's class, e.g. {depths: [2, 2, 6, 2]}
    drop_path_rate: float = 0.0  # of the last block
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the dataset's own
    std: list[float] | None = None


def build(cfg: Config, *, image_size: tuple[int, int], channels: int, masked: bool = True) -> Dense:
    """Build the encoder for images of one size; what the model cannot serve is refused.

    Not `masked`, it serves models whose tokens cannot be replaced, too, and is never given a mask.
    """
    check(cfg)
    known = _options(cfg.model)
    if unknown := sorted(cfg.options.keys() - (known - RESERVED)):
        raise ValueError(
            f"encoder.options.{unknown[0]} is not an option of encoder.model={cfg.model!r}; "
            f"known: {', '.join(sorted(known - RESERVED))}"
        )
    if cfg.drop_path_rate and "drop_path_rate" not in known:
        raise ValueError(f"encoder.model={cfg.model!r} drops no paths; set encoder.drop_path_rate=0")
    shape: dict[str, Any] = {"img_size": list(image_size), "drop_path_rate": cfg.drop_path_rate}
    shape = {key: value for key, value in shape.items() if key in known}
    create = functools.partial(timm.create_model, cfg.model, in_chans=channels, num_classes=0, **shape, **cfg.options)
    try:
        with torch.device("meta"):
            facts = survey(create().eval(), image_size, channels, masked=masked)
    except Refused as error:
        raise ValueError(f"encoder.model={cfg.model!r} {error}") from error
    except REFUSALS as error:  # timm's own checks of sizes, windows and options
        if fixed := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
            raise ValueError(
                f"encoder.options.{fixed[1]} is fixed by timm in encoder.model={cfg.model!r}; choose another model"
            ) from error
        raise ValueError(
            f"encoder.model={cfg.model!r} cannot be built for images of {image_size[0]}x{image_size[1]} pixels and "
            f"{channels} channels with encoder.options={cfg.options}: {error or type(error).__name__}"
        ) from error
    return Dense(create(), facts, cfg, channels=channels)


@functools.cache
def _options(model: str) -> set[str]:
    """Names of the arguments of a model's class, with the fields of the dataclass that it may take."""
    with torch.device("meta"):
        kind = type(timm.create_model(model))
    parameters = inspect.signature(kind).parameters
    groups = [p.annotation for p in parameters.values() if dataclasses.is_dataclass(p.annotation)]
    return set(parameters) | {f.name for group in groups for f in dataclasses.fields(group)}


class Dense(nn.Module):
    """A timm model as an `Encoder` that replaces patches. It carries its own pixel mean and std."""

    can_drop = False

    mean: Tensor  # (1, C, 1, 1), as std
    std: Tensor

    def __init__(self, model: Any, facts: Survey, cfg: Config, *, channels: int) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        self.width = facts.width
        self.depth = facts.depth
        self.patch_size = facts.patch_size
        self.facts = facts
        self.stages = facts.stages  # block -> width and stride in pixels of its map
        asks = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
        self._prefix = {"return_prefix_tokens": True} if asks else {}
        self._masked: tuple[Tensor, Tensor] | None = None  # mask (B, h, w) and mask token of the forward that runs
        keep_statistics(self, cfg.mean, cfg.std, self.channels)
        for name in facts.unread:  # else every distributed step would wait for gradients that never come
            model.get_parameter(name).requires_grad_(False)
        for stem in facts.stems:
            model.get_submodule(stem.module).register_forward_hook(functools.partial(self._replace, stem))

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (h, w) of the output for an image size (H, W) in pixels."""
        return grid_of(image_size, self.patch_size)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> zero mean, unit variance per channel."""
        return (images - self.mean) / self.std

    def forward(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
        ids_read: Tensor | None = None,
    ) -> Features:
        """Encode images (B, C, H, W); `mask` (B, N) blanks pixels and replaces tokens by `mask_token` (1, 1, D)."""
        (features,) = self.layers(
            images, [-1], norm=True, mask=mask, mask_token=mask_token, ids_keep=ids_keep, ids_read=ids_read
        )
        return features

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
    ) -> list[Features]:
        """Return the outputs of the blocks named by `indices` (negative: from the end), normed if asked.

        The model gives those that end a stage, each with the grid and width of its stage; the final norm is applied
        where the width is that of the output. Of the last map only patches `ids_read` (B, M), if they are given.
        """
        assert ids_keep is None, "a dense model cannot drop patches"
        wanted = [i % self.depth for i in indices]
        maps = self.facts.maps
        if missing := sorted(set(wanted) - maps.keys()):
            raise ValueError(
                f"block {missing[0]} of {type(self.model).__name__} has no output of its own; "
                f"blocks that have: {', '.join(map(str, sorted(maps)))}"
            )
        found = self._read(images, sorted({maps[i] for i in wanted}), mask, mask_token)
        if ids_read is not None and (end := maps[self.depth - 1]) in found:
            found[end] = found[end]._replace(patches=gather(found[end].patches, ids_read))
        features = [found[maps[i]] for i in wanted]
        if not norm:
            return features
        return [Features(*map(self.final_norm, f)) if f.patches.shape[2] == self.width else f for f in features]

    @property
    def final_norm(self) -> nn.Module:
        """The model's norm over its last map, for tokens (B, N, D); the identity where it norms after pooling."""
        return final_norm(self.model)

    def more_blocks(self, num: int, start: int) -> nn.Module:
        """Refuse: blocks of these families need their own kind of input."""
        raise ValueError(
            f"encoder.name=dense has no further blocks of the kind of {type(self.model).__name__} to add; "
            f"use encoder.name=vit, eva or beit"
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (timm's list, whose entries may be patterns)."""
        patterns = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        names = [name for name, _ in self.model.named_parameters()]
        return {f"model.{name}" for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    def depth_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 stem, then timm's fine groups, depth + 1 the final norm."""
        return self.facts.depths[parameter.removeprefix("model.")]

    def _read(
        self, images: Tensor, indices: list[int], mask: Tensor | None, mask_token: Tensor | None
    ) -> dict[int, Features]:
        """Run the model and return its raw maps by their index, with masked pixels blanked and tokens replaced."""
        x = self.normalize(images)
        if mask is not None:
            assert mask_token is not None, "mask needs mask_token"
            h, w = self.grid((images.shape[2], images.shape[3]))
            x = blank(x, mask, (h, w))
            self._masked = mask.view(-1, h, w), mask_token
        try:
            entries = self.model.forward_intermediates(
                x, indices=indices, stop_early=True, intermediates_only=True, **self._prefix
            )
        finally:
            self._masked = None
        return {index: _features(entry) for index, entry in zip(indices, entries, strict=True)}

    def _replace(self, stem: Stem, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of a stem: replace its tokens where this forward has a mask."""
        if self._masked is None:
            return output
        if isinstance(output, tuple):  # tokens with their grid
            return self._replace(stem, module, inputs, output[0]), *output[1:]
        mask, mask_token = self._masked
        mask = mask.repeat_interleave(stem.factor, dim=1).repeat_interleave(stem.factor, dim=2)  # (B, gh, gw)
        token = mask_token[..., : stem.width]  # (1, 1, S)
        if stem.layout == "NCHW":
            return replace(output.permute(0, 2, 3, 1), mask, token).permute(0, 3, 1, 2)
        return replace(output, mask, token)


def _features(entry: Any) -> Features:
    """A map (B, D, h, w), or the pair of it and its prefix (B, R, D), as features."""
    maps, prefix = entry if isinstance(entry, tuple) else (entry, None)
    patches = as_tokens(maps)
    return Features(patches[:, :0] if prefix is None else prefix, patches)
