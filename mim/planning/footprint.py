"""What one micro-batch costs, without memory or data: floating point operations, tokens and bytes.

The objective and the frozen networks are built on the meta device, turned into fake tensors that know their shape and
type alone, and run once, forward and backward, at the real size of a micro-batch. Every operation passes by, so the
figures are counted and not estimated: operations of matrix products, convolutions and attention (a multiply-add is
two; what is elementwise is left out), and the bytes of every tensor from its making to its end. What they leave out is
the device's own: workspaces of its libraries, fragmentation, a few hundred MiB of context.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mim import build, frozen_networks, optim
from mim.config import ConfigError
from mim.contracts import Batch

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTSIDE = "decoder / head"  # what an objective owns beside its encoder


@dataclass
class Part:
    """One network, or what an objective owns beside its encoder. Operations are per image."""

    parameters: int
    trained: int = 0
    forward: float = 0.0
    backward: float = 0.0


@dataclass
class Footprint:
    """One step's cost. Bytes are those of one device."""

    parts: dict[str, Part]
    tokens: dict[str, int]  # per image
    rows: int  # of a micro-batch
    activations: int = 0  # bytes that the forward pass of a micro-batch leaves for the backward pass
    peak: int = 0  # largest number of bytes that a step holds beside weights and optimizer: activations and gradients
    weights: dict[str, int] = field(default_factory=dict)  # bytes of weights, gradients, optimizer, average, frozen

    @property
    def total(self) -> int:
        """Bytes of a device at the fullest moment of a step; the gradients are in `peak`."""
        return self.peak + sum(size for name, size in self.weights.items() if name != "gradients")

    def flops(self) -> float:
        """Operations of a training step per image, frozen networks included."""
        return sum(part.forward + part.backward for part in self.parts.values())

    def total_at(self, rows: int) -> int:
        """About the bytes of a device with micro-batches of another size: all but weights and gradients scales."""
        fixed = self.weights["gradients"]
        return self.total - self.peak + fixed + (self.peak - fixed) * rows // self.rows


def measure(built: build.Built, optimizer: optim.Config, *, rows: int, micro_batches: int, precision: str) -> Footprint:
    """Run one step on fake tensors, which uses `built` up."""
    trained = sum(_bytes(p) for p in built.objective.parameters() if p.requires_grad)
    weights = {
        "weights": sum(_bytes(t) for t in _tensors(built.objective)),
        "gradients": trained,
        "optimizer": optim.state_bytes(built.objective, optimizer),
        "average": trained if optimizer.ema is not None else 0,
        "frozen": sum(_bytes(t) for network in built.frozen.values() for t in _tensors(network)),
    }
    found = Footprint(_parts(built), {}, rows, weights=weights)
    torch.ones((), requires_grad=True).backward()  # were the first of a process on fake tensors, it could not fork
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for network in (built.objective, *built.frozen.values()):
                _fake(network)
            _run(built, found, micro_batches, AUTOCAST[precision])
    except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
        raise ConfigError(
            f"objective.name={built.sections['objective']['name']} makes a shape that depends on values ({error}), so "
            f"its cost cannot be told before it runs; every shape must follow from the recipe"
        ) from error
    return found


def _run(built: build.Built, found: Footprint, micro_batches: int, dtype: torch.dtype | None) -> None:
    """Forward and backward of a micro-batch, or of two where gradients outlive the first; fills in what it counts."""
    rows, batch, own = found.rows, _batch(built, found.rows), _inner(built.objective)
    counted, live = operations(), Live()
    inner = _through_one_module(getattr(built.objective, own), counted.get_total_flops)
    _note_tokens(built, batch, found.tokens, inner)
    with counted, live:
        for _ in range(min(micro_batches, 2)):
            for name, network in built.frozen.items():
                before = counted.get_total_flops()
                with _precision(dtype):
                    frozen_networks.write_targets({name: network}, batch)
                found.parts[name].forward = (counted.get_total_flops() - before) / rows
            start, inside, held = counted.get_total_flops(), inner.operations, live.bytes
            with _precision(dtype):
                loss = built.objective(batch, torch.zeros(()))["loss"]
            middle, found.activations = counted.get_total_flops(), live.bytes - held
            inside = inner.operations - inside
            inner.gradients.clear()
            loss.sum().backward()
            end = counted.get_total_flops()
            turn = inner.gradients[0] if inner.gradients else end  # none reach a frozen encoder
            forward = {own: inside, OUTSIDE: middle - start - inside}
            backward = {own: end - turn, OUTSIDE: turn - middle}
            for name in found.parts.keys() & forward.keys():
                found.parts[name].forward, found.parts[name].backward = forward[name] / rows, backward[name] / rows
            del loss
    found.peak = live.peak


class Everywhere(contextlib.nullcontext[None]):
    """Stands for the counter's own tracker of modules, whose hooks keep what recomputed blocks make."""

    parents = frozenset({"Global"})


def operations() -> FlopCounterMode:
    """A context that counts the operations inside, all together."""
    found: Any = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    )
    found.mod_tracker = Everywhere()
    return found


def convolution_backward(
    gradient: Any, inputs: Any, weight: Any, *options: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of a convolution's gradients, from shapes: those of the convolution, for each gradient that is made.

    torch's own formula counts the gradient of the weight without its groups: of a depthwise one, by their number.
    """
    transposed, made = options[4], options[7]
    positions = inputs[2:] if transposed else gradient[2:]
    return 2 * gradient[0] * math.prod(positions) * math.prod(weight) * sum(made[:2])


class Inner(nn.Module):
    """Makes every call of a network, by whatever method, the call of one module, to which operations are booked."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__()
        self.clock = clock  # operations so far
        self.inside = False
        self.operations = 0
        self.gradients: list[int] = []  # when the gradients of what it returned were there

    def forward(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        self.inside, began = True, self.clock()
        try:
            result = method(*args, **kwargs)
        finally:
            self.inside = False
        self.operations += self.clock() - began
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self.gradients.append(self.clock()))
        return result


def _through_one_module(network: nn.Module, clock: Callable[[], int]) -> Inner:
    """Let the entrances of an encoder or a tokenizer lead through one `Inner`."""
    inner = Inner(clock)

    def entrance(method: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) if inner.inside else inner(method, *args, **kwargs)

    for name in ("forward", "layers", "loss"):
        if hasattr(network, name):
            setattr(network, name, functools.partial(entrance, getattr(network, name)))
    return inner


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in inputs | self._known:  # not a view, not changed in place
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def end() -> None:
            self._known.discard(key)
            self.bytes -= size

        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, end)


def _parts(built: build.Built) -> dict[str, Part]:
    """The networks of a run, the objective's own split into its encoder (or tokenizer) and the rest."""
    inner = _inner(built.objective)
    sizes = {True: [0, 0], False: [0, 0]}  # inside the inner network: parameters, trained ones
    for name, parameter in built.objective.named_parameters():
        size = sizes[name.startswith(f"{inner}.")]
        size[0] += parameter.numel()
        size[1] += parameter.numel() * parameter.requires_grad
    parts = {inner: Part(*sizes[True])} | ({OUTSIDE: Part(*sizes[False])} if sizes[False][0] else {})
    return parts | {n: Part(sum(p.numel() for p in network.parameters())) for n, network in built.frozen.items()}


def _inner(objective: nn.Module) -> str:
    """Name of the network that an objective trains."""
    return "encoder" if getattr(objective, "encoder", None) is not None else "tokenizer"


def _batch(built: build.Built, rows: int) -> Batch:
    """A batch of the recipe's shapes, as it is on the device."""
    channels = built.views.data.channels
    batch: Batch = {
        name: torch.zeros(rows, channels, *size)
        for name, size in zip(("images", "tokenizer_images"), built.views.train_sizes)  # noqa: B905  the second is optional
    }
    if built.views.cache is not None:
        batch["codes"] = torch.zeros(rows, math.prod(built.encoder.grid(built.views.sizes[0])), dtype=torch.int64)
    if built.views.mask is not None:
        mask = np.asarray(built.views.mask(np.random.default_rng(0)))  # (N,)
        batch["mask"] = torch.zeros(rows, mask.size, dtype=torch.bool)
        batch["num_masked"] = int(mask.sum())
    batch["noise"] = torch.zeros(rows, dtype=torch.int64)
    batch["weight"] = torch.ones(rows)
    batch["labels"] = torch.zeros(rows, dtype=torch.int64)
    if built.views.label_maps:
        batch["label_maps"] = torch.zeros(rows, *built.views.sizes[0], dtype=torch.int64)  # (B, H, W)
    batch["epoch"] = 0
    return batch


def _note_tokens(built: build.Built, batch: Batch, tokens: dict[str, int], inner: Inner) -> None:
    """Note the tokens of an image: of the mask, and, while the step runs, those that leave the encoder and its rest."""
    if built.encoder is None:
        tokens["codes"] = math.prod(built.objective.tokenizer.grid(built.views.sizes[0]))
        return
    tokens["patches"] = math.prod(built.encoder.grid(built.views.sizes[0]))
    if "mask" in batch:
        tokens["masked"] = batch["num_masked"]
        tokens["visible"] = tokens["patches"] - tokens["masked"]

    def note(_module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 3 and len(inputs[0]) == len(batch["images"]):
            number = inputs[0].shape[1]  # of (B, N, D)
            if inner.inside:
                tokens["in the encoder"] = number  # the last: patches may be dropped on the way
            else:
                tokens[f"in the {OUTSIDE}"] = max(tokens.get(f"in the {OUTSIDE}", 0), number)

    for module in built.objective.modules():
        module.register_forward_pre_hook(note)


def _precision(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _fake(network: nn.Module) -> None:
    """Replace the tensors of a network by fake ones of the same shape and type. A shared tensor stays shared."""
    made: dict[Tensor, Any] = {}  # by identity

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for module in network.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor not in made:
                made[tensor] = fake(tensor)
            setattr(module, name, made[tensor])


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
