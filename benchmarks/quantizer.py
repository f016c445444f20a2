"""One training step of the codebook (nearest codes, averages, revival) against vector-quantize-pytorch's.

    python benchmarks/quantizer.py --vectors 50000 --codes 8192 --width 32 --rounds 5

Times are of rounds that take turns in one process; peak memory is that of a process of its own, above what it held
before the step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def steps(num_vectors: int, num_codes: int, width: int) -> dict[str, Callable[[], object]]:
    """One step of each implementation on the same vectors: cosine codebook, averages of 0.99, dead codes revived."""
    from vector_quantize_pytorch import VectorQuantize

    from tokenizer.codebook import Codebook

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = num_vectors // 250  # as 250 images
    vectors = torch.randn(250, rows, width, device=device, requires_grad=True)
    noise = torch.arange(250, device=device)
    ours = Codebook(num_codes, width).to(device).train()
    theirs = VectorQuantize(
        width,
        codebook_size=num_codes,
        decay=0.99,
        use_cosine_sim=True,
        threshold_ema_dead_code=1,
        commitment_weight=1.0,
    )
    theirs = theirs.to(device).train()

    def own() -> None:
        found, _, commitment = ours(vectors, noise)
        (found.sum() + commitment.mean()).backward()
        ours.update()

    def usual() -> None:
        found, _, loss = theirs(vectors)
        (found.sum() + loss.sum()).backward()

    return {"mimstream": own, "vector-quantize-pytorch": usual}


def timed(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(step: Callable[[], object]) -> float:
    """MiB that a step needs above what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=50_000)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.vectors, args.codes, args.width)
    if args.peak:
        print(peak(steps(*sizes)[args.peak]))
        return
    sizes_given = [f"--{key}={getattr(args, key)}" for key in ("vectors", "codes", "width")]
    memory = {}  # first: a process inherits the peak of the one that starts it
    for name in ("mimstream", "vector-quantize-pytorch"):
        command = [sys.executable, __file__, *sizes_given, "--peak", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = steps(*sizes)
    for step in found.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, step in found.items():
            times[name].append(timed(step))
    usual = statistics.median(times["vector-quantize-pytorch"])
    results = {}
    for name, values in times.items():
        results[name] = {"seconds": values, "ratio": usual / statistics.median(values), "peak_mib": memory[name]}
        print(
            f"{name:26}{statistics.median(values):8.3f} s ({min(values):.3f} - {max(values):.3f})"
            f"{results[name]['ratio']:8.2f}x{memory[name]:10.0f} MiB"
        )
    if args.out:
        args.out.write_text(json.dumps({"sizes": sizes, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
