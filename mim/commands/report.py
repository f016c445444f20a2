"""`mim report RUN...`: what runs learned, on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File; default: RUN/report.html, of several ./report.html."
)
@click.option("--open", "show", is_flag=True, help="Open it in a browser.")
@click.option("--serve", is_flag=True, help="Show it in a browser while the run goes on, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --serve: 8321 by default, 0 takes any free one.")
def report(runs: tuple[Path, ...], out: Path | None, show: bool, serve: bool, port: int | None) -> None:
    """Write what a RUN learned as one HTML file, or compare several runs.

    The file needs nothing beside it and loads nothing. `mim train` writes RUN/report.html by itself, too.

    \b
    Examples:
      mim report runs/mae_vittiny_cifar10 --open
      mim report runs/mae runs/mae_lower_rate --out comparison.html
      mim report --serve runs/mae_vittiny_cifar10
    """
    if serve and out is not None:
        raise click.UsageError("--serve writes no file; leave --out out")
    if port is not None and not serve:
        raise click.UsageError("--port belongs to --serve; add it, or leave --port out")
    if serve:
        _serve(list(runs), 8321 if port is None else port, show=show)
        return
    from mim.report.writing import save

    place = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if out is not None or place.parent.is_dir():  # else it is the run that is missing, which is said when it is read
        _check_place(place)
    save(list(runs), place)
    click.echo(place)
    if show:
        _open(place.resolve().as_uri())


def _serve(runs: list[Path], port: int, *, show: bool) -> None:
    """Answer a browser until Ctrl-C."""
    from mim.config import ConfigError
    from mim.report.server import Viewer

    try:
        viewer = Viewer(runs, port)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from error
    with viewer:
        viewer.current()  # a folder that is no run is refused here
        click.echo(f"{viewer.url}  (Ctrl-C ends it)")
        if show:
            _open(viewer.url)
        try:
            viewer.serve_forever()
        except KeyboardInterrupt:
            click.echo()


def _check_place(out: Path) -> None:
    """Raise ConfigError where a report would write over something else, or has no folder to lie in."""
    from mim.config import ConfigError
    from mim.report.page import MARK

    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is no folder; make it, or choose another --out")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file, e.g. --out {out / 'report.html'}")
    if out.exists():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise ConfigError(f"{out} exists and is no report of mimstream; choose another --out, or remove it")


def _open(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        click.echo("no browser was found; open it yourself", err=True)
