"""The commands `mim tokens ...`: what they take and print. The work is done in `mim/make_tokens.py`."""

from __future__ import annotations

from pathlib import Path

import click

from mim.commands.shards import plugin_option, tell


@click.group()
def tokens() -> None:
    """Make a token cache: the codes of K views of every image, so that training runs without the tokenizer.

    \b
    Example:
      mim tokens make beit_vittiny_cifar10 --views 20 --out tokens/cifar10
      mim train beit_vittiny_cifar10 data.views=20 tokens=tokens/cifar10
    """


@tokens.command("make")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--views", type=click.IntRange(min=1), help="K views of every image; default: data.views of the recipe.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the cache.")
@click.option("--part", help="i/n: only every n-th shard, from the i-th; then `mim tokens join OUT`.")
@click.option("--dry-run", is_flag=True, help="Print the size and an estimate of the time, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@plugin_option
def tokens_make(
    recipe: str,
    overrides: tuple[str, ...],
    views: int | None,
    out: Path,
    part: str | None,
    dry_run: bool,
    as_json: bool,
    plugins: tuple[str, ...],
) -> None:
    """Write the codes that RECIPE's tokenizer gives K views of every training image to OUT.

    The views are those that RECIPE shows with data.views=K, so the options that change them must be those of the
    training. After a kill the same command goes on; made again, it repairs what is damaged. Under `accelerate launch`
    or torchrun every process takes shards of its own.

    \b
    Examples:
      mim tokens make beit_vittiny_cifar10 tokenizer.path=runs/dvae --views 20 --out tokens/cifar10 --dry-run
      mim tokens make beit_vittiny_cifar10 tokenizer.path=runs/dvae --views 20 --out tokens/cifar10
      mim tokens make beit_vitb16_in1k --views 10 --out tokens/in1k --part 3/8
      torchrun --nproc_per_node 8 -m mim tokens make beit_vitb16_in1k --views 10 --out tokens/in1k
    """
    from mim import config
    from mim.data.parts import parse_part
    from mim.make_tokens import make

    with config.plugins(plugins):
        report = make(recipe, list(overrides), out, views=views, part=parse_part(part), dry_run=dry_run)
    if report is not None:  # one process tells
        tell(report, as_json)


@tokens.command("join")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def tokens_join(out: Path, as_json: bool) -> None:
    """Join what all parts of `make` left in OUT; may be repeated.

    \b
    Example:
      mim tokens join tokens/in1k
    """
    from mim.make_tokens import join

    tell(join(out), as_json)
