"""The numerics guard: what a bad step must not touch, and when the training has gone wrong.

A step whose gradient is not finite is skipped on the device (mim/optim.py). It changes nothing but the number of the
step: buffers that the forward pass or `after_step` moved (codebooks, running statistics) are put back, the average of
the weights stays, and what the objective reported is left out of the log. The host learns of it when it logs.

Two things then make an incident: `bad_steps` skipped steps in a row, or a spike. A spike is a mean loss of a log
interval that lies above the median of the `window` intervals before by all of: `spike` times their spread (the median
absolute deviation, scaled to a normal's standard deviation), a tenth of the median, and a tenth of what has been
learned (the first interval's loss minus the median). It is looked for after the warm-up. A loss that is not finite
although the gradient is, is one too. What follows an incident is in mim/rollback.py.

Returning to a checkpoint of before and leaving out the batches since is what PaLM's training did by hand (Chowdhery et
al. 2022, arXiv 2204.02311, section 5.1). Deliberately different: the rate is lowered, too.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mim import ranks
from mim.config import ConfigError

RATE_FACTOR = 0.5  # of the learning rate after a rollback
MAX_ROLLBACKS = 3  # of a run; the next incident ends it
SCALE_SEARCH = 16  # steps that a GradScaler skips from its first scale, 2**16, down to 1: no fault of the run
NORMAL = 1.4826  # standard deviations of a normal per median absolute deviation
SHARE = 0.1  # of the median, and of what has been learned, that a spike undoes at least
REMEMBERED = 100  # steps whose keys are kept for a report


@dataclass
class Config:
    """Section `train.guard`: when a run returns to its last good checkpoint."""

    bad_steps: int = 10  # skipped steps in a row
    spike: float | None = 20.0  # deviations of the loss above its median; null: no spike is looked for
    window: int = 20  # log intervals that the median is taken over

    def __post_init__(self) -> None:
        if self.bad_steps < 1:
            raise ConfigError(f"train.guard.bad_steps={self.bad_steps} must be at least 1")
        if self.spike is not None and self.spike <= 0:
            raise ConfigError(f"train.guard.spike={self.spike} must be above 0, or null to look for no spike")
        if self.window < 3:
            raise ConfigError(f"train.guard.window={self.window} must be at least 3 log intervals")


@dataclass
class Step:
    """What is remembered of one step."""

    number: int
    keys: list[str]  # of this rank's samples
    finite: Tensor | None = None  # 0-d bool
    grad_norm: Tensor | None = None  # 0-d


@dataclass(frozen=True)
class Incident:
    """The training has gone wrong."""

    step: int  # at which it was found
    first: int  # the first bad step: a checkpoint of an earlier one is good
    reason: str


@dataclass
class Guard:
    """Watches the steps of a run; its state is part of a checkpoint's, so a resumed run finds what the other would."""

    cfg: Config
    quiet_until: int = 0  # steps of the warm-up
    scaled: bool = False  # there is a GradScaler, which finds its scale by skipping steps
    losses: deque[float] = field(default_factory=deque)  # means of the last log intervals
    first_loss: float | None = None  # of the first one
    logged: int = 0  # step of the last log
    in_row: int = 0  # skipped steps up to the last that was read
    untold: list[int] = field(default_factory=list)  # skipped steps that the log does not have yet
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _unread: list[tuple[int, Tensor]] = field(default_factory=list)  # steps whose outcome the host does not know yet

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses = deque(state.get("losses", ()), maxlen=self.cfg.window)
        self.first_loss = state.get("first_loss")
        self.logged, self.in_row = state.get("logged", 0), state.get("in_row", 0)
        self.untold = list(state.get("untold", ()))

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint. One host sync."""
        self._read()
        return {
            "losses": list(self.losses),
            "first_loss": self.first_loss,
            "logged": self.logged,
            "in_row": self.in_row,
            "untold": self.untold,
        }

    def see(self, number: int, keys: Iterable[str]) -> None:
        """Note the samples of a micro-batch of a step."""
        if not self.steps or self.steps[-1].number != number:
            self.steps.append(Step(number, []))
        self.steps[-1].keys += keys

    def close(self, finite: Tensor, grad_norm: Tensor) -> None:
        """Note how the step went that was seen last; both are 0-d and stay on the device."""
        step = self.steps[-1]
        step.finite, step.grad_norm = finite, grad_norm
        self._unread.append((step.number, finite))  # without its keys: a log interval may be long

    def skipped(self) -> list[int]:
        """The skipped steps since the last call, ascending. One host sync."""
        self._read()
        told, self.untold = self.untold, []
        return told

    def judge(self, step: int, loss: float | None) -> Incident | None:
        """Whether the training has gone wrong, decided by the main rank for all; called on all ranks at a log step.

        `loss` is the interval's mean over the steps that were not skipped, None if all were.
        """
        self._read()
        limit = self.cfg.bad_steps + (SCALE_SEARCH if self.scaled else 0)
        found = None
        if self.in_row >= limit:
            reason = f"the gradient of {self.in_row} steps in a row is not finite"
            found = Incident(step, step - self.in_row + 1, reason)
        elif loss is not None and (spike := self._spike(step, loss)):
            found = Incident(step, self.logged + 1, spike)
        first = int(ranks.told_by(0, torch.tensor(found.first if found is not None else 0)))
        if first:
            return found or Incident(step, first, "the first rank found the training gone wrong")
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.losses.append(loss)
        self.logged = step
        return None

    def _spike(self, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.cfg.spike is None or len(self.losses) < self.cfg.window or step <= self.quiet_until:
            return None
        assert self.first_loss is not None
        median = statistics.median(self.losses)
        spread = NORMAL * statistics.median(abs(value - median) for value in self.losses)
        limit = median + max(self.cfg.spike * spread, SHARE * abs(median), SHARE * (self.first_loss - median))
        if loss <= limit:
            return None
        return f"the loss is {loss:.4g}, after a median of {median:.4g} and a limit of {limit:.4g}"

    def _read(self) -> None:
        """Let the host learn how the steps went."""
        if not self._unread:
            return
        numbers, outcomes = zip(*self._unread, strict=True)
        for number, finite in zip(numbers, torch.stack(outcomes).tolist(), strict=True):
            self.in_row = 0 if finite else self.in_row + 1
            if not finite:
                self.untold.append(number)
        self._unread = []


class Held:
    """The saved buffers of an objective as they were before a step, to put back when the step is skipped."""

    def __init__(self, objective: nn.Module) -> None:
        saved = objective.state_dict().keys()
        self.buffers = [buffer for name, buffer in objective.named_buffers() if name in saved]
        self.copies = [torch.empty_like(buffer) for buffer in self.buffers]

    @torch.no_grad()
    def hold(self) -> None:
        """Copy them."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.buffers)

    @torch.no_grad()
    def put_back(self, finite: Tensor) -> None:
        """Undo what moved them since, unless the step was finite (0-d bool); no host sync."""
        for copy, buffer in zip(self.copies, self.buffers, strict=True):
            torch.where(finite, buffer, copy, out=buffer)


class Average:
    """Averages of tensors that move towards the present values by a rate; not at all in a step that is skipped.

    mean - rate * (mean - value) is a step of SGD that climbs the gradient `value` with a weight decay of 1. torch's
    fused SGD takes it for all tensors in one pass without a copy of them, and a flag on the device holds it back.
    """

    def __init__(self, moving: Sequence[Tensor], present: Sequence[Tensor], rate: float) -> None:
        means = [mean.detach() for mean in moving]  # of the same memory: a gradient does not belong to a checkpoint
        for mean, value in zip(means, present, strict=True):
            mean.grad = value.detach()  # training changes it in place
        self._sgd: Any = torch.optim.SGD(means, lr=rate, weight_decay=1.0, maximize=True, fused=True)

    def move(self, finite: Tensor) -> None:
        """Take a step, unless it is not finite (0-d bool); no host sync."""
        self._sgd.found_inf = (~finite).float()
        self._sgd.step()
