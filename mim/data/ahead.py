"""Batches on their way to a GPU while it computes the step before: the copy has a stream of its own.

Between two log steps nothing waits for the device, so the host is ahead of it: when the loop asks for a batch, the
device has most of the step before still to do. On the stream of that step the copy would stand behind it; here it
starts at once, from the loader's pinned memory, and what reads the batch waits for it on the device.

No batch is asked for before its step, so position, journal and a return to a checkpoint know nothing of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mim.contracts import Batch


class Ahead:
    """Copies batches to a device; on a CPU there is nothing to copy, and a batch passes as it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device, to be read on the current stream; no host sync."""
        if self.stream is None:
            return batch
        reader = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        reader.wait_stream(self.stream)
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(reader)  # the other stream, whose memory it is, takes it back after this one
        return moved
