"""The commands `mim shards ...`: what they take and print. The work is done in `mim/data`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

plugin_option = click.option(
    "--plugin", "plugins", multiple=True, metavar="PKG", help="Package whose code a dotted name may import; repeatable."
)


@click.group()
def shards() -> None:
    """Make, index, verify and look into WebDataset shards.

    \b
    Examples:
      mim shards make data/cifar10/train shards/cifar10 --labels-from-folders --val-ratio 0.1
      mim shards verify shards/cifar10/train --decode
    """


@shards.command("make")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--labels-from-folders", is_flag=True, help="The first folder below SOURCE is the class.")
@click.option("--labels", help="cls: the labels of tars. A column's name: those of a saved dataset.")
@click.option("--val-ratio", default=0.0, show_default=True, help="Share held out in OUT/val; the rest is OUT/train.")
@click.option("--shard-size", default=1000, show_default=True, help="Images per shard.")
@click.option("--resize", metavar="short=N", help="Shrink images whose short side exceeds N pixels, as JPEG.")
@click.option("--quality", type=int, help="Of the JPEGs that --resize writes; default: 90.")
@click.option("--masks", help="Folder of PNGs with the class of every pixel, a/x.png beside SOURCE's a/x.jpg.")
@click.option("--classes", help="Of the masks: how many, or a file of one name per line; default: those that occur.")
@click.option("--mask-suffix", metavar="A=B", help="The mask of a/xA.jpg is a/xB.png.")
@click.option("--zero-ignored", is_flag=True, help="0 in a mask is no class, the others move down by one (ADE20K).")
@click.option("--skip-unpaired", is_flag=True, help="Leave images without a mask aside, and masks without an image.")
@click.option("--seed", default=0, show_default=True, help="Of the shuffle and the split.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the allowed CPUs.")
@click.option("--max-left-out", type=int, help="Unreadable images accepted; default: 1 % but at least 10.")
@click.option("--part", help="i/n: only every n-th shard, from the i-th; then `mim shards join OUT`.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def shards_make(source: str, out: Path, resize: str | None, part: str | None, as_json: bool, **options: Any) -> None:
    """Write the images of SOURCE as WebDataset shards to OUT.

    SOURCE is a folder of images (any nesting, labelled or not), a list or CSV (path[,label]), a tar or a folder of
    tars, or a Hugging Face dataset saved to disk. Every image is decoded once; one that cannot be read is named,
    counted and left out. After a kill the same command goes on.

    \b
    Examples:
      mim shards make photos/ shards/photos --val-ratio 0.05
      mim shards make data/cifar10/train shards/cifar10 --labels-from-folders
      mim shards make photos.csv shards/photos --resize short=256 --quality 90
      mim shards make tars/ shards/photos --labels cls --part 3/8
      mim shards make images/ shards/ade20k --masks annotations/ --zero-ignored --classes names.txt
    """
    from mim.data.make import make
    from mim.data.parts import parse_part

    tell(make(source, out, short=parse_resize(resize), part=parse_part(part), **options), as_json)


@shards.command("join")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def shards_join(out: Path, as_json: bool) -> None:
    """Join what all parts of `make`, `index` or `verify` left in OUT; may be repeated.

    Of `verify` it tells what a run without parts would: also duplicates between parts, with the same exit code.

    \b
    Example:
      mim shards join shards/photos
    """
    from mim.data.join import join

    report = join(out)
    tell(report, as_json)
    if not report.clean:
        sys.exit(65)


@shards.command("inspect")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write a contact sheet: FILE.png or FILE.html.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_inspect(dataset: Path, sheet: Path | None, as_json: bool) -> None:
    """Show counts, classes, sizes and pixel statistics of a dataset folder, and pictures if asked.

    \b
    Examples:
      mim shards inspect shards/cifar10/train
      mim shards inspect shards/cifar10/train --sheet cifar10.html
    """
    from mim.data.shards import inspect
    from mim.data.sheet import write_sheet

    found = inspect(dataset)
    if sheet is not None:
        found["sheet"] = str(write_sheet(dataset, sheet))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        click.echo(f"{name:20} {json.dumps(value) if isinstance(value, (dict, list)) else value}")


@shards.command("reshard")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shards", "num_shards", type=int, required=True, help="How many shards to write.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the allowed CPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def shards_reshard(dataset: Path, out: Path, num_shards: int, workers: int | None, as_json: bool) -> None:
    """Copy the samples of DATASET, in their order and byte for byte, into another number of shards.

    \b
    Example:
      mim shards reshard shards/photos/train shards/photos-64 --shards 64
    """
    from mim.data.reshard import reshard

    tell(reshard(dataset, out, num_shards=num_shards, workers=workers), as_json)


@shards.command("index")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--headers-only", is_flag=True, help="Read only the tars' headers, by ranges: no CRC32, no sha256.")
@click.option("--labels", type=click.Choice(["cls"]), help="Read the class of each sample from its member .cls.")
@click.option("--image", help="Ending of the image member, for samples that have several or an unusual one.")
@click.option("--label-maps", metavar="ENDING", help="Of the member with the class of every pixel, e.g. seg.png.")
@click.option("--classes", "pixel_classes", help="Of the label maps: how many, or a file of one name per line.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the allowed CPUs.")
@click.option("--part", help="i/n: only every n-th tar, from the i-th; then `mim shards join OUT`.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def shards_index(urls: tuple[str, ...], out: Path, part: str | None, as_json: bool, **options: Any) -> None:
    """Turn an existing WebDataset into a dataset folder OUT without rewriting it.

    A URL is a tar, a folder of tars, or an address (http, https, s3, gs, hf); {000..012} stands for numbers.

    \b
    Examples:
      mim shards index /data/imagenet shards/imagenet --labels cls
      mim shards index 'https://example.org/train-{0000..0127}.tar' shards/web --headers-only
      mim shards index /data/street shards/street --label-maps seg.png --classes 19
    """
    from mim.data.index import index
    from mim.data.parts import parse_part

    tell(index(list(urls), out, part=parse_part(part), **options), as_json)


@shards.command("verify")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--decode", is_flag=True, help="Decode every image too, and write DATASET/quarantine.json.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the allowed CPUs.")
@click.option("--part", help="i/n: only every n-th shard, from the i-th; then `mim shards join DATASET`.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def shards_verify(dataset: Path, decode: bool, workers: int | None, part: str | None, as_json: bool) -> None:
    """Read every byte of DATASET once and name whatever differs from its lock; exit code 65 when something does.

    \b
    Examples:
      mim shards verify shards/cifar10/train
      mim shards verify shards/cifar10/train --decode --json
    """
    from mim.data.parts import parse_part
    from mim.data.verify import verify

    report = verify(dataset, decode=decode, workers=workers, part=parse_part(part))
    tell(report, as_json)
    if not report.clean:
        sys.exit(65)


def parse_resize(text: str | None) -> int | None:
    """Read `short=N`."""
    from mim.config import ConfigError

    if text is None:
        return None
    name, _, number = text.partition("=")
    if name != "short" or not number.isdigit():
        raise ConfigError(f"--resize {text} is unknown; write --resize short=N with N pixels, e.g. short=256")
    return int(number)


def tell(report: Any, as_json: bool) -> None:
    """Print a report, for people or as JSON."""
    from mim import config

    click.echo(json.dumps(config.plain(report), indent=1) if as_json else report.text())
