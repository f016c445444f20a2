"""Whether the processes of a launch can train together: `mim doctor --cluster`, the first thing that a job runs.

Every rank tells what it is and has, and what it found wrong; rank 0 compares and judges, all end with its verdict.
What they tell travels through the key-value store of the launch, not through the collectives that are under test:
a broken network between GPUs still ends in a table and a sentence. Nothing waits longer than the deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mim.clusters import doctor
from mim.clusters.agreement import judge
from mim.clusters.meeting import collect, first_line, leave, lonely, meet, wait_for
from mim.config import ConfigError
from mim.job import Config

SEEN = 10.0  # seconds that a network file system may take to show a new file to another node
NUM_BYTES = 16 * 2**20  # of the timed all-reduce


@dataclass
class Checked:
    """What rank 0 judged: a row per rank, and problems, one sentence each."""

    rows: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    rank: int = 0  # of this process
    hangs: bool = False  # a thread of this process waits for the network and cannot be ended

    def text(self) -> str:
        """The table of ranks and the problems, for people."""
        lines = [f"{'rank':>4}  {'node':>4}  {'host':20} {'address':15} {'device':28} {'all-reduce':>12}"]
        for row in self.rows:
            speed = f"{row['all_reduce']:.1f} Gbit/s" if row.get("all_reduce") else "failed"
            place = f"{row['rank']:4}  {row['node']:>4}  {row['host']:20} {row['address']:15}"
            lines.append(f"{place} {row['device']:28} {speed:>12}")
        lines += [f"problem   {problem}" for problem in self.problems]
        return "\n".join([*lines, *([] if self.problems else [f"{len(self.rows)} ranks agree, no problem found"])])


def check(
    cfg: Config | None, run: Path | None, *, processes: int | None = None, seconds: float = 60.0, cpu: bool = False
) -> Checked:
    """Meet the other ranks of this launch, look at each and test an all-reduce; every wait ends after `seconds`.

    `processes` is how many there should be. Raises ConfigError when the ranks do not meet at all.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    alone = lonely(os.environ, processes)
    if alone is not None:
        raise ConfigError(alone)
    store = meet(rank, world, seconds)
    row = describe(rank, world, cfg, run, cpu=cpu)
    row["clock"] = clock(store, rank, world, seconds)
    own = doctor.problems(row["facts"]) + crowded(row)
    if cfg is not None:
        row["locks"] = doctor.locks(cfg)
        own += doctor.missing(cfg, row["locks"])
    if run is not None:
        own += writable(store, run, rank, world, seconds)
    speed, trouble, hangs = reduced(store, rank, world, seconds, on_gpu=row["gpu"] is not None)
    own += [trouble] if trouble else []
    store.set(f"row/{rank}", json.dumps(row | {"all_reduce": speed, "problems": own}))
    if rank == 0:
        rows, silent = collect(store, world, seconds)
        found = Checked(rows, silent + judge(rows), rank, hangs)
        store.set("verdict", json.dumps({"rows": found.rows, "problems": found.problems}))
        leave(store, world)
        return found
    verdict = json.loads(wait_for(store, "verdict", 3 * seconds, "rank 0 gave no verdict"))
    store.set(f"left/{rank}", "1")
    return Checked(verdict["rows"], verdict["problems"], rank, hangs)


# ---- one rank ------------------------------------------------------------------------------------


def describe(rank: int, world: int, cfg: Config | None, run: Path | None, *, cpu: bool) -> dict[str, Any]:
    """What this rank is and where: facts that only it knows."""
    facts = doctor.facts(doctor.folders_of(cfg, run))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = facts["devices"][local] if not cpu and local < len(facts["devices"]) else None
    return {
        "rank": rank,
        "local": local,
        "node": os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0",
        "host": facts["host"],
        "address": address() if world > 1 else "127.0.0.1",
        "device": gpu["name"] if gpu is not None else "cpu",
        "gpu": gpu["uuid"] if gpu is not None else None,
        "num_gpus": 0 if cpu else len(facts["devices"]),
        "facts": facts,
    }


def address() -> str:
    """The address of this host towards the one that holds the store. Nothing is sent."""
    try:
        family, kind, *_, target = socket.getaddrinfo(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "unknown"


def crowded(row: dict[str, Any]) -> list[str]:
    """Whether a node has fewer GPUs, or fewer CPUs, than processes."""
    local_world, cpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), row["facts"]["cpus"]
    lines = []
    if 0 < row["num_gpus"] < local_world:
        lines.append(
            f"{local_world} processes share {row['num_gpus']} GPUs; start one per GPU (--nproc_per_node "
            f"{row['num_gpus']}), or ask for more"
        )
    if cpus < local_world:
        lines.append(
            f"{local_world} processes share {cpus} CPU{'s' * (cpus > 1)}; ask for more, in Slurm by --cpus-per-task, "
            f"of which srun gives 1 unless told"
        )
    return lines


def clock(store: dist.Store, rank: int, world: int, seconds: float) -> float:
    """Seconds that this clock is ahead of rank 0's, to within the time that a message takes."""
    store.set(f"listens/{rank}", "1")
    if rank > 0:
        told = float(wait_for(store, "clock", 2 * seconds, "rank 0 did not tell its time"))
        return time.time() - told
    for other in range(1, world):  # who does not yet listen would take its own delay for a difference
        wait_for(store, f"listens/{other}", seconds, f"rank {other} did not come to compare clocks")
    store.set("clock", repr(time.time()))
    return 0.0


def writable(store: dist.Store, run: Path, rank: int, world: int, seconds: float) -> list[str]:
    """Write, read and remove a file in the run directory, and look there for what rank 0 wrote."""
    lines: list[str] = []
    existed = run.is_dir()
    if rank == 0:
        token = secrets.token_hex(8)
        mark = run / f".doctor-{token}"
        lines += tried(lambda: run.mkdir(parents=True, exist_ok=True), run)
        lines = lines or tried(lambda: mark.write_text(token), run)
        store.set("token", token)
    else:
        token = wait_for(store, "token", seconds, "rank 0 wrote nothing into the run directory")
        mark = run / f".doctor-{token}"
    own = run / f".doctor-{token}-{rank}"
    if not lines:
        seen = time.monotonic() + SEEN
        while not mark.exists() and time.monotonic() < seen:
            time.sleep(0.1)
        if not mark.exists():
            lines.append(
                f"{run} is not the folder that rank 0 writes: its file is not there after {SEEN:.0f} s; put train.run "
                f"on a file system that all nodes share"
            )
        elif rank > 0:
            lines += tried(lambda: own.write_text(token), run) or tried(own.unlink, run)
    store.set(f"wrote/{rank}", "1")
    if rank == 0:
        deadline = time.monotonic() + seconds
        while not all(store.check([f"wrote/{r}"]) for r in range(world)) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # told above, when it could not even be written
            mark.unlink(missing_ok=True)
            if not existed and not any(run.iterdir()):
                run.rmdir()
    return lines


def tried(act: Callable[[], Any], run: Path) -> list[str]:
    """Do something in the run directory; an OSError is a problem in words."""
    try:
        act()
    except OSError as error:
        return [
            f"{run} cannot be written ({error.strerror}); correct its owner and rights, or choose another train.run"
        ]
    return []


def reduced(
    store: dist.Store, rank: int, world: int, seconds: float, *, on_gpu: bool
) -> tuple[float | None, str | None, bool]:
    """Add up the ranks over the network that training uses: Gbit/s, or None and what went wrong; whether it hangs.

    In a thread of its own, for it may hang where no timeout reaches: then it is left behind.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    answer: list[float | str] = []

    def work() -> None:
        try:
            if on_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=10 * seconds),  # NCCL ends the process then: not before the verdict
            )
            total = torch.full((1,), float(rank), device=device)
            dist.all_reduce(total)
            if total.item() != world * (world - 1) / 2:
                answer.append(f"the all-reduce gave {total.item()} instead of {world * (world - 1) / 2}")
                return
            values = torch.ones(NUM_BYTES // 4, device=device)
            began = time.perf_counter()
            dist.all_reduce(values)
            values[0].item()  # waits for the device
            speed = 8e-9 * NUM_BYTES / (time.perf_counter() - began)
            dist.destroy_process_group()
            answer.append(speed)
        except (RuntimeError, ValueError, OSError) as error:
            answer.append(first_line(error))

    thread = threading.Thread(target=work, name="all-reduce", daemon=True)
    thread.start()
    thread.join(seconds)
    if answer and isinstance(answer[0], float):
        return answer[0], None, False
    backend, variable = ("NCCL", "NCCL_SOCKET_IFNAME") if on_gpu else ("gloo", "GLOO_SOCKET_IFNAME")
    reason = str(answer[0]) if answer else f"not done after {seconds:.0f} s"
    sentence = (
        f"the all-reduce over {backend} failed ({reason}); let {variable} name the interface that reaches the other "
        f"nodes (ip -brief address), and open its ports between them"
    )
    return None, sentence, thread.is_alive()
