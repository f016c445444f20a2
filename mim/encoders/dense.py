"""Any timm backbone as a masked encoder: Swin, XCiT, CaiT, CrossViT, Hiera, MobileViT, Mixer, ConvNeXt and the like.

SimMIM: Xie et al. 2022, arXiv 2111.09886, section 3, for Swin (Liu et al. 2021, arXiv 2103.14030): tokens of the stem are
replaced. Here masked pixels are set to the encoder's mean first, because the stems of many families overlap (XCiT,
Hiera, MobileViT, hybrids) or see the image twice (CrossViT), and replacing tokens alone would leak them. The module
inside is timm's own; what is particular to a family (grid, widths, layout of the stem, parameters that no map depends
on) is found by one run of a sketch without memory.

The mask lies on the grid of the output, one cell per total stride. The mask token has the width D of the output; the
stem of a pyramid is narrower, S wide, and takes the first S values. The others are never read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn

from mim.contracts import Features

STEMS = ("patch_embed", "stem", "conv_stem", "conv1")  # names that timm's families give to their first module
RESERVED = {"self", "img_size", "in_chans", "num_classes", "drop_path_rate", "device", "dtype", "kwargs"}
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


@dataclass
class Config:
    model: str = "swin_tiny_patch4_window7_224"  # any timm model with `forward_intermediates`
    options: dict[str, Any] = field(default_factory=dict)  # of the model's class, e.g. {depths: [2, 2, 6, 2]}
    drop_path_rate: float = 0.0  # of the last block
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the dataset's own
    std: list[float] | None = None


def build(cfg: Config, *, image_size: tuple[int, int], channels: int) -> Dense:
    """Build the encoder for images of one size; what the model cannot serve is refused."""
    if not timm.is_model(cfg.model):
        close = timm.list_models(f"*{cfg.model.split('_')[0]}*")[:5]
        raise ValueError(f"encoder.model={cfg.model!r} is not a timm model; some that are: {', '.join(close)}")
    arguments = {"in_chans": channels, **cfg.options}
    known = _options(cfg.model)
    if unknown := sorted(cfg.options.keys() - (known - RESERVED)):
        raise ValueError(
            f"encoder.options.{unknown[0]} is not an option of encoder.model={cfg.model!r}; "
            f"known: {', '.join(sorted(known - RESERVED))}"
        )
    if "img_size" in known:
        arguments["img_size"] = list(image_size)
    if "drop_path_rate" not in known and cfg.drop_path_rate:
        raise ValueError(f"encoder.model={cfg.model!r} drops no paths; set encoder.drop_path_rate=0")
    dropping = {"drop_path_rate": cfg.drop_path_rate} if "drop_path_rate" in known else {}
    create = functools.partial(timm.create_model, cfg.model, num_classes=0, **arguments, **dropping)
    height, width = image_size
    try:
        with torch.device("meta"):
            survey = _survey(create().eval(), image_size, channels)
    except Refused as error:
        raise ValueError(f"encoder.model={cfg.model!r} {error}") from error
    except REFUSALS as error:  # timm's own checks of sizes, windows and options
        raise ValueError(
            f"encoder.model={cfg.model!r} cannot be built for {channels}-channel images of {height}x{width} pixels"
            f"{f' with encoder.options={cfg.options}' if cfg.options else ''}: {error or type(error).__name__}"
        ) from error
    return Dense(create(), survey, cfg, arguments)


class Dense(nn.Module):
    """A timm model as an `Encoder` that replaces patches. It carries its own pixel mean and std."""

    can_drop = False

    mean: Tensor  # (1, C, 1, 1), as std
    std: Tensor

    def __init__(self, model: Any, survey: Survey, cfg: Config, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments  # of timm's factory, to build this very module
        self.width = survey.width
        self.depth = survey.depth
        self.patch_size = survey.patch_size
        self.channels = arguments["in_chans"]
        self.stems = survey.stems
        self._maps = survey.maps
        self._depths = survey.depths
        asks = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
        self._prefix = {"return_prefix_tokens": True} if asks else {}
        self._masked: tuple[Tensor, Tensor] | None = None  # mask (B, h, w) and mask token of the forward that runs
        for name, parameter in model.named_parameters():
            if name in survey.unread:
                parameter.requires_grad_(False)
        for stem in self.stems:
            hook = functools.partial(self._replace, stem)
            model.get_submodule(stem.module).register_forward_hook(hook)
        mean, std = cfg.mean or [0.5] * self.channels, cfg.std or [0.5] * self.channels
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels:
                raise ValueError(f"encoder.{name} has {len(values)} values for images of {self.channels} channels")
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (h, w) of the output for an image size (H, W) in pixels."""
        height, width = image_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height}x{width} does not divide by the total stride {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

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
    ) -> Features:
        """Encode images (B, C, H, W); `mask` (B, N) blanks pixels and replaces tokens by `mask_token` (1, 1, D)."""
        return self.layers(images, [-1], norm=True, mask=mask, mask_token=mask_token, ids_keep=ids_keep)[0]

    def layers(
        self,
        images: Tensor,
        indices: list[int],
        *,
        norm: bool = False,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
    ) -> list[Features]:
        """Return the outputs of the blocks named by `indices` (negative: from the end), normed if asked.

        The model gives those that end a stage, each with the grid and width of its stage; the final norm is applied
        where the width is that of the output.
        """
        assert ids_keep is None, "a dense model cannot drop patches"
        wanted = [i % self.depth for i in indices]
        if missing := sorted(set(wanted) - self._maps.keys()):
            raise ValueError(
                f"block {missing[0]} of {type(self.model).__name__} has no output of its own; "
                f"blocks that have: {', '.join(map(str, sorted(self._maps)))}"
            )
        found = self._read(images, sorted({self._maps[i] for i in wanted}), mask, mask_token)
        features = [found[self._maps[i]] for i in wanted]
        if not norm:
            return features
        return [Features(*map(self.final_norm, f)) if f.patches.shape[2] == self.width else f for f in features]

    @property
    def final_norm(self) -> nn.Module:
        """The model's norm over its last map, for tokens (B, N, D); the identity where it norms after pooling."""
        return _final_norm(self.model)

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
        return self._depths[parameter.removeprefix("model.")]

    def _read(
        self, images: Tensor, indices: list[int], mask: Tensor | None, mask_token: Tensor | None
    ) -> dict[int, Features]:
        """Run the model and return its maps by their index, with masked pixels blanked and tokens replaced."""
        x = self.normalize(images)
        if mask is not None:
            assert mask_token is not None, "mask needs mask_token"
            cells = mask.unflatten(1, self.grid((images.shape[-2], images.shape[-1])))  # (B, h, w)
            x = x.masked_fill(_enlarge(cells, self.patch_size).unsqueeze(1), 0.0)  # the mean, once it is normalised
            self._masked = cells, mask_token
        try:
            found = _intermediates(self.model, x, indices, **self._prefix)
        finally:
            self._masked = None
        return dict(zip(indices, found, strict=True))

    def _replace(self, stem: Stem, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of a stem: replace its tokens where this forward has a mask."""
        if self._masked is None:
            return output
        if isinstance(output, tuple):  # tokens with their grid
            return self._replace(stem, module, inputs, output[0]), *output[1:]
        cells, mask_token = self._masked
        where = _enlarge(cells, stem.factor)  # (B, gh, gw)
        token = mask_token[..., : stem.width].to(output.dtype)  # (1, 1, S)
        if stem.layout == "NCHW":
            return torch.where(where.unsqueeze(1), token.view(1, -1, 1, 1), output)
        return torch.where((where.flatten(1) if stem.layout == "NLC" else where).unsqueeze(-1), token, output)


# ---- what is particular to a model ---------------------------------------------------------------


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


def _options(model: str) -> set[str]:
    """Names of the arguments of a model's class, or of the dataclass that it takes in their place."""
    with torch.device("meta"):
        kind = type(timm.create_model(model))
    parameters = inspect.signature(kind.__init__).parameters
    groups = [p.annotation for p in parameters.values() if dataclasses.is_dataclass(p.annotation)]
    return set(parameters) | {f.name for group in groups for f in dataclasses.fields(group)}


def _survey(model: Any, image_size: tuple[int, int], channels: int) -> Survey:
    """Run a model that holds no memory once and read off its shapes."""
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
        raise Refused(f"makes a grid of {h}x{w} from images of {image_size[0]}x{image_size[1]}: not one stride")
    stems = [_stem(name, model.get_submodule(name), outputs.get(name), images, (h, w)) for name in names]
    stems = [stem for stem in stems if stem is not None and stem.width <= width]
    if not stems:
        raise Refused(
            f"has no {', '.join(STEMS[:-1])} or {STEMS[-1]} whose grid nests in the {h}x{w} of its output, so masked tokens cannot be "
            f"replaced; choose another model or image size"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    features = _final_norm(model)(_tokens(output))
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


def _intermediates(model: Any, x: Tensor, indices: list[int], **options: bool) -> list[Features]:
    """The model's raw maps at ascending `indices`, as tokens, with the prefix where it hands it out."""
    features = []
    for entry in model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True, **options):
        maps, prefix = entry if isinstance(entry, tuple) else (entry, None)
        patches = _tokens(maps)
        features.append(Features(patches[:, :0] if prefix is None else prefix, patches))
    return features


def _final_norm(model: Any) -> nn.Module:
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
        return _tokens(self.norm(tokens.transpose(1, 2).unsqueeze(-1)))


def _tokens(maps: Tensor) -> Tensor:
    """Maps (B, D, h, w) -> tokens (B, N, D), row-major."""
    return maps.flatten(2).transpose(1, 2)


def _enlarge(cells: Tensor, factor: int) -> Tensor:
    """Repeat every cell of (B, h, w) `factor` times in both directions."""
    return cells.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
