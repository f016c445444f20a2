"""The blocks of a network: what is sharded, compiled and recomputed one by one, whatever the architecture.

A block is repeated: it stands in a list (`nn.ModuleList` or `nn.Sequential`), has parts of its own, and holds no
smaller block. In a ViT these are its transformer blocks, in a Swin those of all stages, in MAE the decoder's too.

Compiling and recomputing replace a block's `forward`, not the block: names of parameters stay, and what sharding hooks
to the block runs around it. Recomputing: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
arXiv 1604.06174, section 3.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LISTS = (nn.ModuleList, nn.Sequential)


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name, in its order; no block holds another, and none occurs twice."""
    candidates = {
        f"{name}.{key}": child
        for name, module in network.named_modules()
        if isinstance(module, LISTS)
        for key, child in module.named_children()
        if _is_composed(child)
    }
    parents = {".".join(name.split(".")[:n]) for name in candidates for n in range(1, name.count(".") + 1)}
    return {name: module for name, module in candidates.items() if name not in parents}


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is more than a list, and at least two parts of it have parameters of their own."""
    parts = sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())
    return parts > 1 and not isinstance(module, LISTS)


def recompute(network: nn.Module) -> int:
    """Keep only the inputs of each block for the backward, which runs its forward again. Returns how many do so.

    The draws of the forward come again (drop path, dropout), so gradients are those of before. A block with a BatchNorm
    is left alone: its running statistics would move twice.
    """
    found = [
        block
        for block in blocks(network).values()
        if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())
    ]
    for block in found:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(found)


def compile_each(network: nn.Module, backend: str = "inductor") -> int:
    """Compile the forward of each block with torch.compile, on its first call. Returns how many there are.

    Blocks share one code, of which each rate of drop path and each shape needs its own version: beyond torch's limit of
    versions (8) the rest would run uncompiled, with no more than a warning. Shapes are few and never change, so none
    is made for shapes that vary. Draws are torch's own, so the same paths are dropped as without compilation.
    """
    found = list(blocks(network).values())
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(found))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    for block in found:
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend, options=options)
    return len(found)


def lacking(device: torch.device) -> str | None:
    """What torch.compile lacks to make code for a GPU, in words; None where it has everything."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "a GPU of compute capability 7.0"
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the headers of Python"
    return None
