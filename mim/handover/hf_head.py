"""The head of a classify run in the classes of transformers: pure functions over `mim/handover/hf_layouts.py`.

ViT classifies the normed class token; DINOv2 the class token beside the mean of the normed patches, of which a run
reads one, so the other gets zeros; BEiT the class token, or the mean of raw patches with a norm of its own. What a run
does otherwise, no weights of these classes can say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mim.handover.hf_layouts import Native, Tensors, Unfit


@dataclass
class Head:
    """What scores pooled tokens."""

    weight: Tensor  # (classes, D)
    bias: Tensor  # (classes,)
    pool: str  # class token | mean of the patches
    norm: Tensors | None  # weight and bias (D,) of a norm of the mean of raw tokens; None: the tokens are normed


def add_head(native: Native, head: Head) -> Native:
    """The classifier of a model: `...ForImageClassification`. Raises `Unfit`."""
    weight, tensors = head.weight, dict(native.tensors)
    kind = native.config["model_type"]
    if kind.startswith("dinov2"):
        if head.norm is not None:
            raise Unfit(f"its head norms the mean of raw patches, {native.architecture} the patches")
        parts = [weight, torch.zeros_like(weight)]  # of the class token, of the mean
        weight = torch.cat(parts if head.pool == "class" else parts[::-1], dim=1)  # (classes, 2 D)
    elif head.pool == "mean":
        if kind != "beit" or head.norm is None:
            raise Unfit(f"its head reads the mean of the patches, which {native.architecture} does not pool so")
        tensors |= {f"pooler.layernorm.{part}": tensor for part, tensor in head.norm.items()}
    named = {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
    return Native(
        architecture=native.architecture.removesuffix("Model") + "ForImageClassification",
        config={**native.config, "num_labels": len(weight)},
        tensors=named | {"classifier.weight": weight, "classifier.bias": head.bias},
        tolerance=native.tolerance,
        normed=native.normed,
    )
