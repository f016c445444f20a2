"""Parameters, gradients and optimizer shared out over the ranks: torch's FSDP2, and the whole network back from it.

Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277, section 3; ZeRO stage 3 of Rajbhandari et al. 2020,
arXiv 1910.02054, section 5.3. Each block is gathered when it runs, and what stands in no block for the whole step.

Weights stay float32 and autocast chooses the precision of each operation, as without sharding: FSDP2's own policy would
cast a block's norms and the images, which are the pixel targets, to bfloat16. Gradients are averaged over ranks in
float32, as by DDP.

A sharded network computes nothing but the forward of the loss. Evaluations and exports, which call methods of it, get a
twin: the same modules, plain, whose parameters have no storage but while they are filled.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mim import ranks
from mim.blocks import blocks


def shard(network: nn.Module, device: torch.device, *, reshard_after_forward: bool = True) -> nn.Module:
    """Shard a network on its device over all ranks, in place: a group per block, and one of the rest.

    Rank 0's values count.

    Without `reshard_after_forward` blocks stay gathered until their backward: faster, with more memory.
    """
    ranks.share([*(parameter.detach() for parameter in network.parameters()), *network.buffers()])
    mesh = init_device_mesh(device.type, (ranks.place()[1],))
    for block in blocks(network).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(network, mesh=mesh)
    return network


@contextlib.contextmanager
def adding_up(model: nn.Module) -> Iterator[None]:
    """Add gradients up locally while the block runs; the backward after it averages them over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with getattr(model, "no_sync", contextlib.nullcontext)():
            yield


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts of tensors, sharing their memory: what elementwise arithmetic needs."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank; one that is not sharded is itself. All ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- the whole network ---------------------------------------------------------------------------


def twin(network: nn.Module) -> nn.Module:
    """A copy of a network, before it is sharded, whose parameters have no storage; its buffers have."""
    memo: dict[int, Any] = {id(p): _hollow(p) for p in network.parameters()}
    return copy.deepcopy(network, memo)


@torch.no_grad()
def fill(whole: nn.Module, network: nn.Module, replaced: dict[str, Tensor]) -> None:
    """Gather a sharded network into its twin, with some tensors `replaced` by name. All ranks call it together."""
    state: dict[str, Any] = get_model_state_dict(network) | replaced
    whole.load_state_dict({name: gathered(value).detach().clone() for name, value in state.items()}, assign=True)
    unsaved = dict(network.named_buffers())
    for name, value in whole.named_buffers():
        if name not in state:
            value.copy_(unsaved[name])


def empty(whole: nn.Module) -> None:
    """Let go of a twin's parameters."""
    for module in whole.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, _hollow(parameter))


def put_back(network: nn.Module, whole: nn.Module) -> None:
    """Copy what a twin was changed to into the sharded network."""
    set_model_state_dict(network, whole.state_dict(), options=StateDictOptions(full_state_dict=True))


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
