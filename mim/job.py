"""The sections of a recipe that `mim train` reads, and what its loop works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

import tokenizer as tokenizers
from mim import build, guard, optim
from mim.config import ConfigError
from mim.data import mixture, quarantine, stages
from mim.interventions import position_at
from mim.saving import checkpoint
from mim.watch.attendant import Attendant


@dataclass
class Machine:
    """Section `train`: how a run is executed. Nothing here changes what is learned, beyond rounding and rollbacks."""

    run: str | None = None  # run directory; null: runs/<recipe name>
    precision: str = "no"  # no (float32) | bf16 | fp16
    cpu: bool = False  # stay on the CPU although there is a GPU
    micro_batches: int = 1  # gradient accumulation: micro-batches per step and process
    workers: int | None = None  # loader processes per rank; null: the CPUs of this process, shared among local ranks
    log_every: str = "50 steps"
    save_every: str = "1 epochs"
    keep: int = 2  # newest valid checkpoints that stay, at least 2
    cache_dir: str | None = None  # of shards made from image folders, and of remote ones; null: ~/.cache/mimstream
    cache_limit: float | None = None  # GiB of remote shards kept there; null: until 5 % or 20 GiB of the disk are left
    trackers: list[str] = field(default_factory=list)  # tensorboard | wandb | trackio | mlflow; they follow log.jsonl
    keep_every: str | None = None  # a duration: of the checkpoints between two multiples of it one stays; null: none
    failed_saves: int = 2  # failed saves in a row that training goes on after; one more ends the run
    time_limit: str | None = None  # "24h" from the start of the command; null: the Slurm job's, if there is one
    stop_before: str = "5m"  # save and stop so long before the limit ends
    timeout: str | None = "10m"  # of a step; a run that does not move for so long is ended; null: never
    shard: bool = False  # parameters, gradients and optimizer over the processes (FSDP2); accelerate's FSDP sets it too
    compile: bool | None = None  # every block with torch.compile; the first step takes minutes; null: on GPUs
    activation_checkpointing: bool = False  # blocks run forward again in the backward: less memory, a third more time
    guard: guard.Config = field(default_factory=guard.Config)  # when to return to the last good checkpoint

    def __post_init__(self) -> None:
        if self.precision == "False":  # what YAML makes of a bare `no`
            self.precision = "no"
        if self.precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"train.precision={self.precision!r} is unknown; choose no, bf16 or fp16")
        if self.micro_batches < 1:
            raise ConfigError(f"train.micro_batches={self.micro_batches} must be at least 1")
        if self.failed_saves < 0:
            raise ConfigError(f"train.failed_saves={self.failed_saves} must be at least 0")


@dataclass
class Init:
    """Section `init`: a new run from another run's weights, which is recorded as its parent."""

    run: str | None = None  # RUN or RUN@step; null: start afresh (or from encoder.init)
    optimizer: bool = False  # its optimizer too, then with the weights of the last step instead of their average


@dataclass
class Config:
    """A recipe. The first six sections are the experiment; `train` is the machine; `evals` only look."""

    data: dict[str, Any]
    objective: dict[str, Any]
    optim: optim.Config
    encoder: dict[str, Any] | None = None
    mask: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    tokens: str | None = None  # token cache (mim tokens make): the codes without running the tokenizer
    teacher: dict[str, Any] | None = None  # frozen network whose features or decisions are learned: {path: RUN}
    init: Init = field(default_factory=Init)
    train: Machine = field(default_factory=Machine)
    evals: dict[str, Any] = field(default_factory=dict)  # NAME: {every: "10 epochs", option: value}


@dataclass
class Job:
    """What the loop works on."""

    cfg: Config
    run: Path
    built: build.Built
    rates: optim.Rates
    dataset: mixture.AnyDataset
    sequence: mixture.AnyOrder
    journal: quarantine.Journal
    experiment: dict[str, Any]  # its identity
    accelerator: Accelerator
    model: nn.Module  # the wrapped objective
    optimizer: Any
    ema: dict[str, Tensor]
    attendant: Attendant
    recipe: str
    card: dict[str, float] = field(default_factory=dict)  # of the tokenizer that is trained, as last evaluated
    every: dict[str, int] = field(default_factory=dict)  # steps between logs, saves and evaluations
    twin: nn.Module | None = None  # of a sharded objective: the plain one that evaluations see

    @property
    def objective(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def position(self, step: int) -> int:
        """Positions of the stream that are behind the run after a step; nothing else turns steps into positions."""
        return position_at(step, self.cfg.optim.batch_size, self.rates.interventions)


def num_workers(asked: int | None) -> int:
    """Loader processes of this rank: as asked, else the allowed CPUs shared among the ranks of this node."""
    if asked is not None:
        return asked
    return min(stages.allowed_cpus(), 16)


def restore(job: Job, folder: Path) -> dict[str, Any]:
    """Take everything of a checkpoint that the loop works on (all ranks); returns its state.json."""
    state = checkpoint.restore(folder, job.model, job.optimizer.optimizer, job.ema)
    if job.accelerator.scaler is not None and state.get("scaler"):
        job.accelerator.scaler.load_state_dict(state["scaler"])
    job.journal.restore(state.get("bad", []))
    job.card = tokenizers.score_card(folder)
    return state


def status(job: Job, state: str, step: int, *, reason: str | None = None, code: int | None = None) -> None:
    """Write status.json, which launch scripts read."""
    job.attendant.status.step = step  # on all ranks: any of them may have to write the end
    if job.accelerator.is_main_process:
        job.attendant.status.write(state, step, reason=reason, code=code)
