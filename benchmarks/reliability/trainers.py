"""The two trainers: each trains through its real public path, and goes on by itself when it is started again.

    train         `mim train RECIPE`, as a user types it
    train usual   a timm ViT that fills in masked patches, on `webdataset.WebDataset`, with `accelerate.prepare`,
                  `save_state` every few steps (automatic names, `total_limit` 2), `load_state` of the newest and
                  `skip_first_batches`, as the documentation of Accelerate shows
    starts        several starts of either, one after the other, on one small disk

A trial names `run`, its folder. Every start may have a fault (benchmarks/reliability/faults.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import webdataset
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import save_file

import mim.train
from benchmarks.reliability.faults import Fault
from mim.__main__ import main
from mim.saving import save_stages

Emit = Callable[[list[Any], dict[str, Any]], None]


def join(trial: dict[str, Any], rank: int) -> None:
    """Become a rank of a run of several processes, as torchrun makes one."""
    world = trial.get("world", 1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(trial["port"])}


def fault_of(trial: dict[str, Any], rank: int) -> Fault | None:
    """The fault of this start, installed."""
    if "fault" not in trial:
        return None
    return Fault(trial["fault"], rank, Path(trial["out"]) / f"events-{rank}.jsonl")


# ---- ours ----------------------------------------------------------------------------------------


def ours(trial: dict[str, Any], rank: int, _emit: Emit) -> None:
    """Run `mim` with the arguments of a trial, and its fault."""
    join(trial, rank)
    if fault := fault_of(trial, rank):
        install(fault)
    sys.argv = ["mim", *trial["arguments"]]
    main()


def install(fault: Fault) -> None:
    """Have the loop and the saves of this process tell the fault where they are."""
    draws = mim.train.seed_draws

    def told(seed: int, step: int, rank: int, micro: int) -> None:
        fault.step(step, micro)
        draws(seed, step, rank, micro)

    mim.train.seed_draws = told
    save_stages.reached = fault.stage


# ---- the usual recipe ----------------------------------------------------------------------------

SIDE, PATCH = 16, 4  # pixels


class Network(torch.nn.Module):
    """A ViT that sees images of which random patches are grey, and says what they show."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 24, "depth": 2, "num_heads": 2}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
        self.head = torch.nn.Linear(24, 3 * PATCH**2)

    def forward(self, images: torch.Tensor, draws: torch.Generator | None) -> torch.Tensor:  # (B, 3, H, W)
        grid = SIDE // PATCH
        mask = torch.rand(len(images), 1, grid, grid, generator=draws) < 0.75
        pixels = mask.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)  # (B, 1, H, W)
        tokens = self.vit.forward_features(images.masked_fill(pixels, 0.5))[:, 1:]  # (B, N, D)
        shown = torch.nn.functional.fold(self.head(tokens).mT, (SIDE, SIDE), PATCH, stride=PATCH)  # (B, 3, H, W)
        return ((shown - images) ** 2)[pixels.expand_as(images)].mean()


class Done:
    """How far the run is, registered for its checkpoints."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def random_crop(image: Any) -> np.ndarray:
    """A crop as any script draws it: from the process's generator, (3, H, W) in [0, 1]."""
    left, top = np.random.randint(image.width - SIDE, size=2)
    return cut(image, left, top)


def middle(image: Any) -> np.ndarray:
    """The crop from the middle."""
    return cut(image, (image.width - SIDE) // 2, (image.height - SIDE) // 2)


def cut(image: Any, left: int, top: int) -> np.ndarray:
    return np.array(image)[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1).astype(np.float32) / 255


def usual(trial: dict[str, Any], rank: int, _emit: Emit) -> None:
    """Train `num_steps` steps, and write log.jsonl and final.safetensors at the end."""
    join(trial, rank)
    run, world, num_steps = Path(trial["run"]), trial.get("world", 1), trial["num_steps"]
    project = ProjectConfiguration(str(run), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = accelerate.Accelerator(cpu=True, project_config=project)
    set_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps * world)
    splitter = {"nodesplitter": webdataset.split_by_node} if world > 1 else {}
    ordered = trial.get("ordered", False)  # no draw depends on what went before, so that checkpoints alone are judged
    data = webdataset.WebDataset(trial["tars"], shardshuffle=0 if ordered else 100, **splitter)
    data = (data if ordered else data.shuffle(1000)).decode("pil").to_tuple("png")
    batch_size = max(1, trial.get("batch_size", 8) // world)
    batches = torch.utils.data.DataLoader(
        data.map_tuple(middle if ordered else random_crop), batch_size=batch_size, num_workers=trial.get("workers", 0)
    )
    model, optimizer, batches, schedule = accelerator.prepare(network, optimizer, batches, schedule)
    done = Done()
    accelerator.register_for_checkpointing(done)
    if any((run / "checkpoints").glob("checkpoint_*")):
        accelerator.load_state()
        project.iteration = done.step // trial["save_every"]
        print(f"resumed at step {done.step} of {num_steps}", file=sys.stderr)
    fault = fault_of(trial, rank)
    if fault:
        install_usual(fault, accelerator)
    steps_per_epoch = trial["num_images"] // (batch_size * world)
    log = (run / "log.jsonl").open("a") if rank == 0 and run.mkdir(parents=True, exist_ok=True) is None else None
    epoch, skip = divmod(done.step, steps_per_epoch)
    while done.step < num_steps:
        batches.set_epoch(epoch)
        found = 0
        for (images,) in accelerate.skip_first_batches(batches, skip) if skip else batches:
            if fault:
                fault.step(done.step + 1, 0)
            loss = model(images, torch.Generator().manual_seed(done.step) if ordered else None)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found, done.step = found + 1, done.step + 1
            if log:
                log.write(json.dumps({"event": "train", "step": done.step, "loss": loss.item()}) + "\n")
                log.flush()
            if done.step % trial["save_every"] == 0:
                accelerator.save_state()
            if done.step == trial.get("stop_after"):
                return
            if done.step == num_steps:
                break
        if not found and not skip:
            raise RuntimeError("the loader gave no batch")
        epoch, skip = epoch + 1, 0
    accelerator.wait_for_everyone()
    if rank == 0:
        weights = {f"model.{name}": value for name, value in network.state_dict().items()}
        moments = optimizer.state_dict()["state"]
        weights |= {f"optimizer.{i}.{n}": v for i, state in moments.items() for n, v in state.items()}
        save_file({name: value.contiguous() for name, value in weights.items()}, run / "final.safetensors")
    accelerator.end_training()


def install_usual(fault: Fault, accelerator: accelerate.Accelerator) -> None:
    """Have the saves of this process tell the fault that they begin, and which files they write: not in Python."""
    save, torch_save, write = accelerator.save_state, torch.save, accelerate.utils.other.safe_save_file

    def told(*arguments: Any, **options: Any) -> Any:
        fault.stage("begin")
        return save(*arguments, **options)

    def told_torch_save(value: Any, file: Any, *arguments: Any, **options: Any) -> None:
        fault.write(file)
        torch_save(value, file, *arguments, **options)

    def told_write(tensors: Any, file: Any, *arguments: Any, **options: Any) -> None:
        fault.write(file)
        write(tensors, file, *arguments, **options)

    accelerator.save_state = told  # type: ignore[method-assign]
    torch.save, accelerate.utils.other.safe_save_file = told_torch_save, told_write


# ---- several starts on one disk ------------------------------------------------------------------


def starts(trial: dict[str, Any], rank: int, emit: Emit) -> None:
    """Start again and again in processes of their own, and copy the run directory out after each.

    trial["starts"]: options of each start; `make_room` first removes what a fault filled the disk with.
    """
    for number, options in enumerate(trial["starts"]):
        if options.get("make_room"):
            (Path(trial["run"]).parent / "ballast").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                TRAINERS[trial["trainer"]](trial | options, rank, emit)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        copy = Path(trial["out"]) / f"start-{number}"
        if Path(trial["run"]).exists():
            shutil.copytree(trial["run"], copy)
        emit([], {"exit": os.waitstatus_to_exitcode(status), "run": str(copy)})


TRAINERS = {"train": ours, "train usual": usual}
