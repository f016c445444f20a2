"""The networks on both sides of a quantizer: images -> vectors on a grid, and those -> pixels or a teacher's features.

Transformers as in VQ-KD (Peng et al. 2022, BEiT v2, arXiv 2208.06366, section 2.1; names of the layers as released), or
DALL-E's convolutions (Ramesh et al. 2021, arXiv 2102.12092, appendix A) for pixels and small images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenizer import dvae


@dataclass
class Networks:
    """What the tokenizers of this folder that learn vectors have in common. Numbers: VQ-KD base (BEiT v2's release)."""

    target: str = "features"  # features of a frozen teacher | pixels
    target_width: int = 768  # D' of the teacher's features; 512 for CLIP base
    channels: int = 3  # C of the images
    network: str = "vit"  # vit | conv (the dVAE's; the target is pixels then)
    image_size: Union[int, list[int]] = 224  # noqa: UP007  vit: of the table of positions, resampled for other sizes
    stride: int = 16  # pixels per code: vit's patch size; conv: a power of two
    width: int = 768  # vit: of the tokens; conv: channels of the finest group
    depth: int = 12  # vit: blocks of the encoder; conv: residual blocks per group
    num_heads: int = 12  # vit
    decoder_width: int = 768  # vit: of the tokens; conv: channels after the first convolution
    decoder_depth: int = 3  # vit: blocks; conv: `depth`
    decoder_num_heads: int = 12  # vit


def check(cfg: Networks) -> None:
    """Refuse what cannot be built, in the words of the recipe."""
    if cfg.target not in ("features", "pixels"):
        raise ValueError(f"tokenizer.target={cfg.target!r} is unknown; choose features or pixels")
    if cfg.network not in ("vit", "conv"):
        raise ValueError(f"tokenizer.network={cfg.network!r} is unknown; choose vit or conv")
    if cfg.network == "conv" and cfg.target == "features":
        raise ValueError("tokenizer.network=conv decodes to pixels; use tokenizer.network=vit for a teacher's features")
    if cfg.network == "conv" and (cfg.stride < 2 or cfg.stride & (cfg.stride - 1)):
        raise ValueError(f"tokenizer.stride={cfg.stride} is no power of two, which tokenizer.network=conv needs")
    for width, heads in (("width", "num_heads"), ("decoder_width", "decoder_num_heads")):
        if cfg.network == "vit" and getattr(cfg, width) % getattr(cfg, heads):
            raise ValueError(
                f"tokenizer.{width}={getattr(cfg, width)} does not divide by {getattr(cfg, heads)} heads "
                f"(tokenizer.{heads})"
            )


def encoder(cfg: Networks, code_width: int) -> TransformerEncoder | Convolutions:
    """Images (B, C, H, W) in [0, 1] -> vectors (B, N, d)."""
    return Convolutions(cfg, code_width) if cfg.network == "conv" else TransformerEncoder(cfg, code_width)


def decoder(cfg: Networks, code_width: int) -> nn.Module:
    """Vectors (B, N, d) on a grid (h, w) -> images (B, C, H, W), around [0, 1], or features (B, N, D')."""
    return Deconvolutions(cfg, code_width) if cfg.network == "conv" else TransformerDecoder(cfg, code_width)


def task_layer(width: int, out: int) -> nn.Sequential:
    """The small network between tokens and what they are for, computed in float32."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


def _transformer(grid: list[int], patch_size: int, channels: int, width: int, depth: int, num_heads: int) -> Any:
    return VisionTransformer(
        img_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="avg",  # its norm is `fc_norm`, as in the release
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        dynamic_img_size=True,
        weight_init="jax" if width < 512 else "",  # truncated normal 0.02 learns little below width 512
    )


def _grid(cfg: Networks) -> list[int]:
    size = [cfg.image_size] * 2 if isinstance(cfg.image_size, int) else list(cfg.image_size)
    if any(pixels % cfg.stride for pixels in size):
        raise ValueError(
            f"tokenizer.image_size={cfg.image_size} does not divide by tokenizer.stride={cfg.stride} pixels per code"
        )
    return [pixels // cfg.stride for pixels in size]


class TransformerEncoder(nn.Module):
    """A plain ViT; the class token is computed, as released, and not used."""

    def __init__(self, cfg: Networks, code_width: int):
        super().__init__()
        self.vit = _transformer(_grid(cfg), cfg.stride, cfg.channels, cfg.width, cfg.depth, cfg.num_heads)
        self.task_layer = task_layer(cfg.width, code_width)

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Make vectors that have this mean and std (d,) have 0 and 1."""
        last: Any = self.task_layer[-1]
        _standardize(last.weight, last.bias, mean, std)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.fc_norm(self.vit.forward_features(2 * images - 1)[:, 1:])  # (B, N, D)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.task_layer(tokens.float())  # (B, N, d)


class TransformerDecoder(nn.Module):
    """A shallow ViT over the grid of codes: its patches are single vectors."""

    def __init__(self, cfg: Networks, code_width: int):
        super().__init__()
        width, depth, num_heads = cfg.decoder_width, cfg.decoder_depth, cfg.decoder_num_heads
        self.vit = _transformer(_grid(cfg), 1, code_width, width, depth, num_heads)
        self.stride = cfg.stride if cfg.target == "pixels" else None
        self.task_layer = task_layer(width, cfg.target_width if self.stride is None else cfg.channels * cfg.stride**2)

    def forward(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.vit.forward_features(vectors.transpose(1, 2).unflatten(2, grid))[:, 1:]  # (B, N, D)
        with torch.autocast(tokens.device.type, enabled=False):
            out = self.task_layer(self.vit.fc_norm(tokens).float())  # (B, N, D') or (B, N, C * stride**2)
        if self.stride is None:
            return out
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, grid), self.stride) + 0.5  # (B, C, H, W)


@torch.no_grad()
def _standardize(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> None:
    """Let the last layer, weight (d, ...) and bias (d,), subtract the mean and divide by the std."""
    weight.div_(std.view(-1, *[1] * (weight.ndim - 1)))
    bias.sub_(mean).div_(std)


def _dvae_config(cfg: Networks, code_width: int) -> dvae.Config:
    return dvae.Config(
        num_codes=code_width,
        channels=cfg.channels,
        width=cfg.width,
        n_init=cfg.decoder_width,
        num_groups=cfg.stride.bit_length(),  # the stride is 2 ** (num_groups - 1)
        blocks_per_group=cfg.depth,
        likelihood="mse",
    )


class Convolutions(nn.Module):
    """The dVAE's encoder with d values in the place of logits."""

    def __init__(self, cfg: Networks, code_width: int):
        super().__init__()
        self.net = dvae.Encoder(_dvae_config(cfg, code_width))

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Make vectors that have this mean and std (d,) have 0 and 1."""
        last = self.net.blocks.get_submodule("output.conv")
        _standardize(last.get_parameter("w"), last.get_parameter("b"), mean, std)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(dvae.map_pixels(images)).flatten(2).transpose(1, 2)  # (B, N, d)


class Deconvolutions(nn.Module):
    """The dVAE's decoder on d values in the place of relaxed codes."""

    def __init__(self, cfg: Networks, code_width: int):
        super().__init__()
        self.net = dvae.Decoder(_dvae_config(cfg, code_width))

    def forward(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = vectors.transpose(1, 2).unflatten(2, grid).contiguous(memory_format=torch.channels_last)
        return dvae.unmap_pixels(torch.sigmoid(self.net(maps)))  # (B, C, H, W)
