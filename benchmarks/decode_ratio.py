"""What partial decoding saves: time of MAE's training step with decode_ratio 1, 0.5 and 0.25, interleaved.

ViT-B/16 on 224 px with the published decoder (512 wide, 8 deep, 16 heads) and 75 % masked; random pixels. A step is
forward, backward and AdamW. On a GPU in bfloat16; else in float32 on one core, whose seconds of computing are counted,
so that other work beside it disturbs less.

python benchmarks/decode_ratio.py --batch-size 8 --rounds 5 --json decode_ratio.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from mim import masking, optim
from mim.encoders import vit
from mim.objectives import mae

RATIOS = (1.0, 0.5, 0.25)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch-size", type=int, default=8, help="images per step (default: %(default)s)")
parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds after a warm-up (default: %(default)s)")
parser.add_argument("--json", type=Path, help="file for the figures")
arguments = parser.parse_args()

device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
assert device is not None
on_gpu = device.type != "cpu"
clock = time.perf_counter if on_gpu else time.process_time
torch.set_num_threads(1)


def a_step(objective: mae.MAE, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    """Seconds of one update."""
    began = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        loss = objective(batch, torch.tensor(0.0))["loss"].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if on_gpu:
        torch.accelerator.synchronize()
    return clock() - began


torch.manual_seed(0)
masks = np.stack([masking.random((14, 14), np.random.default_rng(i)) for i in range(arguments.batch_size)])
batch = {
    "images": torch.rand(arguments.batch_size, 3, 224, 224, device=device),
    "mask": torch.from_numpy(masks).to(device),
    "num_masked": int(masks[0].sum()),
    "noise": torch.arange(arguments.batch_size, device=device),
}
jobs = {}
for ratio in RATIOS:
    encoder = vit.build(vit.Config(positions="sincos"), image_size=(224, 224), channels=3)
    objective = mae.build(encoder, mae.Config(decode_ratio=ratio)).to(device)
    optimizer = optim.create(objective, optim.Config(lr=1e-4))
    optim.set_rates(optimizer, 1e-4, 0.05)
    jobs[ratio] = objective, optimizer
    a_step(objective, optimizer, batch)
seconds: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
for _ in range(arguments.rounds):
    for ratio, (objective, optimizer) in jobs.items():
        seconds[ratio].append(a_step(objective, optimizer, batch))

whole = statistics.median(seconds[1.0])
figures = {}
print(f"{'decode_ratio':>12} {'patches':>8} {'s per step: median (min-max)':>30} {'time':>6}")
for ratio, found in seconds.items():
    median, low, high = statistics.median(found), min(found), max(found)
    patches = max(round(ratio * batch["num_masked"]), 1)
    print(f"{ratio:>12} {patches:>8} {f'{median:.3f} ({low:.3f}-{high:.3f})':>30} {median / whole:>6.2f}")
    figures[ratio] = {"patches": patches, "seconds": found, "share": median / whole}
if arguments.json:
    about = {"device": str(device), "batch_size": arguments.batch_size}
    arguments.json.write_text(json.dumps({**about, "ratios": figures}, indent=1) + "\n")
