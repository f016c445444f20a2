"""The command line. Nothing heavy is imported before a command runs, so that `mim --help` answers at once.

Exit codes: 0 done, 2 wrong command or configuration, 65 data, 74 storage, 70 internal, 75 stopped and resumable.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import click

from mim import __version__
from mim.commands.checkpoints import checkpoints
from mim.commands.cluster import doctor, launch
from mim.commands.plan import plan
from mim.commands.report import report
from mim.commands.shards import plugin_option, shards
from mim.commands.status import status
from mim.commands.tokens import tokens

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mimstream")
def cli() -> None:
    """Masked image modeling pretraining: shards, tokenizers, BEiT, MAE, probes, exports.

    \b
    Example, from a folder of photographs to a timm backbone:
      mim shards make photos/ shards/photos --val-ratio 0.05
      mim train mae_vittiny_cifar10 data.path=shards/photos data.image_size=64 encoder.patch_size=8
      mim export timm runs/mae_vittiny_cifar10 exports/photos
    """


@cli.command()
@click.option("--images", type=click.Path(path_type=Path), help="Your own folder of images instead of the photographs.")
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for everything."
)
@click.option("--seed", default=0, show_default=True, help="Of crops, weights and masks.")
def demo(images: Path | None, out: Path, seed: int) -> None:
    """Run the whole pipeline on real photographs in a few CPU minutes and print one table.

    \b
    Examples:
      mim demo
      mim demo --images ~/photos --out demo-photos
    """
    from mim import demo as demonstration

    sys.exit(demonstration.main(images, out, seed=seed))


cli.add_command(shards)
cli.add_command(tokens)
cli.add_command(checkpoints)
cli.add_command(status)
cli.add_command(report)
cli.add_command(doctor)
cli.add_command(launch)
cli.add_command(plan)


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check everything, print what the recipe comes to, and stop.")
@click.option("--images", type=click.IntRange(1), help="With --dry-run: plan for so many, without opening the data.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
@plugin_option
def train(
    recipe: str, overrides: tuple[str, ...], dry_run: bool, images: int | None, as_json: bool, plugins: tuple[str, ...]
) -> None:
    """Train RECIPE (a name or a YAML file); the same command resumes after any stop.

    \b
    Examples:
      mim train mae_vittiny_cifar10 data.path=shards/cifar10 --dry-run
      mim train mae_vitl16_in1k train.micro_batches=8 --dry-run --images 1281167
      mim train mae_vittiny_cifar10 data.path=shards/cifar10 optim.length='20 epochs'
      mim train my_recipe.yaml --plugin mypackage
      accelerate launch -m mim train mae_vittiny_cifar10 data.path=shards/cifar10
      torchrun --nproc_per_node 8 -m mim train beit_vittiny_cifar10 tokenizer.path=runs/dvae_cifar10
    """
    from mim import config

    if not dry_run and (images is not None or as_json):
        raise click.UsageError("--images and --json belong to --dry-run; add it, or leave them out")
    with config.plugins(plugins):
        if dry_run:
            from mim import dry_run as rehearsed

            sys.exit(rehearsed.main(recipe, list(overrides), images=images, as_json=as_json))
        from mim.train import main as run

        sys.exit(run(recipe, list(overrides)))


@cli.group()
def bench() -> None:
    """Measure the parts of a recipe on this machine.

    \b
    Example:
      mim bench data mae_vittiny_cifar10 data.path=shards/cifar10
    """


@bench.command("data")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--seconds", default=3.0, show_default=True, help="Of each of the three measurements.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
def bench_data(
    recipe: str, overrides: tuple[str, ...], seconds: float, as_json: bool, plugins: tuple[str, ...]
) -> None:
    """Measure images/s of RECIPE's loader by stage on its data, name what bounds it and what to change.

    \b
    Examples:
      mim bench data mae_vittiny_cifar10 data.path=shards/cifar10
      mim bench data mae_vittiny_cifar10 data.path=shards/cifar10 train.workers=4 --json
    """
    from mim import config, loader_speed
    from mim.job import Config

    with config.plugins(plugins):
        found = loader_speed.measure(config.typed(Config, config.read(recipe, overrides)), seconds=seconds)
    click.echo(json.dumps(found.json(), indent=1) if as_json else found.text())


@cli.command("eval")
@click.argument("name")
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--step", type=int, help="Checkpoint to evaluate; default: the newest valid one.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for pictures; default: RUN/pictures.")
@click.option("--force", is_flag=True, help="Replace pictures of the same name.")
@plugin_option
def evaluate(
    name: str,
    model: str,
    overrides: tuple[str, ...],
    step: int | None,
    out: Path | None,
    force: bool,
    plugins: tuple[str, ...],
) -> None:
    """Run evaluation NAME on a MODEL and print what it yields as JSON.

    MODEL is a run directory, a folder of `mim export timm`, or a timm name (timm:NAME, too). The last two need images,
    as data.path=SHARDS, and so may a run be judged on others; data.image_size and the like go with them. A timm name
    has random weights, unless pretrained=true (downloads them) or init=FILE.

    MODEL may be a tokenizer's folder (`mim tokenizer import`), too, with the images to look at as data.KEY=VALUE. The
    score card of its codebook is then written into the folder.

    \b
    Examples:
      mim eval knn runs/mae_vittiny_cifar10
      mim eval knn runs/mae_vittiny_cifar10 layers=[4,8] pools=[class] cache=features/
      mim eval ridge runs/mae_vittiny_cifar10 pool=class data.path=shards/photos
      mim eval knn exports/cifar10 data.path=shards/photos
      mim eval knn vit_small_patch16_224.augreg_in21k pretrained=true data.path=shards/photos
      mim eval embed runs/mae_vittiny_cifar10 shards/photos features/photos
      mim eval reconstruction runs/beit_vittiny_cifar10 num_images=16
      mim eval attention runs/mae_vittiny_cifar10 cat.jpg photos/ size=448
      mim eval pca vit_small_patch14_dinov2.lvd142m pretrained=true photos/
      mim eval codebook tokenizers/dalle data.path=shards/photos data.image_size=112
      torchrun --nproc_per_node 8 -m mim eval knn runs/mae_vittiny_cifar10
    """
    import torch

    import tokenizer as tokenizers
    from mim import build, config
    from mim.log import heard
    from mim.looking import record
    from mim.probing import features, judged

    main, device = launched()
    folder = Path(model)
    with config.plugins(plugins), heard(main):
        module, _ = config.component("mim.evals", {"name": name}, "eval")
        options = pairs(named_arguments(overrides, getattr(module, "ARGUMENTS", ())))
        data = nested({key.removeprefix("data."): options.pop(key) for key in list(options) if key.startswith("data.")})
        is_run, is_tokenizer = (folder / "config.yaml").is_file(), (folder / tokenizers.DESCRIPTION).is_file()
        if step is not None and not is_run and folder.exists():
            raise click.UsageError(f"--step chooses a checkpoint of a run, but {model} is none; leave it out")
        of_model = {} if is_run or is_tokenizer else {k: options.pop(k) for k in judged.OPTIONS if k in options}
        _, cfg = config.component("mim.evals", {"name": name, **options}, "eval")
        if is_tokenizer:
            loaded = build.load_tokenizer(folder, data)
        elif is_run:
            loaded = build.load_run(folder, step=step)
            loaded = judged.on(loaded, data) if data else loaded
        else:
            loaded = judged.load(model, data, of_model)
        for network in (loaded.objective, *loaded.frozen.values()):
            network.to(device)
        place = out or (folder if is_run or is_tokenizer else Path()) / "pictures"
        with torch.no_grad():
            numbers, pictures = record(module.run(loaded, cfg), place, loaded.step, main=main, replace=force)
        if not main:
            return
        facts = {"protocol": features.protocol(loaded, cfg)} if numbers else {}  # what they may be compared by
        if loaded.encoder is not None:
            facts["weights"] = features.weights_of(loaded)[:12]
    if is_tokenizer and name == "codebook" and not (folder / "manifest.json").exists():  # a checkpoint's are hashed
        tokenizers.write_card(folder, numbers)
    told = {"run": model, "step": loaded.step, "eval": name, **facts}
    click.echo(json.dumps({**told, **numbers, **pictures}, indent=1))


@cli.command()
@click.argument("target")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--step", type=int, help="Checkpoint to export; default: the newest valid one.")
@click.option("--push-to-hub", "repository", metavar="NAME", help="Upload the export to this repository afterwards.")
@plugin_option
def export(
    target: str,
    run: Path,
    out: Path,
    overrides: tuple[str, ...],
    step: int | None,
    repository: str | None,
    plugins: tuple[str, ...],
) -> None:
    """Export RUN to the folder OUT for TARGET (timm, transformers, onnx, torch), read it back there and compare.

    \b
    Examples:
      mim export timm runs/mae_vittiny_cifar10 exports/cifar10
      python -c "import timm; timm.create_model('local-dir:exports/cifar10', pretrained=True)"
      mim export onnx runs/mae_vittiny_cifar10 exports/onnx image_size=64 pool=class
      mim export timm runs/mae_vittiny_cifar10 exports/mine license=cc-by-4.0 --push-to-hub me/my-vit
    """
    from mim import build, config
    from mim.handover import hub

    if repository is not None:
        hub.check(repository)
    with config.plugins(plugins):
        module, cfg = config.component("mim.exports", {"name": target, **pairs(overrides)}, "export")
        loaded = build.load_run(run, step=step)
    report = {**module.export(loaded, out, cfg), "out": str(out)}
    if repository is not None:
        report["uploaded"] = hub.push(out, repository)
    click.echo(json.dumps(report, indent=1))


@cli.group("tokenizer")
def tokenizer_group() -> None:
    """Work with tokenizers that were trained elsewhere.

    \b
    Example:
      mim tokenizer import encoder.pkl decoder.pkl tokenizers/dalle
    """


@tokenizer_group.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def tokenizer_import(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Turn a released tokenizer into the folder OUT, which `tokenizer.path=OUT` of a BEiT recipe reads.

    FILES are OpenAI's encoder.pkl and decoder.pkl (in any order; whole networks or their state dicts), or one VQ-KD
    checkpoint of BEiT v2. They are data: no code in them is run. What became of every tensor stands in OUT/init.json.

    \b
    Examples:
      mim tokenizer import encoder.pkl decoder.pkl tokenizers/dalle
      mim tokenizer import vqkd_encoder_base_decoder_3x768x12_clip.pth tokenizers/vqkd
      mim eval codebook tokenizers/vqkd data.path=shards/photos
      mim train beit_vitb16_in1k data.path=shards/photos tokenizer.path=tokenizers/dalle
    """
    from mim.pretrained.released_tokenizers import import_tokenizer

    report = import_tokenizer(files, out)
    click.echo(json.dumps({**vars(report), "out": str(out)}, indent=1) if as_json else "\n".join(report.lines()))


def launched() -> tuple[bool, Any]:
    """Whether this process is the one that prints, and its device; joins the other processes of a launch."""
    import torch

    on_gpu = torch.accelerator.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=not on_gpu)
        return state.is_main_process, state.device
    return True, torch.accelerator.current_accelerator() if on_gpu else torch.device("cpu")


def named_arguments(arguments: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments as key=value: the first ones may be the values alone of these names, all others that of `NAME...`."""
    values = list(itertools.takewhile(lambda argument: "=" not in argument, arguments))
    rest = arguments[len(values) :]
    found = [
        f"{name.removesuffix('...')}={json.dumps(values[n:] if name.endswith('...') else values[n])}"
        for n, name in enumerate(names)
        if n < len(values)
    ]
    taken = len(values) if names and names[-1].endswith("...") else len(found)
    return (*found, *values[taken:], *rest)


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options with dotted keys as a section: {"a.b": 1} -> {"a": {"b": 1}}."""
    from mim.config import ConfigError

    section: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        inside = section
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"data.{key}: data.{parent} is given as a value, too; keep one of them")
        inside[last] = value
    return section


def pairs(overrides: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` arguments as a section; values are YAML scalars or lists."""
    import yaml

    from mim.config import ConfigError

    section = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an option; write key=value, e.g. pool=class")
        try:
            section[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r} is not an option: {' '.join(str(error).split())}") from error
    return section


def main() -> None:
    """Run a command and exit, also when a tracker's library would hold the process up with what hangs in it."""
    stop = None
    try:
        run()
    except SystemExit as found:
        stop = found
    trackers = sys.modules.get("mim.trackers")
    if trackers is not None and any(thread.name.startswith(trackers.LEFT) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        code = stop.code if stop is not None else 0
        os._exit(code if isinstance(code, int) else int(code is not None))
    if stop is not None:
        raise stop


def run() -> None:
    """Run a command; every error of a user ends in one sentence and an exit code, one of ours in a traceback and 70."""
    try:
        try:
            cli(standalone_mode=False)
        finally:
            leave_ranks()
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except Exception as error:
        from mim.watch.status import CODES, exit_code

        code = exit_code(error)
        if not isinstance(error, tuple(CODES)):
            traceback.print_exc()
            sys.exit(code)
        rank = os.environ.get("RANK", "0")
        text = one_sentence(str(error))
        click.echo(f"mim: {'' if rank == '0' else f'rank {rank}: '}{text}", err=True)
        sys.exit(code)


def leave_ranks() -> None:
    """End this process's part among several when its command ended well: threads that live on can abort its exit.

    After an error the others may wait in a collective, and the launcher ends them.
    """
    ended = sys.exc_info()[1]
    if "torch.distributed" in sys.modules and (ended is None or isinstance(ended, SystemExit)):
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def one_sentence(message: str) -> str:
    """The message itself: a loader process sends its whole traceback along."""
    if not message.startswith("Caught "):
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


if __name__ == "__main__":
    main()
