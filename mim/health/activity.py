"""What the blocks of an encoder do: how widely its heads look, which of its units fire, how loud its branches are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mim.health.attention_maps import mean_distance


def looks(weights: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Entropy and reach of attention (B, heads, Q, K), prefix tokens first: (B, heads, 2).

    The entropy is that of a row as a share of ln K, the mean over all queries; the reach is `mean_distance`, pixels.
    """
    weights = weights.double()
    entropy = torch.special.entr(weights).sum(dim=-1).mean(dim=-1) / math.log(weights.shape[-1])  # (B, heads)
    return torch.stack([entropy, mean_distance(weights, grid, patch_size)], dim=-1)


@contextlib.contextmanager
def fired(encoder: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count for each hidden unit of each MLP in how many images it is positive at some place, while the block runs.

    Yields the counts (units,) int64 by the name of the MLP's last layer. Of a gated MLP (SwiGLU), it is the gate.
    """
    counts: dict[str, Tensor] = {}

    def count(name: str, axis: int, _act: nn.Module, _inputs: Any, output: Tensor) -> None:
        places = output.movedim(axis, -1).reshape(len(output), -1, len(counts[name]))  # (B, places, units)
        counts[name] += (places > 0).any(dim=1).sum(dim=0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        for name, mlp in encoder.named_modules():
            last, act = getattr(mlp, "fc2", None), getattr(mlp, "act", None)
            if isinstance(act, nn.Module) and isinstance(last, nn.Linear | nn.Conv2d):
                units, axis = (last.in_features, -1) if isinstance(last, nn.Linear) else (last.in_channels, 1)
                counts[f"{name}.fc2"] = torch.zeros(units, dtype=torch.int64, device=last.weight.device)
                stack.callback(act.register_forward_hook(partial(count, f"{name}.fc2", axis)).remove)
        yield counts


def gammas(encoder: Any) -> dict[int, float]:
    """Mean magnitude of the LayerScale gammas of each block, counted from 1; empty where there are none."""
    found: dict[int, list[Tensor]] = {}
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2].startswith("gamma"):
            found.setdefault(encoder.depth_of(name), []).append(parameter.detach().double().abs().flatten())
    return {block: float(torch.cat(values).mean()) for block, values in sorted(found.items())}
