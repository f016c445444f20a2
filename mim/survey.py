"""What masked encoding must know of a timm model: its grid, its stem, its maps, and what of it would stay untrained.

Nothing here is a list of families: a sketch of the model without memory (torch's meta device) runs once, and its shapes
and gradients tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn

STEMS = ("patch_embed", "stem", "conv_stem", "conv1")  # names that timm's families give to their first module


@dataclass(frozen=True)
class Stem:
    """A module whose output tokens are replaced."""

    module: str
    layout: str  # NLC, NHWC or NCHW
    factor: int  # its cells per side of an output cell
    width: int


@dataclass(frozen=True)
class Survey:
    """Facts about a model at one image size."""

    width: int
    patch_size: int  # pixels, total stride
    depth: int
    depths: dict[str, int]  # parameter -> depth
    maps: dict[int, int]  # block -> index among the model's intermediate maps
    stems: list[Stem]
    unread: set[str]  # parameters on which no map depends


class Refused(ValueError):
    """Why a model cannot serve, to follow its name."""


@torch.enable_grad()
def survey(model: Any, image_size: tuple[int, int], channels: int, *, masked: bool = True) -> Survey:
    """Run a model that holds no memory once and read off its shapes; `masked`: its tokens must be replaceable."""
    if not hasattr(model, "forward_intermediates"):
        raise Refused("has no forward_intermediates, through which features are read; choose another model")
    depths, modules = _depths(model), _modules(model)
    depth = max(depths.values()) - 1
    outputs: dict[str, Any] = {}
    names = _stem_names(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: outputs.update({name: output}))
    images = torch.empty(2, channels, *image_size)
    last = max(modules.values())
    (output,) = model.forward_intermediates(images, indices=[last], intermediates_only=True)
    _, width, h, w = output.shape
    if image_size[0] % h or image_size[1] % w or image_size[0] // h != image_size[1] // w:
        raise Refused(
            f"makes a grid of {h}x{w} of images of {image_size[0]}x{image_size[1]} pixels, which is not one stride; "
            f"choose another image size"
        )
    found = [_stem(name, model.get_submodule(name), outputs.get(name), images, (h, w)) for name in names]
    stems = [stem for stem in found if stem is not None and stem.width <= width]
    if masked and not stems:
        raise Refused(
            f"has no {', '.join(STEMS[:-1])} or {STEMS[-1]} whose grid nests in the {h}x{w} of its output, so masked "
            f"tokens cannot be replaced; choose another model or image size"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    features = final_norm(model)(as_tokens(output))
    gradients = torch.autograd.grad(features.sum(), list(trained.values()), allow_unused=True)
    unread = {name for name, gradient in zip(trained, gradients, strict=True) if gradient is None}
    return Survey(width, image_size[0] // h, depth, depths, _maps(modules, depths, depth), stems, unread)


def _depths(model: Any) -> dict[str, int]:
    """Depth of every parameter: timm's groups, with the final norm alone at the top."""
    if hasattr(model, "group_matcher"):
        groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    else:
        groups = auto_group_layers(model)
    norm = {name for name in groups if name.startswith("norm.")}  # CaiT's lies in the group of the last block
    top = max(group for name, group in groups.items() if name not in norm) + 1
    return {name: top if name in norm else group for name, group in groups.items()}


def _modules(model: Any) -> dict[str, int]:
    """Modules whose outputs are the model's intermediate maps, with their index; of several branches the first."""
    info = getattr(model.feature_info, "info", model.feature_info)
    modules: dict[str, int] = {}
    for index, entry in enumerate(info):
        modules.setdefault(entry["module"], index)
    return modules


def _maps(modules: dict[str, int], depths: dict[str, int], depth: int) -> dict[int, int]:
    """Blocks that end a stage -> index of its map. Blocks after the last map (class attention) leave it as it is."""
    last = max(modules.values())
    maps: dict[int, int] = {}
    for module, index in modules.items():
        inside = [d for name, d in depths.items() if name.startswith(f"{module}.")]
        if inside and max(inside) > 0:  # 0 is the stem
            end = min(max(inside), depth) - 1
            maps |= dict.fromkeys(range(end, depth) if index == last else [end], index)
    return maps | {depth - 1: last}


def _stem_names(model: nn.Module) -> list[str]:
    """The first modules of a model: one, or one per branch."""
    name = next((name for name in STEMS if hasattr(model, name)), None)
    if name is None:
        return []
    module = model.get_submodule(name)
    return [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]


def _stem(name: str, module: nn.Module, output: Any, images: Tensor, grid: tuple[int, int]) -> Stem | None:
    """How tokens of a stem are replaced; None where its grid does not nest in `grid`."""
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):  # the model does not call it as a whole
        return None
    if output.ndim == 3:
        factor = round((output.shape[1] / (grid[0] * grid[1])) ** 0.5)
        found = Stem(name, "NLC", factor, output.shape[2])
        return found if factor and output.shape[1] == grid[0] * grid[1] * factor**2 else None
    nesting = [found for found in (_spatial(name, layout, output, grid) for layout in ("NCHW", "NHWC")) if found]
    if len(nesting) < 2:
        return nesting[0] if nesting else None
    layout = getattr(module, "output_fmt", None) or _layout(module, images, output)  # as many channels as columns
    return next(found for found in nesting if found.layout == layout)


def _spatial(name: str, layout: str, output: Tensor, grid: tuple[int, int]) -> Stem | None:
    """A stem whose 4-D output has this layout; None where its grid does not nest in `grid`."""
    rows, width = (1, 3) if layout == "NHWC" else (2, 1)
    factor = output.shape[rows] // grid[0]
    nests = factor and output.shape[rows : rows + 2] == (grid[0] * factor, grid[1] * factor)
    return Stem(name, layout, factor, output.shape[width]) if nests else None


def _layout(module: nn.Module, images: Tensor, output: Tensor) -> str:
    """Where the columns of a stem's 4-D output lie: the axis that grows with the width of the image."""
    wider = module(images.repeat(1, 1, 1, 2))
    return "NCHW" if wider.shape[3] > output.shape[3] else "NHWC"


def final_norm(model: Any) -> nn.Module:
    """The norm that the model applies to its last map (of several branches the first), for tokens (B, N, D)."""
    norm = getattr(model, "norm", getattr(model, "norm_pre", nn.Identity()))
    norm = norm[0] if isinstance(norm, nn.ModuleList) else norm
    return OverTokens(norm) if isinstance(norm, LayerNorm2d | nn.BatchNorm2d | nn.GroupNorm) else norm


class OverTokens(nn.Module):
    """A norm of maps (B, D, h, w) applied to tokens (B, N, D)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return as_tokens(self.norm(tokens.transpose(1, 2).unsqueeze(-1)))


def as_tokens(maps: Tensor) -> Tensor:
    """Maps (B, D, h, w) -> tokens (B, N, D), row-major."""
    return maps.flatten(2).transpose(1, 2)
