"""The command `mim plan`: what it takes. The work is done in mim/plan.py."""

from __future__ import annotations

import sys
from typing import Any

import click

from mim.commands.shards import plugin_option


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", metavar="NAME", help="h100, h200, a100, rtx4090 ... or cpu; default: what this machine has.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="How many, one process each.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak that the training uses.")
@click.option("--measure", is_flag=True, help="Find that share, and the memory, by real steps on this machine.")
@click.option("--images", type=click.IntRange(1), help="Plan for so many, without opening the data.")
@click.option("--per-core", type=click.FloatRange(0, min_open=True), help="Images/s that a core of the loader makes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool, plugins: tuple[str, ...], **wishes: Any) -> None:
    """Tell what RECIPE takes on given hardware, and propose precision and batch split.

    Memory, images/s, hours, energy, checkpoints and the CPU cores of the loader. What the command line sets of
    train.precision, micro_batches, shard and activation_checkpointing stays; the rest is proposed.

    \b
    Examples:
      mim plan mae_vitl16_in1k --gpu h100 --gpus 8 --images 1281167
      mim plan mae_vitl16_in1k --gpu a100 --gpus 64 --images 1281167 --mfu 0.45 train.micro_batches=1
      mim plan mae_vittiny_cifar10 data.path=shards/cifar10 --measure
    """
    from mim import config
    from mim import plan as planning

    with config.plugins(plugins):
        sys.exit(planning.main(recipe, list(overrides), planning.Wish(**wishes), as_json=as_json))
