"""Tensors of all ranks, copied in a moment and written afterwards, in the layout of `torch.distributed.checkpoint`.

Its Hugging Face writer (torch 2.11 to 2.15) deals out replicated tensors, keeps shards apart and writes safetensors
files that its reader fits to any other number of ranks. Here it works in two halves. `take` plans together with all
ranks and copies what this rank will write: to pinned memory from a GPU, to other memory from a CPU. `write`
needs nobody else, so it may run in a thread while the optimizer changes the tensors. Every file is hashed as it is
written and never read again for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mim.saving import save_stages

FILE_BYTES = 64 << 20  # about what a rank puts into one file: safetensors copies a file twice, holding Python's lock
BLOCK = 16 << 20  # bytes that are hashed and written at once


class Snapshot:
    """This rank's part of a dict of tensors, as it was when `take` returned. One is reused from save to save."""

    def __init__(self) -> None:
        self._copies: dict[MetadataIndex, Tensor] = {}  # kept: pinned memory is slow to get, other memory to touch
        self._writer: _Writer | None = None

    def take(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Copy what this rank will write into `folder` (called on all ranks)."""
        self._writer = _Writer(folder, _files_of(tensors), self._copies)
        with quiet():
            dcp.save(tensors, storage_writer=self._writer, no_dist=not dist.is_initialized())
        self._copies = self._writer.copies
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def write(self) -> dict[str, dict[str, Any]]:
        """Write the copies, alone; returns size in bytes and sha256 of each file, by name. Raises OSError."""
        assert self._writer is not None, "nothing was taken"
        return self._writer.write()


class _Writer(HuggingFaceStorageWriter):
    """The Hugging Face writer with its planning and its writing apart."""

    def __init__(self, folder: Path, files: dict[str, int], buffers: dict[MetadataIndex, Tensor]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self.per_thread_copy_ahead = 0  # the copies are on the CPU: no stream, which would be of GPU 0 in a new thread
        self.fs = self.hashed = _HashingFiles()
        self.buffers = buffers
        self.copies: dict[MetadataIndex, Tensor] = {}
        self._plan: SavePlan | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Take the copies that the plan wants of this rank; `dcp.save` believes that they are written."""
        self._plan = plan
        for item in plan.items:
            self.copies[item.index] = _copy(cast(Tensor, planner.resolve_data(item)), self.buffers.get(item.index))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write no index: a reader asks the files themselves."""

    def resolve_data(self, item: WriteItem) -> Tensor:
        """What a planner is asked for, answered from the copies."""
        return self.copies[item.index]

    def write(self) -> dict[str, dict[str, Any]]:
        assert self._plan is not None
        super().write_data(self._plan, cast(SavePlanner, self)).wait()
        return self.hashed.files


class _HashingFiles(FileSystem):
    """Local files; size and hash of each one that was written are in `files`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        with Path(path).open(mode) as raw:
            stream = _Hashed(raw)
            yield cast(io.IOBase, stream)
        self.files[Path(path).name] = {"size": stream.size, "sha256": stream.digest.hexdigest()}


class _Hashed:
    """A file that is written from its beginning to its end, in blocks, at least two of them."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.size, self.digest = raw, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        block = min(BLOCK, (len(view) + 1) // 2) or 1
        for start in range(0, len(view), block):
            if start == block:
                self.raw.flush()
                save_stages.reached("within-tensors")
            piece = view[start : start + block]
            self.digest.update(piece)
            self.raw.write(piece)
        self.size += len(view)
        return len(view)

    def __getattr__(self, name: str) -> Any:  # tell, flush, fileno, close
        return getattr(self.raw, name)


def _copy(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """The tensor on the CPU, in memory of its own; from a GPU it is there after the next synchronisation."""
    tensor = tensor.detach()
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the whole tensors, whoever holds their parts; equal on all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number of the file, counted from 1, that each tensor goes to; every rank has its own files of these numbers."""
    room = FILE_BYTES * (dist.get_world_size() if dist.is_initialized() else 1)
    files, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > room:
            number, used = number + 1, 0
        files[name], used = number, used + size
    return files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the remark that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
