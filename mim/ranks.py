"""What the ranks of a run tell each other: sums, lists and a common decision. With one rank nothing is sent."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mim.data import stream
from mim.interruption import before_collective


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Return when all ranks have come here."""
    before_collective()
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block on the main rank, then on all others."""
    if place()[0]:
        wait()
    yield
    if not place()[0]:
        wait()


def told_by(rank: int, value: Tensor) -> Tensor:
    """The tensor of one rank on all, on the CPU; the others give one of its shape and type, which may be filled."""
    if not dist.is_initialized():
        return value
    before_collective()
    sent = value.to(_device())
    dist.broadcast(sent, rank)
    return sent.cpu()


def add(value: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of a tensor over all ranks."""
    before_collective()
    if dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value


def gather(
    values: list[Any], device: torch.device | None = None, *, group: dist.ProcessGroup | None = None
) -> list[Any]:
    """The lists of all ranks, joined in the order of ranks. They travel as JSON: nothing is unpickled.

    A thread beside the loop gives a gloo group of its own.
    """
    if not dist.is_initialized():
        return values
    if device is None:
        device = torch.device("cpu") if group is not None else _device()
    before_collective()
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8).to(device)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(text)
    lengths = add(sizes, group=group).tolist()
    if max(lengths) == len("[]"):
        return []
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    lists = [json.loads(t[:n].cpu().numpy().tobytes()) for t, n in zip(texts, lengths, strict=True)]
    return [value for found in lists for value in found]


def total_fingerprint(share: int, device: torch.device, main_rank: bool) -> int:
    """Add the ranks' shares of the stream fingerprint; the main rank keeps the sum, the others start again at 0."""
    if not dist.is_initialized():
        return share
    total = int(add(torch.tensor(share, dtype=torch.int64, device=device)))  # wraps modulo 2**64
    return total % stream.FINGERPRINT_MODULUS if main_rank else 0


def share(tensors: Iterable[Tensor]) -> None:
    """Give every rank the main rank's floats: the running statistics of a BatchNorm differ by rank."""
    before_collective()
    if dist.is_initialized():
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.broadcast(tensor, src=0)


def agree(wanted: bool) -> bool:
    """True on every rank when it is true on one."""
    if not dist.is_initialized():
        return wanted
    return bool(add(torch.tensor(int(wanted), device=_device())))


def _device() -> torch.device:
    """Where the tensors are that this group of processes sends."""
    if dist.get_backend() != "nccl":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
