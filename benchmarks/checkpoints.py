"""How long the loop stands still for a checkpoint: written in the background, waited for, and by torch's own savers.

    python benchmarks/checkpoints.py --model vit_small_patch16_224 --rounds 5

The state is that of a run with AdamW and averaged weights: four times the model, in float32. Ways take turns in one
process. `stands still` is the time until the loop has its thread back, and how much of it was computing; `until
written` the time until the checkpoint is committed (ours: hashed, synced, renamed and read again). Between the two,
steps of a small model run in the loop; the median and the longest of them stand beside those without a save.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from mim.saving.saver import Saver

Ended = Callable[[], bool]
Start = Callable[[int], Ended]


def state_of(model: str) -> dict[str, Tensor]:
    """Tensors of a training state: weights, both moments of Adam, average."""
    weights = timm.create_model(model, num_classes=0).state_dict()
    parts = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "ema")
    return {f"{part}.{name}": torch.rand_like(value) for part in parts for name, value in weights.items()}


def ways(state: dict[str, Tensor], folder: Path) -> dict[str, Start]:
    """Start a save; what is returned tells whether it ended, and fails if the save failed."""
    saver = Saver(folder / "ours", None, keep=2)

    def background(step: int) -> Ended:
        saver.save(step, state, {})
        return lambda: saver.check() or saver._save is None

    def waited(step: int) -> Ended:
        saver.save(step, state, {}, wait=True)
        return lambda: True

    def torch_async(step: int) -> Ended:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        future = dcp.async_save(state, checkpoint_id=folder / "dcp", no_dist=True)
        return lambda: future.done() and future.result() is not None  # type: ignore[union-attr]

    def torch_save(step: int) -> Ended:
        torch.save(state, folder / "state.pt")
        return lambda: True

    return {
        "ours, in the background": background,
        "ours, waited for": waited,
        "dcp.async_save": torch_async,
        "torch.save (no hash, no sync)": torch_save,
    }


def stepper() -> Callable[[], float]:
    """One step of a small model on the CPU; returns its seconds."""
    model = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
    images = torch.rand(64, 384)

    def step() -> float:
        began = time.perf_counter()
        model(images).square().mean().backward()
        return time.perf_counter() - began

    return step


def measure(start: Start, number: int, step: Callable[[], float]) -> dict[str, float]:
    """Save once, and run steps in the loop until the save ended, ten at least."""
    began, cpu = time.perf_counter(), time.thread_time()
    ended = start(number)
    still, cpu = time.perf_counter() - began, time.thread_time() - cpu
    written, times = None, []
    while written is None or len(times) < 10:
        if written is None and ended():
            written = time.perf_counter() - began
        times.append(step())
    return {
        "stands still, s": still,
        "of it CPU, s": cpu,
        "until written, s": written,
        "step, ms": 1e3 * statistics.median(times),
        "longest step, ms": 1e3 * max(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    state, step = state_of(args.model), stepper()
    found: dict[str, list[dict[str, float]]] = {}
    try:
        starts = {"no save": lambda _number: lambda: True, **ways(state, folder)}
        for number in range(args.rounds + 1):
            for name, start in starts.items():
                values = measure(start, number + 1, step)
                print(number, name, {key: round(value, 3) for key, value in values.items()}, file=sys.stderr)
                if number:  # the first round gets memory
                    found.setdefault(name, []).append(values)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(value.numel() * value.element_size() for value in state.values())
    print(f"{args.model}: {len(state)} tensors, {size / 1e6:.0f} MB, {args.rounds} rounds; median (min - max)")
    columns = list(next(iter(found.values()))[0])
    print(f"| way | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, rows in found.items():
        cells = []
        for column in columns:
            values = sorted(row[column] for row in rows)
            cells.append(f"{statistics.median(values):.3f} ({values[0]:.3f} - {values[-1]:.3f})")
        print(f"| {name} | {' | '.join(cells)} |")
    if args.out:
        args.out.write_text(json.dumps({"bytes": size, "rounds": found}, indent=1))


if __name__ == "__main__":
    main()
