"""Variants in turn, round by round, and what their times come to: medians, spread, ratios and the share of a peak.

Variants of one process take turns, so that whatever else the machine does disturbs all of them alike. A ratio is the
median over rounds of the ratio inside a round. MFU, the model FLOPs utilisation of PaLM (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B), is measured against matrix products that take their turn in every round, too: not
against a data sheet.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
LEAST = 0.05  # seconds that one measurement of the peak takes at least
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")  # that decide about bf16 on a CPU

Seconds = dict[str, list[float]]  # of each variant, one number per round


# ---- rounds --------------------------------------------------------------------------------------


def interleaved(
    variants: dict[str, Callable[[], float]], rounds: int, *, tell: Callable[[str], None] = lambda line: None
) -> Seconds:
    """Run every variant once per round, in their order; each returns what it measured."""
    found: Seconds = {name: [] for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            found[name].append(run())
        latest = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items())
        tell(f"round {number + 1} of {rounds}: {latest}")
    return found


@dataclass(frozen=True)
class Spread:
    """A figure over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def throughput(seconds: Sequence[float], images: int) -> Spread:
    """Images per second of rounds that took `seconds` for so many images each."""
    return Spread.of([images / value for value in seconds])


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times as fast `faster` is, by the seconds of the same rounds."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


def mfu(flops: float, seconds: Sequence[float], peak: Sequence[float]) -> Spread:
    """The share of the peak (FLOP/s of each round) that a variant reaches with `flops` of useful work per round."""
    return Spread.of([flops / (value * most) for value, most in zip(seconds, peak, strict=True)])


# ---- peak ----------------------------------------------------------------------------------------


class Peak:
    """The fastest matrix product at a precision: (M, K) x (K, N), of sizes like the model's and of a large square."""

    def __init__(self, device: torch.device, precision: str, shapes: Sequence[tuple[int, int, int]]) -> None:
        self.device = device
        self.pairs = []
        for m, k, n in shapes:
            left = torch.randn(m, k, device=device, dtype=DTYPES[precision])
            right = torch.randn(k, n, device=device, dtype=DTYPES[precision])
            self.pairs.append((left, right, torch.empty(m, n, device=device, dtype=DTYPES[precision])))

    def __call__(self) -> float:
        """FLOP/s of the fastest of the sizes."""
        return max(self._speed(*pair) for pair in self.pairs)

    def _speed(self, left: Tensor, right: Tensor, out: Tensor) -> float:
        torch.mm(left, right, out=out)  # libraries choose and warm up
        count, took = 1, self._seconds(left, right, out, 1)
        while took < LEAST:
            count = max(2 * count, int(count * 1.2 * LEAST / max(took, 1e-9)))
            took = self._seconds(left, right, out, count)
        return 2 * left.shape[0] * left.shape[1] * right.shape[1] * count / took

    def _seconds(self, left: Tensor, right: Tensor, out: Tensor, count: int) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right, out=out)
        synchronize(self.device)
        return time.perf_counter() - began


def peak_shapes(device: torch.device, tokens: int, width: int) -> list[tuple[int, int, int]]:
    """Products as an MLP of the model has them, there and back, and a square one that fills the device."""
    side = 8192 if device.type == "cuda" else 2048
    return [(tokens, width, 4 * width), (tokens, 4 * width, width), (side, side, side)]


# ---- phases of a step ----------------------------------------------------------------------------


class Phases:
    """Seconds of the parts of steps: by the host's clock on a CPU, by events on a GPU.

    Events stand in the stream between the kernels and are read after the last step, so nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """A step begins here."""
        self.mark("")

    def mark(self, name: str) -> None:
        """What has passed since the last mark belongs to `name`."""
        if self.on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((name, now))

    def read(self) -> dict[str, float]:
        """Total seconds by name; the marks begin anew. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                passed = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
                found[name] = found.get(name, 0.0) + passed
        self._marks = []
        return found


# ---- machine -------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def device_of(cpu: bool = False) -> torch.device:
    """The device of this machine that steps run on."""
    if cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


def machine(device: torch.device, packages: Sequence[str] = ("torch", "timm")) -> dict[str, Any]:
    """What figures depend on: processor and its instructions for bf16, threads, allocator, versions, date."""
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        flags = lines.get("flags", lines.get("Features", "")).split()
        facts["cpu"] = lines.get("model name", facts["cpu"])
        facts["instructions"] = [name for name in INSTRUCTIONS if name in flags]
    facts |= {"cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "device": str(device)}
    facts["allocator"] = {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts | {"python": platform.python_version(), "versions": versions(packages)}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def resident() -> int:
    """Bytes of the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write figures with an end of line."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def say(line: str) -> None:
    """A line of progress, beside the table that goes to the standard output."""
    print(line, file=sys.stderr, flush=True)
