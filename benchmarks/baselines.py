"""kNN and ridge accuracy of raw pixels and of an untrained encoder on a run's data: what pretraining must beat.

python benchmarks/baselines.py runs/mae_vittiny_cifar10 --train-limit 10000
"""

import argparse
import json

import torch
from torch import Tensor

from mim import build
from mim.contracts import LoadedRun
from mim.evals import knn, ridge
from mim.probing.features import Wanted, embed_splits, embedder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="run directory whose data, views and encoder are used")
parser.add_argument("--train-limit", type=int, default=10000, help="images of the bank (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of the untrained encoder")
arguments = parser.parse_args()

trained = build.load_run(arguments.run)
torch.manual_seed(arguments.seed)
fresh = build.build(trained.config).encoder.eval()
untrained = LoadedRun(None, fresh, {}, trained.views, trained.config, 0, trained.path)
embeds = {"random initialisation": embedder(untrained, Wanted()), "pretrained": embedder(trained, Wanted())}


def together(images: Tensor) -> dict[str, Tensor]:
    return {"raw pixels": images.flatten(1)} | {name: embed(images)["-1/mean"] for name, embed in embeds.items()}


train, val = embed_splits(trained, together, batch_size=256, train_limit=arguments.train_limit, val_limit=None)
for name in train.columns:
    bank, queries = train.split(name), val.split(name)
    accuracy = {
        "knn": knn.knn_accuracy(bank, queries, k=knn.Config.k, temperature=knn.Config.temperature),
        "ridge": ridge.ridge_accuracy(bank, queries, strengths=ridge.Config().strengths),
    }
    print(json.dumps({"features": name, **accuracy}), flush=True)
