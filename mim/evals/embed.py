"""Features of images as files: the everyday use of a backbone.

    mim eval embed MODEL SHARDS|FOLDER OUT

writes OUT/features.parquet, or a .npy per column beside keys.txt, and OUT/manifest.json, which says what the features
are of: the hash of the weights, the pixels, the versions. A row is an image, in the order of the dataset; the key is
that of its shard. Killed, the same command goes on; several processes share the work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from mim import __version__, build, config, ranks
from mim.config import ConfigError, difference
from mim.contracts import LoadedRun, NamedValues
from mim.data import stream
from mim.data.write import storing
from mim.log import say, write_json
from mim.probing import bank_writer, judged
from mim.probing.bank import blocks_of, fill
from mim.probing.feature_cache import FeatureCache
from mim.probing.features import Wanted, binding, embedder

ARGUMENTS = ("data.path", "out")  # may be given by their place
MANIFEST, WORK = "manifest.json", ".blocks"


@dataclass
class Config:
    # folder, new or empty, or one that was begun with the same settings; null: features/ of the run directory
    out: str | None = None
    format: str = "parquet"  # parquet | npy
    layers: list[int] = field(default_factory=lambda: [-1])  # blocks, from 1; negative: from the end
    pools: list[str] = field(default_factory=lambda: ["mean"])  # mean, class, class_mean, tokens (all patches)
    dtype: str = "float32"  # float32 | float16
    split: str = "train"  # train: all images where nothing is held out; val: those that are
    limit: int | None = None  # images, a fixed random subset; null: all
    batch_size: int = 256  # images through the encoder at once


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Write the features; yield how many images and how many numbers of each there are."""
    bank_writer.check_format(cfg.format)
    wanted = Wanted(cfg.layers, cfg.pools, cfg.dtype)
    embed, device = embedder(loaded, wanted), next(loaded.encoder.parameters()).device
    out = _folder(loaded, cfg.out)
    dataset = _dataset(loaded, cfg.split)
    found = binding(loaded, dataset, wanted, batch_size=cfg.batch_size, limit=cfg.limit)
    manifest = {
        "model": str(loaded.path),
        "step": loaded.step,
        **config.plain(found),
        "columns": wanted.columns,
        "files_as": cfg.format,
        "classes": dataset.classes,
        "versions": {"mimstream": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    blocks = blocks_of(len(stream.evaluated(dataset, limit=cfg.limit)), cfg.batch_size)
    if not blocks:
        raise ConfigError(f"{dataset.path} holds no image to embed")
    if not _is_done(out, manifest):
        store = FeatureCache(out / WORK, found, device)
        fill(dataset, loaded.views, embed, store, blocks, device=device, batch_size=cfg.batch_size, limit=cfg.limit)
        ranks.wait()
        if ranks.place()[0] == 0:
            with storing(out):
                files = bank_writer.write(out, cfg.format, store, blocks, labelled=dataset.classes is not None)
                sizes = {name: (out / name).stat().st_size for name in files}
                write_json(out / MANIFEST, {**manifest, "rows": blocks[-1].end, "files": sizes})
                store.remove()
        ranks.wait()
    yield "images", float(blocks[-1].end)
    yield "bytes", float(sum(json.loads((out / MANIFEST).read_bytes())["files"].values()))


def _folder(loaded: LoadedRun, out: str | None) -> Path:
    """Where the features are written."""
    if out is not None:
        return Path(out).expanduser()
    if isinstance(loaded.objective, judged.Untrained):
        raise ConfigError(
            f"{loaded.path} is no run directory, so out is missing; write mim eval embed MODEL SHARDS OUT"
        )
    return loaded.path / "features" / f"step-{loaded.step:08d}"


def _dataset(loaded: LoadedRun, split: str) -> Any:
    """The images that are embedded."""
    if split not in ("train", "val"):
        raise ConfigError(f"split={split!r} is unknown; choose train or val")
    with ranks.main_first():  # a folder of images is made into shards once
        train, val = build.open_data(loaded.config)
    if split == "val" and val is None:
        raise ConfigError(f"split=val, but {train.path} has no held-out split; leave it out to embed all images")
    if split == "train" and val is not None:
        say(f"embedding {train.path}; for {val.path} use split=val and another OUT")
    return val if split == "val" else train


def _is_done(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether OUT holds just these features. Raises ConfigError when it holds anything else."""
    if (out / MANIFEST).is_file():
        theirs = json.loads((out / MANIFEST).read_bytes())
        asked = {key: value for key, value in manifest.items() if key not in ("model", "versions")}
        if changed := difference({key: theirs.get(key) for key in asked}, asked):
            raise ConfigError(
                f"{out} holds other features, there -> now: {'; '.join(changed)[:500]}; choose another folder, or "
                f"delete it"
            )
        say(f"{out} holds these features already")
        return True
    strange = [e.name for e in out.iterdir() if e.name != WORK] if out.is_dir() else []
    begun = (out / WORK).is_dir()  # a killed process may have left files that are not in any manifest
    if strange and not begun:
        raise ConfigError(f"{out} is not empty (it holds {min(strange)!r}); choose a folder that is empty or new")
    return False
