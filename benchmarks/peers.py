"""The same pretraining step in transformers, in lightly and here: images per second, interleaved, with equal weights.

Batch, optimizer (fused AdamW in the same groups), clipping and precision are equal; each library runs as it ships, and
once more with the attention that it calls eager, so that none is held back by a kernel. Before anything is timed, all
losses and the norms of their gradients are compared in float32, with the same weights and masks. A step is forward,
backward and update; ours also has what a run adds: uint8 images that become floats, the norm of the gradient, the
average of the losses. The others get normalised floats for nothing.

In each round every variant takes its turn. A ratio is the median over rounds of the ratio to ours at the same
precision, and of the other's float32 to our bfloat16. MFU counts what the recipe needs (mim/planning/footprint.py), the
same for all, against matrix products that are timed in the same rounds. lightly is left out where it is not installed:

    pip install --no-deps --target SITE lightly==1.6.0 && export PYTHONPATH=SITE:.

    python -m benchmarks.peers --size tiny                          # a minute: all cases on 32-pixel images
    python -m benchmarks.peers --cases mae --rounds 5 --json mae.json
    python -m benchmarks.peers --cases beit --precision bf16 --only ours transformers
    python -m benchmarks.peers --compile --batch-size 256           # on a GPU: all compiled
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import rounds, steps
from benchmarks.peer_models import PEERS
from mim import optim
from mim.contracts import Batch
from mim.data import stream

CASES = {"mae": "mae", "beit": "beit-codes"}
TINY_BEIT = [  # the recipe has a plain ViT; transformers' BEiT is the published one
    "encoder.name=beit",
    "encoder.model=beit_base_patch16_224",
    "encoder.positions=shared_relative",
    "encoder.weight_init=beit",
    "encoder.width=192",
    "encoder.depth=12",
    "encoder.num_heads=3",
]
ROWS = {"tiny": 64}  # images per step; else 16
FEW = 2  # images on which losses are compared
OURS = "ours"
CLOSE = 1e-4  # relative difference of two losses, or of the norms of their gradients, in float32
PRECISIONS = {"bf16": "bf16", "no": "fp32"}


class Unequal(ValueError):
    """Two libraries do not compute the same."""


class PeerTraining:
    """Another library's module with the optimizer of the recipe, and steps of it."""

    def __init__(self, module: Any, cfg: optim.Config, device: torch.device, batch: Batch) -> None:
        self.module = module.to(device).train()
        self.cfg, self.device, self.batch = cfg, device, batch
        self.optimizer: Any = optim.create(self.module, replace(cfg, no_decay=[]))
        optim.allocate(self.optimizer)
        optim.set_rates(self.optimizer, 1e-5, cfg.weight_decay)

    def step(self, precision: str) -> None:
        """One optimizer step."""
        with steps.autocast(self.device, precision):
            loss = self.module(self.batch["pixels"], self.batch)
        loss.backward()
        if self.cfg.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.cfg.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- equal work ----------------------------------------------------------------------------------


def with_pixels(objective: Any, batch: Batch) -> Batch:
    """The batch on its device with float images in [0, 1], and `pixels`, normalised as other libraries take them."""
    found = stream.to_device(batch, batch["images"].device)
    with torch.no_grad():
        return {**found, "pixels": objective.encoder.normalize(found["images"]).contiguous()}


def check_equal(objective: Any, peers: dict[str, Any], batch: Batch) -> dict[str, dict[str, float]]:
    """Loss and norm of all gradients of each in float32, on one batch with equal weights; Unequal where one differs."""
    found = {OURS: measured(objective.eval(), lambda: objective(batch, torch.zeros(()))["loss"].mean())}
    for name, module in peers.items():
        found[name] = measured(module.eval(), functools.partial(module, batch["pixels"], batch))
        for what, theirs in found[name].items():
            ours = found[OURS][what]
            if not abs(theirs - ours) <= CLOSE * abs(ours):
                raise Unequal(
                    f"the {what} of {name} is {theirs:.6f}, ours {ours:.6f}, with the same weights and masks; they do "
                    f"not do the same work, so their speeds are not compared"
                )
    return found


def measured(module: nn.Module, loss_of: Callable[[], torch.Tensor]) -> dict[str, float]:
    """A module's loss and the norm of its gradient, which any of its weights would change."""
    loss = loss_of()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return {"loss": loss.item(), "norm of the gradient": norm.item()}


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Move every trained weight: fresh tokens, biases and heads are near zero, where a loss hardly depends on them.

    By as much as keeps the variance of what a layer passes on, so that rounding does not grow with depth.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=parameter.shape[-1] ** -0.5)


def peers_of(name: str, built: Any, wanted: list[str] | None) -> dict[str, Any]:
    """The modules of the libraries that are installed, all with the same weights, which ours gets, too."""
    found = {}
    shake(built.objective)
    for package, make in PEERS[name].items():
        if wanted is not None and package not in wanted:
            continue
        if importlib.util.find_spec(package) is None:
            rounds.say(f"{package} is not installed: left out")
            continue
        found[package] = make(built.objective, built.sections)
        shake(found[package])
        found[package].share(built.objective)
    return found


# ---- a case --------------------------------------------------------------------------------------


class Case:
    """One objective at one size: variants by name, each a step that returns its seconds."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.rows, self.repeats = arguments.batch_size or ROWS.get(arguments.size, 16), arguments.steps
        self.precisions = [key for key, shown in PRECISIONS.items() if shown in arguments.precision]
        works = {key: self.work(name, arguments, key) for key in self.precisions}
        first = next(iter(works.values()))
        built = steps.built_of(first)
        peers = peers_of(name, built, arguments.only)
        weights = {key: value.clone() for key, value in built.objective.state_dict().items()}
        few = with_pixels(built.objective, steps.synthetic(built, FEW))
        self.equal = check_equal(built.objective, peers, few)
        losses = ", ".join(f"{package} {found['loss']:.6f}" for package, found in self.equal.items())
        rounds.say(f"{first.name}: equal losses and gradients, {losses}")
        batch = with_pixels(built.objective, steps.synthetic(built, self.rows))
        self.trainings = {}
        for key, wanted in works.items():
            own = built if wanted is first else steps.built_of(wanted)
            own.objective.load_state_dict(weights)
            self.trainings[key] = steps.Training(wanted, rows=self.rows, built=own)
        self.device = next(iter(self.trainings.values())).device
        batch = steps.on(self.device, batch)
        others = {
            package: PeerTraining(module, first.cfg.optim, self.device, batch) for package, module in peers.items()
        }
        if arguments.compile:
            for package, module in peers.items():
                module.compile()
                rounds.say(f"{package} is compiled as a whole")
        self.variants = self._variants(others)
        tokens = self.rows * built.encoder.grid(batch["images"].shape[-2:])[0] ** 2
        self.flops = steps.flops(first, self.rows) * self.rows
        shapes = rounds.peak_shapes(self.device, tokens, built.encoder.width)
        for key in self.precisions:
            self.variants[f"peak {PRECISIONS[key]}"] = rounds.Peak(self.device, key, shapes)

    @staticmethod
    def work(name: str, arguments: argparse.Namespace, precision: str) -> steps.Work:
        machine: dict[str, Any] = {"precision": precision, "cpu": str(arguments.cpu).lower()}
        if arguments.compile:
            machine["compile"] = "true"
        own = TINY_BEIT if name == "beit" and arguments.size == "tiny" else []
        return steps.work(CASES[name], arguments.size, ["data.jitter=0", *own, *arguments.set], **machine)

    def _variants(self, others: dict[str, PeerTraining]) -> dict[str, Callable[[], float]]:
        found: dict[str, Callable[[], float]] = {}
        for key in self.precisions:
            found[f"{OURS} {PRECISIONS[key]}"] = self._timed(self.trainings[key].step)
            for package, training in others.items():
                found[f"{package} {PRECISIONS[key]}"] = self._peer(training, key, eager=False)
                found[f"{package} eager {PRECISIONS[key]}"] = self._peer(training, key, eager=True)
        return found

    def _peer(self, training: PeerTraining, precision: str, *, eager: bool) -> Callable[[], float]:
        step = self._timed(lambda: training.step(precision))

        def run() -> float:
            training.module.attend(eager=eager)
            return step()

        return run

    def _timed(self, step: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            rounds.synchronize(self.device)
            began = time.perf_counter()
            for _ in range(self.repeats):
                step()
            rounds.synchronize(self.device)
            return (time.perf_counter() - began) / self.repeats

        return run


def figures(case: Case, seconds: rounds.Seconds) -> dict[str, Any]:
    """Of each variant: images/s, share of the peak, and how many times as fast ours is."""
    peaks = {name.removeprefix("peak "): values for name, values in seconds.items() if name.startswith("peak ")}
    found: dict[str, Any] = {}
    for name, values in seconds.items():
        precision = name.rpartition(" ")[2]
        if name.startswith("peak "):
            continue
        row: dict[str, Any] = {"seconds": values, "images_per_s": vars(rounds.throughput(values, case.rows))}
        row["mfu"] = vars(rounds.mfu(case.flops, values, peaks[precision]))
        for ours in (f"{OURS} {shown}" for shown in PRECISIONS.values()):
            if ours in seconds and not name.startswith(OURS):
                row[f"{ours} is faster by"] = vars(rounds.ratio(values, seconds[ours]))
        found[name] = row
    return {"variants": found, "peak": {key: vars(rounds.Spread.of(values)) for key, values in peaks.items()}}


def show(title: str, case: Case, found: dict[str, Any]) -> None:
    """Print a case as a table."""
    peaks = ", ".join(f"{key} {value['median'] / 1e9:.0f} GFLOP/s" for key, value in found["peak"].items())
    print(f"\n{title}, batch {case.rows}, {case.flops / case.rows / 1e9:.3f} GFLOP per image; matmul peak {peaks}")
    ours = [f"{OURS} {shown}" for shown in PRECISIONS.values() if f"{OURS} {shown}" in found["variants"]]
    print(f"{'':26}{'images/s':>9} {'(min - max)':>19}{'MFU':>7}" + "".join(f"{f'{name} is x':>17}" for name in ours))
    for name, row in found["variants"].items():
        speed, share = row["images_per_s"], row["mfu"]["median"]
        spread = f"({speed['low']:.2f} - {speed['high']:.2f})"
        line = f"{name:26}{speed['median']:9.2f} {spread:>19}{share:7.1%}"
        ratios = [row.get(f"{one} is faster by", {}).get("median") for one in ours]
        print(line + "".join(f"{'' if value is None else f'{value:.2f}':>17}" for value in ratios), flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    results: dict[str, Any] = {}
    for name in given.cases:
        case = Case(name, given)
        rounds.say(f"{name}: warming up {len(case.variants)} variants")
        for run in case.variants.values():
            run()
        found = figures(case, rounds.interleaved(case.variants, given.rounds, tell=rounds.say))
        show(f"{name} {given.size}", case, found)
        results[name] = {**found, "rows": case.rows, "flops": case.flops, "equal": case.equal}
        device = case.device
        del case
    facts = rounds.machine(device, ("torch", "timm", "transformers", "lightly"))
    print(f"\n{facts}")
    content = {**facts, "size": given.size, "rounds": given.rounds, "steps": given.steps, "cases": results}
    if given.json:
        rounds.write_json(given.json, content)
    return content


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--size", choices=["tiny", *steps.SIZES], default="base", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images per step (default: 16; tiny 64)")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS.values()), default=list(PRECISIONS.values()))
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="transformers, lightly: leave the others out")
    parser.add_argument("--rounds", type=int, default=5, help="after a warm-up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="in a row, of each turn (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="blocks of ours, the whole of the others")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--cpu", action="store_true", help="although there is a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # Unequal, Unfit, ConfigError
        raise SystemExit(f"peers: {error}") from error
