"""What it costs a step that ranks can agree to stop: the vote, beside collectives that would do the same.

    torchrun --standalone --nproc_per_node 2 benchmarks/stopping.py --json out.json

Microseconds of wall time and of processor time of the main thread, medians of interleaved rounds: the vote and the
heartbeat of a step (mim/watch/stopping.py, mim/watch/watchdog.py); an all-reduce of one number by gloo, waited for; and
one that is read a step later.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist

from mim.watch.attendant import Attendant
from mim.watch.board import Board
from mim.watch.status import Status

PLACES = ("data", "forward", "backward", "update", "log", "decision")
STEPS = {"vote and heartbeat": 20000, "all-reduce": 500, "all-reduce, read a step later": 500}


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the numbers there.")
def main(rounds: int, out: Path | None) -> None:
    dist.init_process_group("gloo")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        attendant = Attendant(Board.open(), Status(Path(folder), "none", 1), patience=600.0, deadline=None)
        with attendant.attending():
            attendant.stopping.begin(1)
            ways: dict[str, Callable[[int], None]] = dict(
                zip(STEPS, (lambda steps: vote(attendant, steps), waited, lagging), strict=True)
            )
            for _ in range(rounds):
                for name, way in ways.items():
                    dist.barrier()
                    began = time.perf_counter(), time.thread_time()
                    way(STEPS[name])
                    ended = time.perf_counter(), time.thread_time()
                    found[name].append((ended[0] - began[0], ended[1] - began[1]))
    if dist.get_rank() == 0:
        report(found, out)
    dist.destroy_process_group()


def vote(attendant: Attendant, steps: int) -> None:
    for step in range(1, steps + 1):
        for place in PLACES:
            attendant.at(place, step)
        attendant.stopping(step)


def waited(steps: int) -> None:
    for _ in range(steps):
        dist.all_reduce(torch.zeros(1))


def lagging(steps: int) -> None:
    before = None
    for _ in range(steps):
        if before is not None:
            before.wait()
        before = dist.all_reduce(torch.zeros(1), async_op=True)
    if before is not None:
        before.wait()


def report(found: dict[str, list[tuple[float, float]]], out: Path | None) -> None:
    medians = {
        name: [round(statistics.median(column) / STEPS[name] * 1e6, 1) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }
    click.echo(f"{'microseconds per step':32}{'wall':>10}{'processor':>12}")
    for name, (wall, processor) in medians.items():
        click.echo(f"{name:32}{wall:10.1f}{processor:12.1f}")
    if out is not None:
        out.write_text(json.dumps({"ranks": dist.get_world_size(), "microseconds": medians}, indent=1))


if __name__ == "__main__":
    main()
