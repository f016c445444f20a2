"""What a view costs the loader: milliseconds of one core per decoded image, views taking turns.

A smooth picture of 500 x 375 pixels with noise stands for a photograph, as none of the views depends on what an image
shows. The process clock counts, so that other work beside it disturbs less.

python benchmarks/views.py --sizes 224 32 --calls 300
"""

import argparse
import statistics
import time

import numpy as np
import torch

from mim.data import augment

VIEWS = {"center": augment.center, "crop": augment.crop, "rand_augment_crop": augment.rand_augment_crop}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sizes", nargs="+", type=int, default=[224, 32], help="pixels of a view (default: %(default)s)")
parser.add_argument("--calls", type=int, default=300, help="images per view (default: %(default)s)")
arguments = parser.parse_args()
torch.set_num_threads(1)

generator = np.random.default_rng(0)
slope = np.add.outer(np.arange(375), np.arange(500)) / 5
picture = np.clip(slope + generator.normal(40, 12, (3, 375, 500)), 0, 255).astype(np.uint8)
for size in arguments.sizes:
    image = torch.from_numpy(
        picture if size >= 100 else picture[:, :size, :size].copy()
    )  # small ones are not resized down
    seconds: dict[str, list[float]] = {name: [] for name in VIEWS}
    for number in range(-10, arguments.calls):  # the first ten warm up
        for name, view in VIEWS.items():
            began = time.process_time()
            view(image, np.random.default_rng(number + 10), [(size, size)])
            if number >= 0:
                seconds[name].append(time.process_time() - began)
    for name, values in seconds.items():
        print(f"{size:4} px  {name:20} mean {statistics.mean(values) * 1e3:6.2f} ms", flush=True)
