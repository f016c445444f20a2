"""The commands `mim doctor` and `mim launch ...`: what they take and print. The work is done in mim/clusters/doctor.py,
mim/clusters/cluster.py and mim/clusters/slurm.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

UNFIT = 69  # exit code of a machine or cluster with problems (sysexits: service unavailable)


@click.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", is_flag=True, help="Check all processes of this launch together; run by torchrun or srun.")
@click.option("--processes", type=click.IntRange(1), help="With --cluster: how many processes there must be.")
@click.option("--seconds", default=60.0, show_default=True, help="With --cluster: the longest that anything may take.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    recipe: str | None,
    overrides: tuple[str, ...],
    cluster: bool,
    processes: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Tell what this machine has, and what stands in the way of a run; exit code 69 when something does.

    With RECIPE its dataset, tokenizer and run directory are looked at, too. With --cluster all processes of a launch
    are checked together: that they meet and are as many as launched, that they add up a number over the network of
    the training, that clocks, code, versions and dataset locks agree, and that all write one run directory.

    \b
    Examples:
      mim doctor
      mim doctor mae_vittiny_cifar10 data.path=shards/cifar10 --json
      torchrun --nproc_per_node 8 -m mim doctor --cluster mae_vittiny_cifar10 data.path=shards/cifar10
    """
    from mim import config
    from mim.clusters import doctor as machine
    from mim.clusters import slurm
    from mim.job import Config

    if not cluster and processes is not None:
        raise click.UsageError("--processes belongs to --cluster; add it, or leave --processes out")
    cfg = config.typed(Config, config.read(recipe, overrides)) if recipe is not None else None
    run = slurm.run_directory(cfg, recipe) if cfg is not None and recipe is not None else None
    if cluster:
        from mim.clusters.cluster import check

        cpu = cfg is not None and cfg.train.cpu
        found = check(cfg, run, processes=processes, seconds=seconds, cpu=cpu)
        if found.rank == 0:
            rows: dict[str, Any] = {"ranks": found.rows, "problems": found.problems}
            click.echo(json.dumps(rows, indent=1) if as_json else found.text())
        if found.hangs:  # no thread can be ended that waits inside a network library
            sys.stdout.flush()
            os._exit(UNFIT)
        sys.exit(UNFIT if found.problems else 0)
    facts = machine.facts(machine.folders_of(cfg, run))
    problems = machine.problems(facts)
    if cfg is not None:
        problems += machine.missing(cfg, machine.locks(cfg))
    click.echo(json.dumps({**facts, "problems": problems}, indent=1) if as_json else machine.text(facts, problems))
    sys.exit(UNFIT if problems else 0)


@click.group()
def launch() -> None:
    """Write the job that runs a training on a cluster, and tell scripts how one ended.

    \b
    Example:
      mim launch slurm mae_vittiny_cifar10 data.path=shards/cifar10 --nodes 2 --gpus 8 --time 24:00:00
    """


@launch.command("slurm")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), required=True, help="Machines.")
@click.option("--gpus", type=click.IntRange(0), required=True, help="Per node; 0: one process per node on its CPUs.")
@click.option("--time", required=True, help="Limit of one job, as Slurm writes it: 24:00:00 or 3-00:00:00.")
@click.option("--partition", help="Of the cluster; default: its own default.")
@click.option("--account", help="Who pays.")
@click.option("--cpus", type=click.IntRange(1), help="Per node; default: 8 for each GPU.")
@click.option("--option", "more", multiple=True, metavar="KEY=VALUE", help="A further option of sbatch; repeatable.")
@click.option("--accelerate-config", metavar="FILE", help="Launch by accelerate with this file; default: by torchrun.")
@click.option("--python", help="Interpreter as the nodes see it; default: the one that runs this command.")
@click.option("--setup", multiple=True, metavar="LINE", help="Shell that prepares the environment; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the script to this file instead of printing it.")
@click.option("--submit", is_flag=True, help="Hand the script to sbatch.")
def launch_slurm(
    recipe: str, overrides: tuple[str, ...], python: str | None, out: Path | None, submit: bool, **asked: Any
) -> None:
    """Write the batch script that trains RECIPE on a Slurm cluster; nothing is submitted unless asked.

    The job checks its nodes (mim doctor --cluster), trains, saves five minutes before its time limit and queues itself
    again, as long as it advances. Keys and batch size are checked now, before the queue.

    \b
    Examples:
      mim launch slurm mae_vittiny_cifar10 data.path=shards/cifar10 --nodes 1 --gpus 8 --time 12:00:00
      mim launch slurm mae_vitl16_in1k data.path=shards/in1k --nodes 8 --gpus 8 --time 24:00:00 --out mae.sbatch
      mim launch slurm mae_vitl16_in1k data.path=shards/in1k --nodes 2 --gpus 8 --time 24:00:00 --submit
    """
    from mim.clusters import slurm
    from mim.log import aside

    request = slurm.Request(python=python or sys.executable, **asked)
    text = slurm.script(recipe, overrides, request, ["mim", *sys.argv[1:]])
    if out is not None:
        with aside(out) as file:
            file.write(text)
        click.echo(str(out))
    elif not submit:
        click.echo(text, nl=False)
    if submit:
        click.echo(slurm.submit(text))


@launch.command("outcome")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", "print_step", is_flag=True, help="Only print the step of its newest checkpoint, 0 without one.")
@click.option("--since", type=int, default=0, show_default=True, help="What --step printed when the run was started.")
def launch_outcome(run: Path, print_step: bool, since: int) -> None:
    """Tell how RUN ended, for scripts: exit code 0 done, 75 start it again, anything else not.

    75 asks for more than a stop or a crash: the run must have been saved at a later step than --since, so that what
    fails at the same place every time is not repeated for ever. 2, 65 and 74 are the run's own (configuration, data,
    storage), 70 is all else.

    \b
    Examples:
      mim launch outcome runs/mae_vittiny_cifar10 --step
      mim launch outcome runs/mae_vittiny_cifar10 --since 1200
    """
    from mim.watch import requeue

    if print_step:
        click.echo(requeue.saved_step(run))
        return
    found = requeue.outcome(run, since)
    click.echo(found.sentence)
    sys.exit(found.code)
