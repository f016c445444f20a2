"""Is a pretraining worth it? One network from three starts: at random, from MAE, from BEiT; on CIFAR-10, on a CPU.

Every start is fine-tuned for the same steps with the same augmentation, once with each of --rates. The rate is chosen
on images held out of the training split (`val` of --data), and only the chosen run is judged on --test. kNN and the
linear probe judge the start itself, on --test. Everything is a command of `mim`, which is printed and may be run by
hand; as many run side by side as there are cores, on one each. Rerun, this goes on where it was stopped and skips what
is done.

    mim shards make data/cifar10/train shards/cifar10 --labels-from-folders --val-ratio 0.1
    mim shards make data/cifar10/test shards/cifar10-test --labels-from-folders
    mim train dvae_small_cifar10 data.path=shards/cifar10
    python benchmarks/finetune.py --json finetune.json

Without the tokenizer the row of BEiT is left out. --mae and --beit take runs that are there, with their network.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mim.log import clock, say, write_json
from mim.saving import checkpoint

Command = list[str]  # arguments of mim
NETWORK = {"depth": 6, "width": 128, "num_heads": 4, "patch_size": 4, "positions": "sincos", "layer_scale": None}
NOT_SHAPE = ("name", "init", "mean", "std", "drop_path_rate", "weight_init", "qk_gain")  # of an encoder's options
SHORT = {  # what a few hundred steps gain nothing from is off
    "optim.base_lr": None,
    "optim.layer_decay": None,
    "encoder.drop_path_rate": 0,
    "objective.head_std": 0.01,
    "objective.mixup_alpha": 0,
    "objective.cutmix_alpha": 0,
}
CROPS = ["data.view=null", "data.view={name: crop, scale: [0.5, 1.0], hflip: 0.5}"]  # instead of RandAugment
PROBES = {"knn": [], "linear": ["solver=lbfgs"]}  # evaluations with their options; the number has the same name


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    book = Book(arguments)
    starts = {name: command for name in ("random", "mae", "beit") if (command := start(name, arguments))}
    book.side_by_side([[command] for command in starts.values()])
    tuned = {name: {rate: finetuning(name, rate, arguments) for rate in arguments.rates} for name in starts}
    book.side_by_side(
        [[command, choosing(command, arguments)] for commands in tuned.values() for command in commands.values()]
        + [[probing(probe, command, arguments)] for command in starts.values() for probe in PROBES]
    )
    rows = {name: choose(book, tuned[name], arguments) for name in starts}
    tests = {name: judging(tuned[name][row["rate"]], arguments) for name, row in rows.items()}
    book.side_by_side([[command] for command in tests.values()])
    for name, row in rows.items():
        row |= {"finetune": book.found(tests[name])["accuracy"]}
        row |= {probe: book.found(probing(probe, starts[name], arguments))[probe] for probe in PROBES}
        row["commands"] = [shown(c) for c in (starts[name], tuned[name][row["rate"]], tests[name])]
    print(table(rows, arguments))
    say(f"{clock(time.monotonic() - began)} now, {clock(book.seconds())} of one core in all")
    if arguments.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        write_json(arguments.json, {"settings": settings, "rows": rows, "commands": book.entries})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shards/cifar10", help="dataset with train and val (default: %(default)s)")
    parser.add_argument("--test", default="shards/cifar10-test", help="dataset that judges (default: %(default)s)")
    parser.add_argument("--tokenizer", default="runs/dvae_small_cifar10", help="BEiT's (default: %(default)s)")
    parser.add_argument("--mae", help="run of an MAE, instead of a pretraining")
    parser.add_argument("--beit", help="run of a BEiT, instead of a pretraining")
    parser.add_argument("--mae-steps", type=int, default=1200, help="of pretraining (default: %(default)s)")
    parser.add_argument("--beit-steps", type=int, default=550, help="as long, on a CPU (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="of every fine-tuning (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (default: %(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3], help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops (default: %(default)s)")
    parser.add_argument("--bank", type=int, default=10000, help="images that fit the probes (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=2500, help="test images of the probes (default: %(default)s)")
    parser.add_argument("--choose", type=int, default=2500, help="images that choose a rate (default: %(default)s)")
    parser.add_argument("--judge", type=int, default=10000, help="test images of the chosen (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=len(os.sched_getaffinity(0)), help="commands at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


# ---- commands ------------------------------------------------------------------------------------


def start(name: str, arguments: argparse.Namespace) -> Command | None:
    """The pretraining of a start; one step at rate 0 where it is given or at random."""
    given = getattr(arguments, name, None)
    recipe = f"{'beit' if name == 'beit' else 'mae'}_vittiny_cifar10"
    steps = 1 if name == "random" or given else getattr(arguments, f"{name}_steps")
    rate = 0.0 if steps == 1 else 1e-3
    options = {
        **common(arguments, steps),
        "data.val_path": arguments.test,
        "optim.lr": rate,
        "train.run": str(arguments.out / (f"{name}-{steps}" if steps > 1 else name)),
        **network(given or arguments.mae),
    }
    if name != "beit":
        options["optim.base_lr"] = None
    elif not Path(arguments.tokenizer).is_dir():
        say(f"{arguments.tokenizer} is no tokenizer: the row of BEiT is left out (--tokenizer)")
        return None
    else:
        options |= {"tokenizer.path": arguments.tokenizer, "tokenizer.force": True}
    if given:
        options["init.run"] = given
    return ["train", recipe, *written(options)]


def finetuning(name: str, rate: float, arguments: argparse.Namespace) -> Command:
    """Fine-tuning from a start: the whole network and a new head."""
    begin = start(name, arguments)
    assert begin is not None
    options = {
        **common(arguments, arguments.steps),
        "encoder.init": run_of(begin),
        "optim.lr": rate,
        "train.run": str(arguments.out / f"{name}-tuned-{rate:g}-{arguments.steps}"),
        **network(getattr(arguments, name, None) or arguments.mae),
        **SHORT,
    }
    return ["train", "classify_vittiny_cifar10", *CROPS, *written(options)]


def choosing(command: Command, arguments: argparse.Namespace) -> Command:
    """Accuracy of a fine-tuning on images held out of the training split."""
    return ["eval", "accuracy", run_of(command), f"val_limit={arguments.choose}"]


def judging(command: Command, arguments: argparse.Namespace) -> Command:
    """Accuracy of a fine-tuning on the test images."""
    return ["eval", "accuracy", run_of(command), f"data.val_path={arguments.test}", f"val_limit={arguments.judge}"]


def probing(probe: str, command: Command, arguments: argparse.Namespace) -> Command:
    """A probe of a start on the test images."""
    limits = [f"train_limit={arguments.bank}", f"val_limit={arguments.queries}"]
    return ["eval", probe, run_of(command), *PROBES[probe], *limits]


def common(arguments: argparse.Namespace, steps: int) -> dict[str, Any]:
    """What all trainings share."""
    return {
        "data.path": arguments.data,
        "data.seed": arguments.seed,
        "optim.batch_size": arguments.batch_size,
        "optim.length": f"{steps} steps",
        "optim.warmup": f"{steps // 20} steps",
        "optim.seed": arguments.seed,
        "train.workers": 0,
        "train.log_every": f"{max(steps // 10, 1)} steps",
        "train.save_every": f"{max(steps // 4, 1)} steps",
        "evals": None,
    }


def network(run: str | None) -> dict[str, Any]:
    """The options of the encoder: our small one, or that of a run."""
    shape = NETWORK
    if run is not None:
        encoder = checkpoint.read_config(Path(run))["encoder"]
        shape = {key: value for key, value in encoder.items() if key not in NOT_SHAPE}
    return {f"encoder.{key}": value for key, value in shape.items()}


def written(options: dict[str, Any]) -> list[str]:
    """Options as KEY=VALUE."""
    plain = {True: "true", None: "null"}
    return [f"{key}={plain[value] if value is True or value is None else value}" for key, value in options.items()]


def run_of(command: Command) -> str:
    """The run directory of a training."""
    return next(option for option in command if option.startswith("train.run=")).removeprefix("train.run=")


def shown(command: Command) -> str:
    return f"mim {shlex.join(command)}"


# ---- doing them ----------------------------------------------------------------------------------


class Book:
    """Which commands are done, what each printed and how long it took; kept in `done.json` of the folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.file, self.lanes = arguments.out / "done.json", arguments.lanes
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.entries: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.lock = threading.Lock()
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def side_by_side(self, chains: list[list[Command]]) -> None:
        """Do chains of commands, as many at a time as there are lanes."""
        with ThreadPoolExecutor(self.lanes) as pool:
            futures = [pool.submit(lambda chain=chain: [self.do(command) for command in chain]) for chain in chains]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # also Ctrl-C, which the commands receive too
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def do(self, command: Command) -> None:
        """Do a command that is not done; another end than 0 ends the program."""
        if shown(command) in self.entries:
            return
        say(f"$ {shown(command)}")
        began = time.monotonic()
        line = [sys.executable, "-m", "mim", *command]
        ended = subprocess.run(line, env=self.environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{ended.stderr[-2000:]}\nended with {ended.returncode}: {shown(command)}")
        found = json.loads(ended.stdout) if command[0] == "eval" else {}
        with self.lock:
            self.entries[shown(command)] = {"seconds": round(time.monotonic() - began, 1), **found}
            write_json(self.file, self.entries)

    def found(self, command: Command) -> dict[str, Any]:
        """What a command that is done printed."""
        return self.entries[shown(command)]

    def seconds(self) -> float:
        return sum(entry["seconds"] for entry in self.entries.values())


# ---- the table -----------------------------------------------------------------------------------


def choose(book: Book, commands: dict[float, Command], arguments: argparse.Namespace) -> dict[str, Any]:
    """The rate that does best on the images that choose."""
    val = {rate: book.found(choosing(command, arguments))["accuracy"] for rate, command in commands.items()}
    return {"rate": max(val, key=val.__getitem__), "val": {f"{rate:g}": accuracy for rate, accuracy in val.items()}}


def table(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Accuracies on the test images in percent, and the commands that made each row."""
    lines = [
        f"\naccuracy in %, {arguments.steps} fine-tuning steps of {arguments.batch_size} images",
        f"{'start':8}{'kNN':>8}{'linear':>8}{'fine-tuned':>12}{'rate':>8}   by rate, on the images that choose",
    ]
    for name, row in rows.items():
        widths = {**dict.fromkeys(PROBES, 8), "finetune": 12}
        numbers = "".join(f"{100 * row[key]:{width}.1f}" for key, width in widths.items())
        val = "  ".join(f"{rate}: {100 * accuracy:.1f}" for rate, accuracy in row["val"].items())
        lines.append(f"{name:8}{numbers}{row['rate']:>8g}   {val}")
    for name, row in rows.items():
        lines += [f"\n{name}", *(f"    {command}" for command in row["commands"])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
