"""A step of BEiT with its tokenizer in the loop against a step with cached codes, in interleaved rounds.

Networks are those of the recipes with random weights, which cost what trained ones do; images are noise. In each round
every variant makes one step (codes, forward, backward, AdamW) on the same batch. A ratio is the median over rounds of
the ratio of the two steps of a round. The loader's work is left out: it is done by other processes.

    base    beit_vitb16_in1k: ViT-B/16 at 224 px, DALL-E's dVAE at 112 px, 8192 codes
    tiny    beit_vittiny_cifar10: ViT-Tiny/4 at 32 px, dvae_small_cifar10, 512 codes

python benchmarks/tokens.py --cases base tiny --out tokens.json
python benchmarks/tokens.py --cases base --rows 32 --precision bf16 --rounds 20
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim import build, config, frozen_networks, job, optim
from mim.contracts import Batch

CASES = {"base": ("beit_vitb16_in1k", 4), "tiny": ("beit_vittiny_cifar10", 64)}  # recipe, images of a step
CACHED = "cached codes"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {arguments.threads} CPU threads, {arguments.precision}, torch {torch.__version__}")
    results = {}
    for case in arguments.cases:
        recipe, rows = CASES[case]
        results[case] = measure(recipe, arguments.rows or rows, device, arguments)
    if arguments.out:
        about = {"date": time.strftime("%Y-%m-%d"), "device": name, "threads": arguments.threads}
        about |= {"torch": str(torch.__version__), "precision": arguments.precision, "rounds": arguments.rounds}
        arguments.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", type=int, help="images of a step; default: 4 (base), 64 (tiny)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--precision", choices=["no", "bf16"], default="no", help="of the encoder; the tokenizer: float32"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cpu", action="store_true", help="although there is a GPU")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def measure(recipe: str, rows: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of a recipe; print and return the figures."""
    variants = steps(recipe, rows, device, torch.bfloat16 if arguments.precision == "bf16" else None)
    for step in variants.values():
        seconds(step, device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, step in variants.items():
            times[name].append(seconds(step, device))
    first = next(iter(times.values()))
    ratio = statistics.median(a / b for a, b in zip(first, times[CACHED], strict=True))
    print(f"\n{recipe}, {rows} images a step, {arguments.rounds} rounds")
    for name, found in times.items():
        rate = rows / statistics.median(found)
        print(f"  {name:24}{1000 * statistics.median(found):10.1f} ms ({1000 * min(found):.1f} - "
              f"{1000 * max(found):.1f}){rate:10.1f} images/s")  # fmt: skip
    print(f"  cached codes are {ratio:.2f} times as fast; the tokenizer takes {100 * (1 - 1 / ratio):.0f} % of a step")
    return {"recipe": recipe, "rows": rows, "ratio": ratio, "tokenizer_share": 1 - 1 / ratio, "seconds": times}


def steps(recipe: str, rows: int, device: torch.device, dtype: torch.dtype | None) -> dict[str, Callable[[], None]]:
    """One training step of a recipe with its tokenizer in the loop, and with codes that are there."""
    torch.manual_seed(0)
    cfg = config.typed(job.Config, config.read(recipe))
    built = build.build(config.plain(cfg), load_frozen=False)
    objective, tokenizer = built.objective.to(device).train(), built.frozen["tokenizer"].to(device)
    optimizer = optim.create(objective, cfg.optim)
    batch = noise(built, rows, device)
    frozen_networks.write_targets({"tokenizer": tokenizer}, batch)
    codes = batch.pop("codes")

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = objective(batch, torch.zeros((), device=device))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def in_the_loop() -> None:
        fresh = dict(batch)
        frozen_networks.write_targets({"tokenizer": tokenizer}, fresh)
        step(fresh)

    return {"tokenizer in the loop": in_the_loop, CACHED: lambda: step({**batch, "codes": codes})}


def noise(built: build.Built, rows: int, device: torch.device) -> Batch:
    """A batch of noise with the recipe's masks."""
    channels = built.views.data.channels
    sizes = dict(zip(("images", "tokenizer_images"), built.views.sizes))  # noqa: B905  the second is optional
    batch: Batch = {key: torch.rand(rows, channels, *size, device=device) for key, size in sizes.items()}
    assert built.views.mask is not None
    masks = [torch.as_tensor(built.views.mask(np.random.default_rng(row))) for row in range(rows)]
    batch["mask"] = torch.stack(masks).to(device)  # (B, N)
    batch["num_masked"] = int(masks[0].sum())
    batch["noise"] = torch.arange(rows, device=device)
    return batch


def seconds(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
