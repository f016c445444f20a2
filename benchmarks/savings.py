"""What each saving in the arithmetic of the step is worth: steps without it against steps as they are, interleaved.

In each round one training takes a step as it is, and then one with each saving undone. A ratio is the median over
rounds of the time without the saving over the time with it: above 1 it pays. The time is what one core computes, which
other work beside it disturbs less than the clock. The allocator's setting holds for a whole process, so `malloc`
compares two processes that take turns.

    python -m benchmarks.savings mae-bf16 --batch-size 8 --rounds 5
    python -m benchmarks.savings malloc
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rounds, steps
from mim import last_block, launching
from mim.encoders import beit as beit_encoder
from mim.objectives import beit
from mim.patches import gather

JOBS = {
    "mae-bf16": ("mae", "bf16"),
    "mae-fp32": ("mae", "no"),
    "beit-bf16": ("beit-codes", "bf16"),
    "beit-fp32": ("beit-codes", "no"),
}
AS_IT_IS = "as it is"


# ---- the step without a saving -------------------------------------------------------------------


@contextmanager
def the_other_attention(objective: Any) -> Iterator[None]:
    """Fused where three steps are taken, and the other way round."""
    found = [module for module in objective.modules() if hasattr(module, "fused_attn")]
    for module in found:
        module.fused_attn = not module.fused_attn
    yield
    for module in found:
        module.fused_attn = not module.fused_attn


def stem_of_all_patches(objective: Any) -> Any:
    """The stem runs over the whole image, then patches are dropped."""
    return mock.patch.object(objective.encoder, "stem_is_linear", False)


def targets_of_all_patches(objective: Any) -> Any:
    """All targets are made, then those of the masked patches picked."""
    whole = objective.target
    return mock.patch.object(objective, "target", lambda images, ids: tuple(gather(t, ids) for t in whole(images)))


def bias_in_float32(objective: Any) -> Any:
    """The position bias is not cast, so the scores become float32 with it."""
    return mock.patch.object(beit_encoder, "as_scores", lambda bias: bias)


def whole_last_block(objective: Any) -> Any:
    """The last block computes all tokens, then those of masked patches are picked."""
    last = objective.encoder.vit.blocks[-1]
    return mock.patch.object(last, "forward", MethodType(last_block._whole, last))


def transposed_logits(objective: Any) -> Any:
    """The cross-entropy over codes that stand in the second dimension, in a copy in float32."""

    def code_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(dim=1)
        return loss, (logits.detach().argmax(dim=-1) == codes).float().mean(dim=1)

    return mock.patch.object(beit, "code_loss", code_loss)


WITHOUT: dict[str, dict[str, Callable[[Any], Any]]] = {
    "mae": {
        "the other attention": the_other_attention,
        "stem of all patches": stem_of_all_patches,
        "targets of all patches": targets_of_all_patches,
    },
    "beit-codes": {
        "the other attention": the_other_attention,
        "whole last block": whole_last_block,
        "position bias in float32": bias_in_float32,
        "transposed logits": transposed_logits,
    },
}


# ---- rounds --------------------------------------------------------------------------------------


def training(job: str, rows: int, size: str) -> steps.Training:
    """A training of a job on one core of the CPU."""
    torch.set_num_threads(1)
    name, precision = JOBS[job]
    return steps.Training(steps.work(name, size, [], precision=precision, cpu=True), rows=rows)


def seconds(run: steps.Training, context: Any = None) -> float:
    """One step's."""
    with context or nullcontext():
        began = time.process_time()
        run.step()
        return time.process_time() - began


def savings(job: str, rows: int, size: str, count: int) -> rounds.Seconds:
    """Seconds of the step as it is, and without each saving."""
    run = training(job, rows, size)
    objective = run.built.objective
    variants = {AS_IT_IS: partial(seconds, run)} | {
        name: lambda undo=undo: seconds(run, undo(objective)) for name, undo in WITHOUT[JOBS[job][0]].items()
    }
    for warm_up in variants.values():
        warm_up()
    return rounds.interleaved(variants, count, tell=rounds.say)


def steps_in_turn(pipe: Any, keeps: bool, job: str, rows: int, size: str) -> None:
    """A process that takes a step whenever it is told to, and tells its seconds and its memory in MiB."""
    if not keeps:
        launching.allocator.keep_freed_memory = lambda: False
    run = training(job, rows, size)
    while pipe.recv():
        pipe.send((seconds(run), rounds.resident() >> 20))


def malloc(rows: int, size: str, count: int, job: str = "mae-bf16") -> rounds.Seconds:
    """Seconds of the step in a process that keeps freed memory, and in one with glibc's default."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for name, keeps in ((AS_IT_IS, True), ("glibc's default", False)):
        pipes[name], there = spawn.Pipe()
        spawn.Process(target=steps_in_turn, args=(there, keeps, job, rows, size), daemon=True).start()

    def step(pipe: Any) -> float:
        pipe.send(True)
        took, resident = pipe.recv()
        rounds.say(f"{resident} MiB")
        return took

    variants = {name: partial(step, pipe) for name, pipe in pipes.items()}
    for warm_up in variants.values():
        warm_up()
        warm_up()
    found = rounds.interleaved(variants, count, tell=rounds.say)
    for pipe in pipes.values():
        pipe.send(False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=[*JOBS, "malloc"])
    parser.add_argument("--size", default="base", choices=["tiny", *steps.SIZES])
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="after a warm-up (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    rows, size, count = arguments.batch_size, arguments.size, arguments.rounds
    found = malloc(rows, size, count) if arguments.job == "malloc" else savings(arguments.job, rows, size, count)
    print(f"{arguments.job} {size}, {rows} images, one core")
    print(f"{'step':<26} {'s: median (min-max)':>24} {'ratio (min-max)':>22}")
    for name, values in found.items():
        took, against = rounds.Spread.of(values), rounds.ratio(values, found[AS_IT_IS])
        spread = f"{took.median:.3f} ({took.low:.3f}-{took.high:.3f})"
        print(f"{name:<26} {spread:>24} {f'{against.median:.3f} ({against.low:.3f}-{against.high:.3f})':>22}")
    if arguments.json:
        device = torch.device("cpu")
        content = {"job": arguments.job, "size": size, "batch_size": rows, "machine": rounds.machine(device)}
        rounds.write_json(arguments.json, content | {"seconds": found})


if __name__ == "__main__":
    main()
