"""Optimizers: parameter groups (no decay, layer decay) over timm's factory, the rates of each step, and the update.

Weight decay skips biases, norms and every other 1-D parameter, and what `no_decay` names; left out, what the encoder
lists. With `layer_decay` each group's rate is scaled by layer_decay ** (depth + 1 - depth_of(parameter)) (Bao et al.
2022, BEiT, appendix H).

    adamw   Loshchilov and Hutter 2019, arXiv 1711.05101; torch's fused one
    lamb    You et al. 2020, arXiv 1904.00962, without the clipping of its NVIDIA version: `clip_grad` does that
    lars    You et al. 2017, arXiv 1708.03888, trust coefficient 0.001; decay joins the gradient, as in MoCo v3
    lion    Chen et al. 2023, arXiv 2302.06675
    muon    Jordan 2024 (kellerjordan.github.io/posts/muon), scaled as by Liu et al. 2025, arXiv 2502.16982, section
            2.2: 0.2 sqrt(max(out, in)), so that rate and decay of AdamW fit; without Nesterov momentum. It takes the
            weight matrices inside blocks alone; stems, heads, tokens, tables, norms and biases go by AdamW.

The trust ratios of lamb and lars leave 1-D parameters out, and no others (He et al. 2021, MAE, and MoCo v3).

The published lists, for recipes that repeat them: MAE []; BEiT, BEiT v2 and SimMIM with a ViT [cls_token, pos_embed],
so mask token and relative positions are decayed; SimMIM with a Swin [mask_token].
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mim.config import ConfigError
from mim.schedules import SHAPES, multistep, to_steps, warmup_then

NOT_NEGATIVE = ("lr", "base_lr", "min_lr", "warmup_lr", "eps", "weight_decay", "weight_decay_end", "clip_grad")
AT_MOST_ONE = ("gamma", "layer_decay", "ema")
BETAS = {  # of every optimizer that is offered
    "adamw": [0.9, 0.95],  # MAE
    "lamb": [0.9, 0.999],
    "lars": [0.9],  # momentum
    "lion": [0.9, 0.99],
    "muon": [0.95, 0.95],  # momentum of matrices; both of the rest
}
COPIES = {"adamw": 2, "lamb": 2, "lars": 1, "lion": 1, "muon": 2}  # of a parameter in the state; of muon's matrices 1
OPTIONS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}, "lamb": {"max_grad_norm": None}}
ELEMENTWISE = ("adamw", "lion")  # an element moves by its own gradient alone, so a shard of a parameter can move alone
IN_A_BLOCK = re.compile(r"blocks?[._]\d+\.")  # `decoder_blocks.0.`, `group_1.block_2.`


@dataclass
class Config:
    name: str = "adamw"  # adamw | lamb | lars | lion | muon
    batch_size: int = 2048  # images per optimizer step over all processes
    length: str = "300 epochs"  # of the run: epochs, steps or images
    warmup: str = "10 epochs"  # linear, part of the length
    lr: float | None = None  # peak learning rate; give lr or base_lr, not both
    base_lr: float | None = None  # peak learning rate for a batch of 256: lr = base_lr * batch_size / 256 (MAE)
    min_lr: float = 0.0  # at the last step
    warmup_lr: float = 0.0  # where the warm-up starts, e.g. SimMIM 2e-6 for a batch of 2048
    schedule: str = "cosine"  # cosine | linear | constant | multistep, after the warm-up
    milestones: list[str] = field(default_factory=list)  # of multistep, e.g. ["700 epochs"] (SimMIM)
    gamma: float = 0.1  # of multistep: factor at each milestone
    betas: list[float] = field(default_factory=list)  # [0.9, 0.95] MAE, [0.9, 0.999] BEiT; left out: see BETAS
    eps: float = 1e-8  # lion has none
    weight_decay: float = 0.05  # times the rate; in lamb and lars a part of the gradient that the trust ratio scales
    weight_decay_end: float | None = None  # cosine from weight_decay to this; null: constant
    no_decay: list[str] | None = None  # ends of the names of parameters without decay; null: the encoder's list
    layer_decay: float | None = None  # rate factor per layer; null: none
    freeze_encoder: str | None = None  # duration with rate 0 in the encoder, so that a fresh decoder learns first
    clip_grad: float | None = None  # maximum norm of the gradient; BEiT 3.0, MAE none
    ema: float | None = None  # momentum of an average of the weights; null: none
    seed: int = 0  # of initial weights, drop path and dropout

    def __post_init__(self) -> None:
        self.betas = self.betas or list(BETAS.get(self.name, []))


@dataclass(frozen=True)
class Rates:
    """The resolved schedule of a run in optimizer steps: rates are pure functions of the step."""

    cfg: Config
    lr: float
    total_steps: int
    warmup_steps: int
    milestones: tuple[int, ...] = ()
    freeze_steps: int = 0

    def encoder_scale(self, step: int) -> float:
        """Factor of the encoder's learning rate: 0 while it is frozen, then 1."""
        return float(step >= self.freeze_steps)

    def at(self, step: int) -> tuple[float, float]:
        """Return (learning rate, weight decay) of an optimizer step."""
        cfg = self.cfg
        lr = warmup_then(
            cfg.schedule,
            step,
            start=cfg.warmup_lr,
            peak=self.lr,
            end=cfg.min_lr,
            warmup_steps=self.warmup_steps,
            steps=self.total_steps,
        )
        lr = multistep(step, start=lr, factor=cfg.gamma, milestones=self.milestones)
        if cfg.weight_decay_end is None:
            return lr, cfg.weight_decay
        last = max(self.total_steps - 1, 0)
        return lr, SHAPES["cosine"](step, start=cfg.weight_decay, end=cfg.weight_decay_end, steps=last)


def resolve(cfg: Config, num_images: int) -> Rates:
    """Turn durations and base rates of a recipe into steps and rates for a dataset of `num_images` images."""
    if (cfg.lr is None) == (cfg.base_lr is None):
        raise ConfigError(f"optim.lr={cfg.lr} and optim.base_lr={cfg.base_lr}: give exactly one of them")
    if cfg.schedule not in SHAPES:
        raise ConfigError(f"optim.schedule={cfg.schedule!r} is unknown; choose one of {', '.join(SHAPES)}")
    if (cfg.schedule == "multistep") != bool(cfg.milestones):
        raise ConfigError(
            f"optim.schedule={cfg.schedule} and optim.milestones={cfg.milestones}: multistep needs milestones, such as "
            f"['700 epochs'], and no other schedule has any"
        )
    if cfg.name not in BETAS:
        raise ConfigError(f"optim.name={cfg.name!r} is not offered; choose one of {', '.join(BETAS)}")
    if cfg.batch_size < 1:
        raise ConfigError(f"optim.batch_size={cfg.batch_size} must be at least 1")
    _check_ranges(cfg)
    try:
        total, warmup, *milestones = (
            to_steps(value, batch_size=cfg.batch_size, num_images=num_images, where=f"optim.{key}")
            for key, value in (
                ("length", cfg.length),
                ("warmup", cfg.warmup),
                *(("milestones", milestone) for milestone in cfg.milestones),
            )
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if warmup > total:
        raise ConfigError(f"optim.warmup={cfg.warmup!r} is {warmup} steps, longer than the run of {total} steps")
    if milestones and not warmup <= min(milestones) <= max(milestones) < total:
        raise ConfigError(
            f"optim.milestones={cfg.milestones} are the steps {milestones}; they must lie between the end of the "
            f"warm-up, {warmup}, and that of the run, {total}"
        )
    lr = cfg.lr if cfg.base_lr is None else cfg.base_lr * cfg.batch_size / 256
    assert lr is not None
    return Rates(cfg, lr, total, warmup, tuple(milestones), freeze_steps(cfg, num_images, total))


def _check_ranges(cfg: Config) -> None:
    """Refuse rates and factors with which no optimizer trains."""
    limits = dict.fromkeys(NOT_NEGATIVE, math.inf) | dict.fromkeys(AT_MOST_ONE, 1.0)
    for name, most in limits.items():
        value = getattr(cfg, name)
        if value is not None and not 0 <= value <= most:
            above = "" if most == math.inf else f" and at most {most:g}"
            raise ConfigError(f"optim.{name}={value} must be at least 0{above}")
    count = len(BETAS[cfg.name])
    if len(cfg.betas) != count or not all(0 <= beta < 1 for beta in cfg.betas):
        numbers = "two numbers" if count == 2 else "one number, the momentum"
        raise ConfigError(f"optim.betas={cfg.betas} of {cfg.name} must be {numbers}, at least 0 and below 1")


def freeze_steps(cfg: Config, num_images: int, total: int) -> int:
    """Steps of `optim.freeze_encoder`; they must end before the run does."""
    if cfg.freeze_encoder is None:
        return 0
    where = "optim.freeze_encoder"
    try:
        steps = to_steps(cfg.freeze_encoder, batch_size=cfg.batch_size, num_images=num_images, where=where)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if steps >= total:
        raise ConfigError(f"{where}={cfg.freeze_encoder!r} is {steps} steps, but the run has {total}; use less")
    return steps


def parameter_groups(objective: nn.Module, cfg: Config) -> list[dict]:
    """Split trainable parameters by decay, by treatment and, with `layer_decay`, by depth; each carries `lr_scale`."""
    encoder: Any = getattr(objective, "encoder", None)  # Encoder | None
    undecayed = _undecayed(objective, cfg)
    groups: dict[tuple[int, ...], dict] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in undecayed
        top = encoder.depth + 1 if encoder is not None else 0
        depth = encoder.depth_of(name.removeprefix("encoder.")) if name.startswith("encoder.") else top
        scale = 1.0 if cfg.layer_decay is None else cfg.layer_decay ** (top - depth)
        inside = cfg.freeze_encoder is not None and name.startswith("encoder.")
        treated = _treatment(name, parameter, encoder, cfg)
        key = (depth if cfg.layer_decay is not None else 0, decayed, inside, *treated.values())
        empty: dict[str, Any] = {"params": [], "names": [], "lr_scale": scale, "decayed": decayed, "inside": inside}
        group = groups.setdefault(key, empty | treated)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _treatment(name: str, parameter: Tensor, encoder: Any, cfg: Config) -> dict[str, bool]:
    """Options of a group by which timm's optimizer tells its parameters from others."""
    if cfg.name in ("lamb", "lars"):
        return {"always_adapt": parameter.ndim > 1}  # what is neither this nor decayed has no trust ratio
    return {"use_muon": _between_features(name, parameter, encoder)} if cfg.name == "muon" else {}


def _between_features(name: str, parameter: Tensor, encoder: Any) -> bool:
    """Whether a parameter is the matrix of a linear layer or convolution inside a block, so no stem, head or table."""
    leaf = name.rpartition(".")[2]
    if leaf not in ("weight", "w") or parameter.ndim < 2 or 1 in parameter.shape[:2]:  # w: dVAE; 1: depthwise
        return False
    if name.startswith("encoder.") and encoder is not None:
        return 0 < encoder.depth_of(name.removeprefix("encoder.")) <= encoder.depth
    return IN_A_BLOCK.search(name) is not None


def _undecayed(objective: nn.Module, cfg: Config) -> set[str]:
    """Names of the parameters of more than one dimension that are not decayed."""
    if cfg.no_decay is None:
        encoder: Any = getattr(objective, "encoder", None)
        return {f"encoder.{name}" for name in encoder.no_weight_decay()} if encoder is not None else set()
    names = {name for name, _ in objective.named_parameters()}
    for ending in cfg.no_decay:
        if not any(f".{name}".endswith(f".{ending}") for name in names):
            raise ConfigError(f"optim.no_decay names {ending!r}, but the name of no parameter ends so; leave it out")
    return {name for name in names if f".{name}".endswith(tuple(f".{ending}" for ending in cfg.no_decay))}


def create(objective: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """Build the optimizer at rate 0; the loop sets its rates at every step with `set_rates`."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in parameter_groups(objective, cfg)]
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    options = OPTIONS.get(cfg.name, {})
    betas, momentum = tuple(cfg.betas), cfg.betas[0]  # timm takes what the optimizer has
    return create_optimizer_v2(groups, opt=cfg.name, lr=0.0, eps=cfg.eps, betas=betas, momentum=momentum, **options)


def state_bytes(objective: nn.Module, cfg: Config) -> int:
    """Bytes of the optimizer's state, but for a few scalars."""
    return sum(
        parameter.numel() * parameter.element_size() * (1 if group.get("use_muon") else COPIES[cfg.name])
        for group in parameter_groups(objective, cfg)
        for parameter in group["params"]
    )


def check_sharded(name: str) -> None:
    """Refuse an optimizer that needs whole tensors where FSDP2 leaves a process only shards of them."""
    if name not in ELEMENTWISE:
        raise ConfigError(
            f"optim.name={name} needs whole tensors (norms or matrices), of which FSDP2 leaves a process its shard; "
            f"choose {' or '.join(ELEMENTWISE)}, or train with DDP"
        )


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of a new optimizer, all zeros, which is that before its first step.

    A checkpoint has it then, whatever was skipped; the one that torch makes for it counts a step, and LARS would begin
    with a momentum. Called at rate 0, so the step that makes it leaves the weights alone.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for owner in (*optimizer.state.values(), *optimizer.param_groups):  # LAMB counts its steps in the groups
        for value in owner.values():
            if isinstance(value, Tensor):
                value.zero_()


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, encoder_scale: float = 1.0) -> None:
    """Write a step's learning rate and weight decay into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] * (encoder_scale if group["inside"] else 1.0)
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def update(optimizer: Any, finite: Tensor, scaler: Any) -> None:
    """Take the step of a prepared optimizer; where the gradient is not finite, weights and state stay as they are.

    `finite` (0-d bool, the same on all ranks) comes from the norm of the gradient. A fused optimizer decides on the
    device; any other waits for it once a step. In fp16 the `scaler` has seen the gradient, and decides alone.
    """
    if scaler is None:
        if optimizer.defaults.get("fused"):
            optimizer.optimizer.found_inf = (~finite).float()
        elif not finite:
            return
    optimizer.step()
