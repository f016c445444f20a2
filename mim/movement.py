"""How far a step of AdamW moves the weights: the norm of the change over the norm of what is changed.

Read from the optimizer's state after the step, so no copy of the weights is kept, and only when it is logged.
Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2: with m and v corrected for their start, w becomes
w (1 - lr decay) - lr m / (sqrt(v) + eps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mim import ranks, sharding


@torch.no_grad()
def update_ratio(optimizer: torch.optim.Optimizer) -> float:
    """Of all weights of two or more dimensions in the last step that was not skipped, at the rates of now.

    Called by all ranks after a step; one host sync. Sharded weights are added up over the ranks; whole ones, which all
    ranks have, leave the ratio as it is.
    """
    sums = [torch.zeros(2, dtype=torch.float64)]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if parameter.ndim > 1 and state and "exp_avg_sq" in state:
                sums.append(_squares(parameter, state, group))
    device = sums[-1].device
    change, before = ranks.add(torch.stack([part.to(device) for part in sums]).sum(dim=0)).tolist()
    return (change / before) ** 0.5 if before > 0 else 0.0


def _squares(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Sums of squares (2,) of the change of a parameter and of what it was before."""
    present, mean, square = sharding.local([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
    rate, (beta1, beta2), step = group["lr"], group["betas"], state["step"].to(present.device)
    root = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
    towards = mean.div(1 - beta1**step).div_(root).mul_(rate)
    before = present.add(towards).div_(1 - rate * group["weight_decay"])
    change = present - before
    return torch.stack([change.double().square().sum(), before.double().square().sum()])
