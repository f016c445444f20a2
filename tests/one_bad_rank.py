"""What torchrun starts on two processes: one gradient is infinite, and every optimizer skips the step on both."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from mim import optim


def equal_on_all_ranks(tensors: list[torch.Tensor]) -> bool:
    mine = torch.cat([t.detach().flatten() for t in tensors])
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    same = torch.tensor(float(mine.equal(theirs)))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same)


def main() -> None:
    accelerator = Accelerator(cpu=True)
    for name in optim.BETAS:
        torch.manual_seed(0)
        objective = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        model, optimizer = accelerator.prepare(objective, optim.create(objective, optim.Config(name=name)))
        optim.allocate(optimizer.optimizer)
        optim.set_rates(optimizer, 1e-2, 0.05)
        history = [[p.detach().clone() for p in model.parameters()]]
        for spoiled in (True, False, True, False):
            loss = model(torch.randn(4, 8) + accelerator.process_index).square().mean()
            accelerator.backward(loss * (torch.inf if spoiled and accelerator.process_index == 1 else 1.0))
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optim.update(optimizer, torch.isfinite(norm), accelerator.scaler)
            optimizer.zero_grad()
            history.append([p.detach().clone() for p in model.parameters()])
            moved = any(not a.equal(b) for a, b in zip(history[-1], history[-2], strict=True))
            assert moved != spoiled, (name, len(history))
            assert equal_on_all_ranks(history[-1]), (name, len(history))
        print(f"{name} stayed and moved on both")


if __name__ == "__main__":
    main()
