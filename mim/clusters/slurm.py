"""The batch script of a training on a Slurm cluster: `mim launch slurm`.

The script (mim/clusters/slurm.sbatch.j2) checks the nodes, trains, turns Slurm's warning before the time limit into a
save, and queues itself again while the run advances. It is meant to be read before it is submitted, and kept beside the
recipe. Everything of the user that stands in it is quoted by shlex, and what no quoting keeps harmless is refused.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from omegaconf import OmegaConf

from mim import config
from mim.config import ConfigError
from mim.contracts import StorageError
from mim.data import order, stream
from mim.job import Config

TEMPLATE = Path(__file__).with_name("slurm.sbatch.j2")
WARNING = 120  # seconds before the time limit at which Slurm warns the script; the run stops by itself before
SHORTEST = 600  # seconds of a job: train.stop_before takes 300 of them
OWN = {"nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gres", "cpus-per-task", "time", "partition"}
REFUSED = OWN | {"account", "array", "signal", "requeue", "no-requeue"}  # as --option: what this command decides
CPUS_PER_GPU = 8  # when --cpus does not tell: decoding for one GPU


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster."""

    nodes: int
    gpus: int  # per node; 0: one process per node, on its CPUs
    time: str  # limit of one job, [DAYS-]HOURS:MINUTES:SECONDS
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None  # per node; None: CPUS_PER_GPU for each GPU
    more: tuple[str, ...] = ()  # further options of sbatch, as "constraint=h100"
    accelerate_config: str | None = None  # file for accelerate launch; None: torchrun
    python: str = sys.executable  # as the nodes see it
    setup: tuple[str, ...] = ()  # lines of shell that prepare the environment, as "module load cuda"

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return max(self.gpus, 1)


def run_directory(cfg: Config, recipe: str) -> Path:
    """Where a recipe's run lies, as `mim train` chooses it."""
    return Path(cfg.train.run or f"runs/{Path(recipe).stem}").expanduser()


def script(recipe: str, overrides: tuple[str, ...], request: Request, command: list[str]) -> str:
    """The text of the batch script; `command` is the command line that asked for it.

    Raises ConfigError for what a job would find only after its time in the queue: a wrong key, a batch too small.
    """
    for word in (recipe, *overrides, request.python, request.accelerate_config or "", *request.setup):
        if not word.isprintable():
            raise ConfigError(f"{word!r} holds a line break or control character; put the value into the recipe")
    cfg = config.typed(Config, config.read(recipe, overrides))
    repeats = config.typed(stream.Config, cfg.data, "data").repeats
    order.Plan(
        repeats, cfg.optim.batch_size, world=request.nodes * request.per_node, micro_batches=cfg.train.micro_batches
    )
    check_accelerate(request)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text()).render(
        options=options(Path(recipe).stem, request),
        recipe=Path(recipe).stem,
        nodes=request.nodes,
        per_node=request.per_node,
        warning=WARNING,
        command=shlex.join(command),
        setup=request.setup,
        python=shlex.quote(request.python),
        run=shlex.quote(str(run_directory(cfg, recipe))),
        arguments=shlex.join((recipe, *overrides)),
        accelerate_config=shlex.quote(request.accelerate_config) if request.accelerate_config else "",
    )


def options(name: str, request: Request) -> list[str]:
    """The options of sbatch, each for one #SBATCH line."""
    limit = seconds_of(request.time)
    if limit <= SHORTEST:
        raise ConfigError(f"--time {request.time} must exceed {SHORTEST} s: the last 300 s are for saving")
    given = {
        "job-name": re.sub(r"[^\w.-]", "_", name),
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(request.gpus)} if request.gpus else {}),
        "cpus-per-task": str(request.cpus or CPUS_PER_GPU * request.per_node),
        "time": request.time,
        **({"partition": request.partition} if request.partition is not None else {}),
        **({"account": request.account} if request.account is not None else {}),
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{WARNING}",
    }
    for text in request.more:
        key, equals, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key) or key in REFUSED:
            raise ConfigError(
                f"--option {text!r} is not an option that can be set; write e.g. --option constraint=h100"
            )
        given[key] = value if equals else ""
    for key, value in given.items():
        if not re.fullmatch(r"[\w.,:;@%/+*=\[\]()&|-]*", value, re.ASCII):
            raise ConfigError(f"{key}={value!r} holds characters that sbatch would read otherwise; leave them out")
    return [f"--{key}={value}" if value else f"--{key}" for key, value in given.items()] + ["--requeue"]


def seconds_of(time: str) -> int:
    """A time limit as Slurm writes it, in seconds: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ConfigError(f"--time {time!r} is no time limit of Slurm; write e.g. 24:00:00, or 3-00:00:00 for 3 days")
    days, *parts = (int(part) if part is not None else None for part in match.groups())
    first, second, third = parts
    if days is not None:
        return 86400 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600 * (first or 0) + 60 * (second or 0) + third
    return 60 * (first or 0) + (second or 0)


def check_accelerate(request: Request) -> None:
    """Refuse a launcher file of accelerate that would start fewer processes than asked for, without a word."""
    if request.accelerate_config is None:
        return
    file = Path(request.accelerate_config)
    if not file.is_file():
        raise ConfigError(f"--accelerate-config {file} is no file; choose one of configs/accelerate/")
    kind = str(OmegaConf.to_container(OmegaConf.load(file)).get("distributed_type", "NO"))  # type: ignore[union-attr]
    if kind == "NO" and request.nodes * request.per_node > 1:
        raise ConfigError(
            f"{file} has distributed_type NO, with which accelerate launch starts one process instead of "
            f"{request.nodes * request.per_node}; choose one with MULTI_GPU or FSDP"
        )
    if request.gpus == 0:
        raise ConfigError(
            f"--accelerate-config {file} with --gpus 0: accelerate starts CPU processes by MPI; leave it out"
        )


def submit(text: str) -> str:
    """Hand a script to sbatch; what it answers."""
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StorageError("sbatch is not installed here; submit the script on a login node of the cluster") from error
    if done.returncode:
        raise ConfigError(f"sbatch refused the script: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
