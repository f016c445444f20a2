"""Time of the order: cold seek to the first batch after a resume, and samples located per second afterwards.

A cold seek builds the order from the counts of the shards and locates one batch deep in the third epoch.

python benchmarks/order.py --json order.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from mim.data.order import Order

CASES = {  # name -> samples per shard
    "1 million in 1,000 shards": np.full(1_000, 1_000),
    "100 million in 100,000 shards": 600 + np.arange(100_000) % 801,
    "1 billion in 1,000,000 shards": np.full(1_000_000, 1_000),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=1024, help="positions located at once (default: %(default)s)")
parser.add_argument("--json", type=Path, help="file for the figures")
arguments = parser.parse_args()

seconds: dict[str, list[float]] = {name: [] for name in CASES}
located: dict[str, list[float]] = {name: [] for name in CASES}
for _ in range(arguments.rounds):
    for name, counts in CASES.items():
        start = 2 * int(counts.sum()) + int(counts.sum()) * 9 // 10
        began = time.perf_counter()
        order = Order("benchmark", counts, 0, lanes=64, window=2048)
        order.locate(range(start, start + arguments.batch_size))
        seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        for batch in range(1, 21):
            order.locate(range(start + batch * arguments.batch_size, start + (batch + 1) * arguments.batch_size))
        located[name].append(20 * arguments.batch_size / (time.perf_counter() - began))

figures = {
    name: {
        "cold_seek_ms": [round(1e3 * f(seconds[name]), 2) for f in (statistics.median, min, max)],
        "samples_per_s": [round(f(located[name])) for f in (statistics.median, min, max)],
    }
    for name in CASES
}
print(f"{'samples':32} {'cold seek, ms: median (min-max)':>34} {'located per s':>16}")
for name, found in figures.items():
    median, low, high = found["cold_seek_ms"]
    print(f"{name:32} {f'{median} ({low}-{high})':>34} {found['samples_per_s'][0]:>16}")
if arguments.json:
    arguments.json.write_text(json.dumps({"batch_size": arguments.batch_size, **figures}, indent=1) + "\n")
