"""How the processes of a launch meet before anything of theirs is trusted: through its key-value store alone.

A rank that does not come, or that was never told of the others, is named; nothing waits longer than its deadline.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mim.clusters.agreement import ranks_text
from mim.config import ConfigError

FAREWELL = 10.0  # seconds that the process that may hold the store waits for the others to have read the verdict


def lonely(environment: Mapping[str, str], processes: int | None = None) -> str | None:
    """Why this process is a world of its own, or of its node, although more were launched; None when it is not."""
    world = environment.get("WORLD_SIZE")
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        launched = int(environment.get(name, "1"))
        if launched > 1 and world is None:
            return (
                f"{name}={launched} processes were launched, but WORLD_SIZE is not set: each would train alone, into "
                f"the same run directory; let torchrun or accelerate launch start them (mim launch slurm writes that)"
            )
    if processes is not None and int(world or "1") != processes:
        return (
            f"this world has {world or 1} processes instead of {processes}: its nodes did not meet; give every node "
            f"the same --nnodes, --rdzv_id and --rdzv_endpoint, the address of one of them and not localhost"
        )
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or "1")
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if world is not None and nodes > 1 and int(world) <= local:
        return (
            f"Slurm gave {nodes} nodes, but this world of {world} processes is on one: start torchrun by srun with "
            f"--nnodes {nodes}, as mim launch slurm writes it"
        )
    return None


def meet(rank: int, world: int, seconds: float) -> dist.Store:
    """The store of the launch, once all ranks have come to it. Raises ConfigError that names who is missing."""
    timeout = timedelta(seconds=seconds)
    if world == 1:
        return dist.HashStore()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        opened = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world,
            is_master=rank == 0 and not launcher_holds_it,
            timeout=timeout,
            wait_for_workers=False,  # who is missing is asked below, by name
        )
        store = dist.PrefixStore("mim-doctor", opened)
        store.set(f"here/{rank}", socket.gethostname())
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()} did not reach {place} within {seconds:.0f} s "
            f"({first_line(error)}); check that the name resolves there and that no firewall closes the port"
        ) from error
    deadline = time.monotonic() + seconds
    while absent := [r for r in range(world) if not store.check([f"here/{r}"])]:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{ranks_text(absent)} of {world} did not come to {place} within {seconds:.0f} s; look at the logs of "
                f"their nodes"
            )
        time.sleep(0.05)
    return store


def wait_for(store: dist.Store, key: str, seconds: float, otherwise: str) -> str:
    """What stands under a key of the store, when it stands there. Raises ConfigError after so many seconds."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise ConfigError(f"{otherwise} within {seconds:.0f} s; its process has died or hangs: see its log") from error
    return store.get(key).decode()


def collect(store: dist.Store, world: int, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all ranks that tell one until the deadline, and a problem for those that do not."""
    deadline = time.monotonic() + 2 * seconds
    while absent := [r for r in range(world) if not store.check([f"row/{r}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    rows = [json.loads(store.get(f"row/{r}")) for r in range(world) if r not in absent]
    silent = f"{ranks_text(absent)} came and then said nothing for {2 * seconds:.0f} s; see the logs of their nodes"
    return rows, [silent] if absent else []


def leave(store: dist.Store, world: int) -> None:
    """Let the others read the verdict before the process that may hold the store ends."""
    deadline = time.monotonic() + FAREWELL
    while not all(store.check([f"left/{r}"]) for r in range(1, world)) and time.monotonic() < deadline:
        time.sleep(0.05)


def first_line(error: BaseException) -> str:
    """The first line of an error that a library raised, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
