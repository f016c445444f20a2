"""What the ranks of test_sharding do: `torchrun --nproc_per_node 2 tests/sharded.py objectives|chain OUT ...`."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from test_contracts import OBJECTIVES, a_batch, an_objective

from mim import optim, ranks, sharding, train
from mim.blocks import compile_each, recompute
from mim.saving import checkpoint

CASES = [*((name, "vit") for name in OBJECTIVES), *(("simmim", name) for name in ("eva", "beit", "dense"))]
HALF = torch.tensor(0.5)
EVALS = ["evals.knn.every=2 steps", "evals.knn.k=3"]


def total(network, batches):
    """Backward of the sum of the losses of some batches, whose gradients are added up."""
    network.zero_grad()
    for number, batch in enumerate(batches, start=1):
        with sharding.adding_up(network) if number < len(batches) else torch.enable_grad():
            network(batch, HALF)["loss"].sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def compare(name, encoder):
    """An objective on two ranks beside the same one whole; each rank sees both batches, in an order of its own.

    Some have blocks that are recomputed, and one compiled ones, too.
    """
    plain = an_objective(name, encoder).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # its draws come in the order of the batches
    batches = [a_batch(), {**a_batch(), "images": a_batch()["images"].flip(0)}]
    network = copy.deepcopy(plain)
    if dist.get_rank():  # rank 0's weights count
        torch.nn.init.normal_(next(p for p in network.parameters() if p.requires_grad))
    twin = sharding.twin(network)
    if name == "mae":
        compile_each(network, backend="eager")
    if name in ("mae", "simmim"):
        recompute(network)
    sharding.shard(network, torch.device("cpu"))
    wanted = total(plain, batches)
    found = {n: sharding.gathered(g) for n, g in total(network, batches[:: 1 - 2 * dist.get_rank()]).items()}
    assert found.keys() == wanted.keys()
    sharding.fill(twin, network, {})
    for _ in range(1 + dist.get_rank()):  # a twin is plain: ranks may ask it any number of times
        same = torch.equal(twin(batches[0], HALF)["loss"], plain(batches[0], HALF)["loss"])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    sharding.put_back(network, twin)
    sharding.empty(twin)
    wholes = [sharding.gathered(p) for p in network.parameters()]
    doubled = all(p.equal(2 * q) for p, q in zip(wholes, plain.parameters(), strict=True))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    return {
        "gradient": max((found[n] - g).abs().max().item() / g.abs().max().item() for n, g in wanted.items()),
        "twin": same,
        "put_back": doubled,
        "emptied": all(p.is_meta for p in twin.parameters()),
        **{name: step(name, network, plain) for name in optim.ELEMENTWISE},
        "share": max(p.to_local().numel() / p.numel() for p in network.parameters() if p.shape[0] > 1),
    }


def step(name, network, plain):
    """Whether an optimizer leaves shards where a gradient is not finite, and otherwise moves them as it does wholes."""
    moved = []
    for module in (network, plain):
        gradients = [(p, p.grad) for p in module.parameters()]
        optimizer = optim.create(module, optim.Config(name=name, lr=1e-3))
        optim.allocate(optimizer)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        optim.set_rates(optimizer, 1e-3, 0.1)
        prepared = SimpleNamespace(optimizer=optimizer, defaults=optimizer.defaults, step=optimizer.step)
        before = [sharding.gathered(p).detach().clone() for p in module.parameters()]
        for finite in (False, True):
            optim.update(prepared, torch.tensor(finite), None)
            now = [sharding.gathered(p).detach() for p in module.parameters()]
            moved.append([p - q for p, q in zip(now, before, strict=True)])
    still, after, _, wanted = moved
    same = all(p.allclose(q, atol=1e-7) for p, q in zip(after, wanted, strict=True))
    return same and not any(change.any() for change in still) and any(change.any() for change in after)


def objectives(out):
    dist.init_process_group("gloo")
    found = {f"{name} {encoder}": compare(name, encoder) for name, encoder in CASES}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(found))


def chain(out, recipe, *stages):
    """Train in stages `ddp:3 fsdp:5`: each up to a step; tell which tensors differ from those that were saved."""
    honest, restored = checkpoint.restore, []

    def watched(folder, model, optimizer, ema):
        state = honest(folder, model, optimizer, ema)
        now = checkpoint.gather_tensors(model, optimizer, ema)
        saved = checkpoint.read_tensors(folder, ("model.", "optimizer.", "ema."))
        assert saved.keys() == now.keys()
        restored.append([n for n, t in now.items() if not sharding.gathered(t).equal(saved[n])])
        return state

    checkpoint.restore = watched
    try:
        for stage in stages:
            how, _, step = stage.partition(":")
            options = [f"train.run={out}/run", "train.cpu=true", f"train.shard={str(how == 'fsdp').lower()}"]
            train.main(recipe, [*options, *EVALS], stop=lambda now, last=int(step): now == last)
    finally:
        checkpoint.restore = honest
    if ranks.place()[0] == 0:
        Path(out, "restored.json").write_text(json.dumps(restored))


if __name__ == "__main__":
    {"objectives": objectives, "chain": chain}[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
