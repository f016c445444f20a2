"""timm's models as the encoders around them see them: built with errors in the recipe's words, and their pixels."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import timm
import torch
from torch import nn

from mim.initialization import PUBLISHED

Model = TypeVar("Model", bound=nn.Module)


class Shape(Protocol):
    """What the configurations of the encoders have in common; None leaves a value as timm's model has it."""

    model: str  # name in timm
    width: int | None
    depth: int | None  # blocks
    num_heads: int | None
    patch_size: int | None  # pixels
    layer_scale: float | None  # initial gamma
    drop_path_rate: float  # of the last block, rising linearly over the blocks
    weight_init: str


def create(
    kind: type[Model],
    cfg: Shape,
    options: dict[str, Any],
    *,
    image_size: tuple[int, int],
    channels: int,
    depth: int | None = None,
    known_inits: tuple[str, ...] = (),
) -> Model:
    """Build the timm model that a recipe names, which must be of this kind; `depth` goes before the recipe's.

    `options` are further arguments of timm's factory, `known_inits` the values of weight_init that it knows itself.
    """
    check(cfg)
    if cfg.weight_init not in ("", *PUBLISHED, *known_inits):
        known = ", ".join((*PUBLISHED, *known_inits))
        raise ValueError(f"encoder.weight_init={cfg.weight_init!r} is unknown; choose {known} or '' (timm's default)")
    shape: dict[str, Any] = {
        "embed_dim": cfg.width,
        "depth": depth or cfg.depth,
        "num_heads": cfg.num_heads,
        "patch_size": cfg.patch_size,
        "init_values": cfg.layer_scale,
        "drop_path_rate": cfg.drop_path_rate,
    }
    shape = {key: value for key, value in shape.items() if value is not None}
    try:
        model: Any = timm.create_model(
            cfg.model, img_size=image_size, in_chans=channels, num_classes=0, **shape, **options
        )
    except AssertionError as error:  # timm's checks of width and heads, of stem and image size
        raise ValueError(
            f"encoder.model={cfg.model!r} cannot be built for images of {image_size[0]}x{image_size[1]} and "
            f"encoder.width={cfg.width} with encoder.num_heads={cfg.num_heads}: {error}"
        ) from error
    except TypeError as error:  # another kind of model has other arguments
        raise ValueError(f"encoder.model={cfg.model!r} is not timm's {kind.__name__}: {error}") from error
    if not isinstance(model, kind):
        raise ValueError(f"encoder.model={cfg.model!r} is a {type(model).__name__}, not timm's {kind.__name__}")
    if isinstance(model.norm, nn.Identity):
        raise ValueError(f"encoder.model={cfg.model!r} norms after pooling; choose one that norms its tokens")
    if getattr(model, "attn_pool", None) is not None:
        raise ValueError(
            f"encoder.model={cfg.model!r} ends in an attention pool, which pretraining would leave untrained; "
            f"choose one without"
        )
    if cfg.weight_init in PUBLISHED:
        PUBLISHED[cfg.weight_init](model)
    return model


def check(cfg: Any) -> None:
    """Refuse what no encoder can have: a model that timm does not know, and numbers out of range."""
    if not timm.is_model(cfg.model):
        close = timm.list_models(f"*{cfg.model.split('_')[0]}*")[:5] or timm.list_models(f"{cfg.model[:3]}*")[:5]
        raise ValueError(f"encoder.model={cfg.model!r} is not a timm model; some that are: {', '.join(close)}")
    for name, least in (("width", 1), ("depth", 1), ("num_heads", 1), ("patch_size", 1), ("num_registers", 0)):
        value = getattr(cfg, name, None)
        if value is not None and value < least:
            raise ValueError(f"encoder.{name}={value} must be at least {least}, or null: the model's own")
    if not 0 <= cfg.drop_path_rate < 1:
        raise ValueError(f"encoder.drop_path_rate={cfg.drop_path_rate} must be at least 0 and below 1")


def keep_statistics(encoder: nn.Module, mean: list[float] | None, std: list[float] | None, channels: int) -> None:
    """Give an encoder the buffers `mean` and `std` (1, C, 1, 1) of pixels in [0, 1]: no weights; 0.5 where unknown."""
    for name, values in (("mean", mean), ("std", std)):
        values = values or [0.5] * channels
        if len(values) != channels:
            raise ValueError(f"encoder.{name} has {len(values)} values for images of {channels} channels")
        if name == "std" and min(values) <= 0:
            raise ValueError(f"encoder.std={values} must be above 0: pixels are divided by it")
        encoder.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
