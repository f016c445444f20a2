"""Whatever varies with time is a pure function of the optimizer step: nothing to checkpoint, nothing to replay."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

UNITS = ("steps", "epochs", "images")


def to_steps(duration: str | int, *, batch_size: int, num_images: int, where: str) -> int:
    """Turn "300 epochs", "5000 steps" or "1000000 images" into optimizer steps (rounded up); a bare integer is steps.

    An epoch is `num_images` draws, so its length depends on neither ranks nor workers.
    """
    match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(duration).lower())
    unit = {u.removesuffix("s"): u for u in UNITS}.get(match[2].removesuffix("s")) if match and match[2] else "steps"
    if not match or unit is None:
        raise ValueError(
            f"{where}={duration!r} is not a duration; write e.g. '300 epochs', '5000 steps' or '1e6 images'"
        )
    amount = float(match[1].replace("_", ""))
    images = {"steps": amount * batch_size, "epochs": amount * num_images, "images": amount}[unit]
    return math.ceil(round(images / batch_size, 6))


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, constant afterwards."""
    fraction = min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps`, constant afterwards."""
    fraction = min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0
    return start + (end - start) * fraction


def constant(step: int, *, start: float, end: float, steps: int) -> float:
    """`start` for ever; `end` and `steps` are accepted so that the three are interchangeable."""
    return start


SHAPES = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "multistep": constant,  # between milestones
}


def multistep(step: int, *, start: float, factor: float, milestones: Sequence[int]) -> float:
    """`start`, multiplied by `factor` at every milestone (a step) that has been reached."""
    return start * factor ** sum(step >= milestone for milestone in milestones)


def warmup_then(
    shape: str, step: int, *, peak: float, end: float, warmup_steps: int, steps: int, start: float = 0.0
) -> float:
    """Rise linearly from `start` to `peak` over the warm-up, then follow `shape` to `end` at the last step.

    The first update already moves: step s of the warm-up has come (s + 1) / warmup_steps of the way, so its last step
    has the peak. Published programs are one step behind: their first update has `start`.
    """
    if step < warmup_steps:
        return linear(step + 1, start=start, end=peak, steps=warmup_steps)
    return SHAPES[shape](step - warmup_steps, start=peak, end=end, steps=max(steps - 1 - warmup_steps, 0))
