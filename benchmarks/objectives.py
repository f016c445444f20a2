"""Does every objective learn? Short runs of the CIFAR-10 recipes against trivial predictions, and one batch by heart.

For each objective its recipe (6 blocks deep) is trained by the loop of `mim train`; then its loss on held-out images,
with the same masks every time, is compared with that of predictions that know nothing of the masked patches:

    pixels  the mean target of all patches of training images; the mean of the image's visible target, per channel
    codes   the frequencies of codes (colours) in training images; twice for BEiT v2, whose loss has two predictions

"One batch": a fresh network, updated on 32 training images with one mask; its loss before and after.

python benchmarks/objectives.py --steps 1200 --data shards/cifar10 --json objectives.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim import build, config, job, optim, train
from mim.contracts import Batch, LoadedRun
from mim.patches import gather, mask_to_ids
from mim.probing import codes as evaluated
from mim.watch import stopping
from tokenizer.quantize import code_counts

RECIPES = {name: f"{name}_vittiny_cifar10" for name in ("mae", "simmim", "mpp", "beit", "beit2")}
TOKENIZER = "dvae_small_cifar10"
OWN = {
    "mae": ["optim.base_lr=null"],
    "simmim": ["optim.schedule=cosine", "optim.milestones=[]"],  # a short run has no milestones in epochs
    "beit2": ["objective.early_layer=4"],
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    figures = {}
    tokenizer = arguments.tokenizer or trained_tokenizer(arguments)
    for name in arguments.objectives:
        tokens = [f"tokenizer.path={tokenizer}"] if name in ("beit", "beit2") else []
        recipe = written(RECIPES[name], [*short(arguments), *OWN.get(name, []), *tokens], arguments.out)
        run = arguments.out / f"{name}-{arguments.steps}"
        trained(recipe, run)
        figures[name] = measure(build.load_run(run), arguments.images)
        figures[name]["one_batch"] = one_batch(recipe, arguments.fit_steps)
    fitted = f"one batch, {arguments.fit_steps} steps"
    print(f"\n{'objective':10} {'held-out loss':>13} {'best trivial':>13} {'ratio':>6}   {fitted}")
    for name, found in figures.items():
        loss, trivial, (before, after) = found["loss"], min(found["trivial"].values()), found["one_batch"]
        print(f"{name:10} {loss:>13.4f} {trivial:>13.4f} {loss / trivial:>6.3f}   {before:.3f} -> {after:.3f}")
    if arguments.json:
        about = {"steps": arguments.steps, "batch_size": arguments.batch_size, "images": arguments.images}
        arguments.json.write_text(json.dumps({**about, "objectives": figures}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shards/cifar10", help="dataset folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="updates of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per update (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=7e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--objectives", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--tokenizer", help="run of a trained tokenizer; else one is trained with --tokenizer-steps")
    parser.add_argument("--tokenizer-steps", type=int, default=450, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="held-out, and for baselines (default: %(default)s)")
    parser.add_argument("--fit-steps", type=int, default=100, help="updates on one batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def short(arguments: argparse.Namespace) -> list[str]:
    """Overrides that make a recipe a short run on a CPU."""
    return [
        f"data.path={arguments.data}",
        "encoder.depth=6",
        "encoder.positions=sincos",
        f"optim.batch_size={arguments.batch_size}",
        f"optim.lr={arguments.lr}",
        f"optim.length={arguments.steps} steps",
        f"optim.warmup={max(arguments.steps // 20, 1)} steps",
        f"train.save_every={arguments.steps} steps",
        f"train.log_every={max(arguments.steps // 10, 1)} steps",
        "train.workers=0",
    ]


def written(recipe: str, overrides: list[str], folder: Path) -> Path:
    """The recipe with overrides and without evaluations, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe}.yaml"
    path.write_text(config.to_yaml({**config.read(recipe, overrides), "evals": {}}))
    return path


def trained(recipe: Path, run: Path) -> None:
    if train.main(str(recipe), [f"train.run={run}"]) != stopping.DONE:
        raise SystemExit(f"{run} was stopped; the same command resumes")


def trained_tokenizer(arguments: argparse.Namespace) -> Path:
    run = arguments.out / f"tokenizer-{arguments.tokenizer_steps}"
    if {"beit", "beit2"} & set(arguments.objectives):
        length = f"optim.length={arguments.tokenizer_steps} steps"
        trained(written(TOKENIZER, [f"data.path={arguments.data}", length, "train.workers=0"], arguments.out), run)
    return run


# ---- held-out loss and what it must beat ---------------------------------------------------------


@torch.no_grad()
def measure(loaded: LoadedRun, images: int) -> dict[str, Any]:
    """The objective's loss on held-out images, and that of each trivial prediction."""
    training, held_out = build.open_data(loaded.config)
    losses = [loaded.objective(batch, torch.tensor(1.0))["loss"] for batch in batches(loaded, held_out, images)]
    baselines = pixels if hasattr(loaded.objective, "target") else codes
    trivial = baselines(loaded, list(batches(loaded, training, images)), list(batches(loaded, held_out, images)))
    return {"loss": torch.cat(losses).mean().item(), "trivial": trivial}


def batches(loaded: LoadedRun, dataset: Any, images: int) -> Iterator[Batch]:
    """Batches with the same pixels, masks and draws every time."""
    cpu = torch.device("cpu")
    return evaluated.batches(loaded, dataset, loaded.frozen, batch_size=100, limit=images, device=cpu)


def pixels(loaded: LoadedRun, training: list[Batch], held_out: list[Batch]) -> dict[str, float]:
    """Losses of the mean patch of training images, and of the mean of the image's own visible patches."""
    squared = loaded.config["objective"]["name"] == "mae"

    def target(batch: Batch) -> Tensor:
        found = loaded.objective.target(batch["images"])
        return found[0] if isinstance(found, tuple) else found  # (B, N, P)

    def loss(pred: Tensor, hidden: Tensor) -> Tensor:
        error = (pred - hidden).square() if squared else (pred - hidden).abs()
        return error.mean(dim=(1, 2))  # (B,)

    mean_patch = torch.stack([target(batch).mean(dim=(0, 1)) for batch in training]).mean(dim=0)  # (P,)
    found: dict[str, list[Tensor]] = {"mean patch": [], "visible mean": []}
    for batch in held_out:
        patches = target(batch)
        ids_keep, ids_mask, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        visible, hidden = gather(patches, ids_keep), gather(patches, ids_mask)
        channels = visible.unflatten(2, (-1, loaded.encoder.channels)).mean(dim=(1, 2))  # (B, C)
        pred = channels.repeat(1, hidden.shape[2] // loaded.encoder.channels).unsqueeze(1)  # (B, 1, P)
        found["mean patch"].append(loss(mean_patch, hidden))
        found["visible mean"].append(loss(pred, hidden))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def codes(loaded: LoadedRun, training: list[Batch], held_out: list[Batch]) -> dict[str, float]:
    """Cross-entropy of the masked codes under the frequencies of training images (each counted once more)."""
    objective = loaded.objective
    predictions = 2 if loaded.config["objective"]["name"] == "beit2" else 1

    def of(batch: Batch) -> Tensor:
        return batch["codes"] if "codes" in batch else objective.colours(batch["images"])  # (B, N)

    num_codes = objective.head.out_features
    counts = sum((code_counts(of(batch), num_codes) for batch in training), torch.ones(num_codes))
    cost = -(counts / counts.sum()).log()  # (V,)
    masked = torch.cat([of(batch)[batch["mask"]] for batch in held_out])
    return {"frequencies": predictions * cost[masked].mean().item()}


# ---- one batch by heart --------------------------------------------------------------------------


def one_batch(recipe: Path, steps: int) -> tuple[float, float]:
    """Loss of a fresh network on one batch of training images, before and after `steps` updates on it."""
    cfg = config.typed(job.Config, config.read(str(recipe)))
    training, _ = build.open_data(config.plain(cfg))
    torch.manual_seed(cfg.optim.seed)
    built = build.build(config.plain(cfg), dataset=training)
    loaded = LoadedRun(built.objective, built.encoder, built.frozen, built.views, built.sections, 0, Path())
    with torch.no_grad():
        batch = {k: v[:32] if torch.is_tensor(v) else v for k, v in next(batches(loaded, training, 100)).items()}
    optimizer = optim.create(built.objective, cfg.optim)
    losses = []
    for step in range(steps + 1):
        loss = built.objective(batch, torch.tensor(0.0))["loss"].mean()
        losses.append(loss.item())
        loss.backward()
        optim.set_rates(optimizer, min((step + 1) / 10, 1.0) * 1e-3, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
