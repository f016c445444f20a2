"""BatchNorm over the rows of all ranks of a micro-batch, without those that only pad it.

Ioffe and Szegedy 2015, arXiv 1502.03167; synchronised as in Peng et al. 2018 (MegDet, arXiv 1711.07240),
which segmentation heads are published with. torch's own SyncBatchNorm runs on accelerators only and counts every row;
here rows of weight 0 are left out, so that a step does not depend on the number of ranks. It still depends on the
number of micro-batches, which is why a network with a BatchNorm makes an objective `per_micro_batch`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of maps (B, C, H, W) with statistics of all ranks; `counting` says which rows count."""

    rows: Tensor | None = None  # (B,) weights of the micro-batch that runs; None: every row counts

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) -> the same, in the dtype of `x`; the statistics are computed in float32."""
        if not self.training:
            return super().forward(x)
        counted = x.new_ones(len(x)) if self.rows is None else self.rows > 0
        rows = counted.view(-1, 1, 1, 1).float()  # (B, 1, 1, 1)
        pixels = x.float()
        total = _total(rows.sum() * x[0, 0].numel())
        count = total.clamp(min=1)  # a micro-batch of which no row counts is left at 0
        mean = _total((pixels * rows).sum(dim=(0, 2, 3))) / count  # (C,)
        centred = pixels - mean.view(-1, 1, 1)
        var = _total((centred.square() * rows).sum(dim=(0, 2, 3))) / count  # (C,)
        self._remember(mean.detach(), var.detach() * (count / (count - 1).clamp(min=1)), rate=(total > 0).float())
        y = centred * (var + self.eps).rsqrt().view(-1, 1, 1)
        if self.affine:
            y = y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, *, rate: Tensor) -> None:
        """Move the running statistics, those of evaluation; a rate of 0 leaves them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum * rate)
        self.running_var.lerp_(var, self.momentum * rate)
        self.num_batches_tracked += 1


@contextlib.contextmanager
def counting(network: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Tell every BatchNorm of a network which rows count while the block runs: those of `weight` (B,) above 0."""
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.rows = weight
    try:
        yield
    finally:
        for norm in norms:
            norm.rows = None


def _total(value: Tensor) -> Tensor:
    """Sum over all ranks, through which gradients flow back to each."""
    return all_reduce(value) if dist.is_initialized() and dist.get_world_size() > 1 else value
