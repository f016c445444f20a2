"""How a run is spread over devices: processes, precision, and what wraps the objective.

Accelerate finds the processes and their devices, casts, scales fp16 losses and wraps in DDP. Sharding is torch's own
FSDP2 (`mim/sharding.py`), on GPUs and CPUs alike: accelerate 1.15 leaves it out on CPUs without a word, recomputes
activations with other drop paths than those of the forward, and casts the pixel targets to bfloat16.
What accelerate's configuration file asks for and this program does otherwise is refused, never passed over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from mim import allocator, attention, optim, sharding
from mim.blocks import blocks, compile_each, lacking, recompute
from mim.config import ConfigError
from mim.job import Config, Machine

ELSEWHERE = {  # accelerate's settings, the value that leaves things alone, and the key that this program has for them
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.micro_batches"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "train.activation_checkpointing"),
    "FSDP_OFFLOAD_PARAMS": ("false", "train.activation_checkpointing, and a smaller micro-batch,"),
}


@dataclass
class Wrapped:
    """What the loop trains, and what evaluations look at."""

    model: nn.Module
    optimizer: Any
    twin: nn.Module | None  # of a sharded objective: the plain one that evaluations fill; None without sharding
    how: str  # for the start lines


def launch(cfg: Config, *handlers: Any) -> Accelerator:
    """Find this process's place among the others, and its device and precision; `handlers` are accelerate's.

    Raises ConfigError where the launcher was told something that would not happen, and for an optimizer or a precision
    that cannot be sharded.
    """
    machine = cfg.train
    check_environment(machine)
    cpu = machine.cpu or not torch.accelerator.is_available()
    if cpu and machine.precision == "fp16":
        raise ConfigError("train.precision=fp16 needs a GPU; on a CPU use train.precision=bf16 or no")
    in_ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=machine.precision,
        kwargs_handlers=[in_ddp, *handlers],
    )
    if _is_set("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        why = "this launch runs on CPUs" if accelerator.device.type == "cpu" else "it is not of version 2"
        raise ConfigError(
            f"accelerate's configuration asks for FSDP, but {why}, so nothing would be sharded; set fsdp_version: 2 "
            f"on GPUs, or leave FSDP out of it and set train.shard=true, which shards anywhere"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(f"{accelerator.distributed_type.value} is not offered; use DDP, or FSDP of version 2")
    if is_sharded(accelerator, machine):
        optim.check_sharded(cfg.optim.name)
        if machine.precision == "fp16":
            raise ConfigError("train.precision=fp16 is not offered with sharding; use train.precision=bf16")
    return accelerator


def check_environment(machine: Machine) -> None:
    """Refuse what accelerate's configuration asks for where a key of the recipe decides it."""
    for name, (neutral, key) in ELSEWHERE.items():
        if os.environ.get(name, neutral).lower() != neutral:
            raise ConfigError(f"accelerate's configuration sets {name}={os.environ[name]}; leave it out and use {key}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", machine.precision):
        raise ConfigError(
            f"accelerate's configuration asks for mixed_precision: {asked}, but train.precision={machine.precision}; "
            f"set train.precision={asked}, or mixed_precision: 'no' there"
        )


def is_sharded(accelerator: Accelerator, machine: Machine) -> bool:
    """Whether parameters are shared out: as the recipe or accelerate's configuration asks, with more than one rank."""
    return (machine.shard or accelerator.is_fsdp2) and accelerator.num_processes > 1


def wrap(accelerator: Accelerator, objective: nn.Module, cfg: Config) -> Wrapped:
    """Put the objective on its devices, with its optimizer: compiled and recomputed blocks, then FSDP2, DDP or none.

    The optimizer is made afterwards, so it holds the parameters that the devices have.
    """
    machine, sharded = cfg.train, is_sharded(accelerator, cfg.train)
    objective.to(accelerator.device)
    whole = sharding.twin(objective) if sharded else None
    if accelerator.device.type == "cpu":
        allocator.keep_freed_memory()
    attention.unfuse(objective, accelerator.device, machine.precision)
    how: list[str] = []
    how += compiled(objective, machine.compile, accelerator.device)
    if machine.activation_checkpointing:  # around what is compiled
        how.append(f"activations of {recompute(objective)} blocks recomputed")
    if sharded:
        plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
        kept = plugin is not None and plugin.reshard_after_forward is False
        sharding.shard(objective, accelerator.device, reshard_after_forward=not kept)
        how.append(
            f"parameters, gradients and optimizer sharded over {accelerator.num_processes} ranks (FSDP2) in "
            f"{len(blocks(objective))} blocks and a rest"
        )
    alone = sharded or accelerator.is_fsdp2  # no DDP around it
    model = accelerator.prepare_model(objective, evaluation_mode=alone)
    optimizer = accelerator.prepare_optimizer(optim.create(objective, cfg.optim))
    return Wrapped(model, optimizer, whole, "; ".join(how))


def compiled(objective: nn.Module, asked: bool | None, device: torch.device) -> list[str]:
    """Compile the blocks if that is asked for or, left open, on a GPU that has what it takes; tell so in words."""
    on_gpu = device.type == "cuda"
    if asked is None and on_gpu and (missing := lacking(device)):
        return [f"blocks not compiled, for lack of {missing}"]
    return [f"{compile_each(objective)} blocks compiled"] if asked or (asked is None and on_gpu) else []


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
