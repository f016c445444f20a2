"""A tokenizer made of an encoder, a quantizer of its vectors and a decoder: what VQ-KD and FSQ have in common.

The target of the decoder is the image, or the features that a frozen teacher wrote into the batch (`targets`): Peng et
al. 2022, BEiT v2 (arXiv 2208.06366), section 2.1, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import networks
from tokenizer.codebook import NEVER, draw, gather_drawn, merge
from tokenizer.quantize import counted, grid_of, images_of

START_VECTORS = 16  # per code


class VectorTokenizer(nn.Module):
    """Its quantizer is a `Codebook` (VQ-KD) or a `Grid` (FSQ)."""

    target_mean: Tensor  # (D',) of the teacher's features in the first batches

    def __init__(self, cfg: Any, quantizer: Any, num_codes: int, code_width: int, *, commitment: float):
        super().__init__()
        networks.check(cfg)
        self.num_codes, self.channels, self.stride = num_codes, cfg.channels, cfg.stride
        self.target = cfg.target
        self.target_width = cfg.target_width
        self.commitment = commitment
        if cfg.target == "features":
            self.register_buffer("target_mean", torch.zeros(cfg.target_width))
        self.encoder = networks.encoder(cfg, code_width)
        self.quantizer = quantizer
        self.decoder = networks.decoder(cfg, code_width)

    @property
    def reads(self) -> tuple[str, ...]:
        """What the loss reads of a batch."""
        return ("images", "noise", "targets") if self.target == "features" else ("images", "noise")

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Codes per column and row of an image; ValueError when the size does not divide by the stride."""
        return grid_of(image_size, self.stride)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> codes (B, N) int64, row-major."""
        return self.quantizer.ids(self.place(images))

    def place(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> vectors (B, N, d) float32, where the quantizer takes them."""
        self.grid((images.shape[-2], images.shape[-1]))
        return self.quantizer.place(self.encoder(images))

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes (B, N) on a grid (h, w) -> images (B, C, H, W) in [0, 1], or features (B, N, D')."""
        decoded = self.decoder(self.quantizer.vectors(codes), grid)
        return decoded.clamp(0, 1) if self.target == "pixels" else decoded

    def loss(self, batch: dict[str, Any], progress: Tensor) -> dict[str, Tensor]:
        """Misfit (B,) of what is decoded, plus the commitment: squared error of pixels, or 1 - cosine of features."""
        images = images_of(batch)  # (B, C, H, W)
        grid = self.grid((images.shape[-2], images.shape[-1]))
        vectors, codes, commitment = self.quantizer(self.encoder(images), batch["noise"], batch.get("weight"))
        decoded = self.decoder(vectors, grid).float()  # (B, C, H, W) or (B, N, D')
        if self.target == "pixels":
            misfit = (decoded - images).square().flatten(1).mean(dim=1)  # (B,)
            shown = {"recon_mse": misfit, "recon_mae": (decoded.clamp(0, 1) - images).abs().flatten(1).mean(dim=1)}
        else:
            cosine = self.teacher_cosine(decoded, batch["targets"])  # (B,)
            misfit, shown = 1 - cosine, {"teacher_cosine": cosine}
        commitment = commitment.mean(dim=1)  # (B,)
        return {
            "loss": misfit + self.commitment * commitment,
            "commitment": commitment.detach(),
            "codes": codes,
            **{name: value.detach() for name, value in shown.items()},
        }

    def teacher_cosine(self, decoded: Tensor, targets: Tensor) -> Tensor:
        """Cosine (B,) of decoded features (B, N, D') to the teacher's, centred: most of a feature is what all share,
        and a codebook of one code would come close to that.
        """
        return F.cosine_similarity(decoded, targets.float() - self.target_mean, dim=-1).mean(dim=1)

    @torch.no_grad()
    def start(self, batches: Iterator[dict[str, Any]]) -> None:
        """Start from the first batches: centre the targets, standardise what the untrained encoder makes of the images,
        then k-means if there is a codebook.

        An untrained network gives every patch nearly the same vector; standardised, they differ in all directions.
        Micro-batches of whole steps are taken until there are START_VECTORS vectors per code, so that the draw depends
        on neither ranks nor micro-batches.
        """
        wanted = START_VECTORS * self.num_codes
        drawn, last, per_step = None, None, 0
        sums = torch.zeros(self.target_width + 1, dtype=torch.float64, device=next(self.parameters()).device)
        for batch in batches:
            images = images_of(batch)
            h, w = self.grid((images.shape[-2], images.shape[-1]))
            if batch["position"] != last and last is not None and last * h * w >= wanted:
                break
            per_step = per_step or batch["position"] * h * w
            last = batch["position"]
            share = draw(self.encoder(images), batch["noise"], batch.get("weight"), wanted)
            drawn = share if drawn is None else merge([drawn, share], wanted)
            if self.target == "features":
                weight = counted(batch.get("weight"), images)
                sums += torch.cat(
                    [(batch["targets"].double().mean(dim=1) * weight[:, None]).sum(dim=0), weight.sum()[None]]
                )
        assert drawn is not None, "a run has batches"
        if self.target == "features":
            if dist.is_initialized():
                dist.all_reduce(sums)
            self.target_mean.copy_(sums[:-1] / sums[-1])
        keys, vectors = gather_drawn(*drawn, wanted)
        vectors = vectors[keys < NEVER]  # without rows that only pad
        mean, std = vectors.mean(dim=0), vectors.std(dim=0).clamp(min=1e-6)
        self.encoder.standardize(mean, std)
        self.quantizer.start((vectors - mean) / std, per_step)

    def after_step(self, step: int, progress: Tensor) -> None:
        """Let the quantizer apply what it collected."""
        self.quantizer.update()
