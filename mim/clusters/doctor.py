"""What this machine offers a run, and what stands in the way of one: `mim doctor`.

Facts are gathered without changing anything and travel as plain data, so that a cluster's ranks can compare theirs
(mim/clusters/cluster.py). Each problem is one sentence with its remedy. A machine without any is no promise: only a run
is.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mim
import tokenizer
from mim import __version__
from mim.config import ConfigError, typed
from mim.data import shards, stages, stream
from mim.job import Config

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "pillow", "webdataset")
GIB = 2**30
SHARED_MEMORY = 1 * GIB  # bytes that /dev/shm must have: loader workers pass batches through it, docker gives 64 MiB
OPEN_FILES = 1024  # file descriptors of a process: a loader worker holds its shards and indices open
FREE_DISK = 10 * GIB  # bytes below which a folder of runs or of the cache is called full
UNLIMITED = resource.RLIM_INFINITY


def facts(folders: dict[str, Path]) -> dict[str, Any]:
    """What this machine is and has, as plain data; `folders` are those that a run writes, by their names."""
    open_files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "versions": versions(),
        "sources": sources_hash(),
        "devices": devices(),
        "driver": Path("/proc/driver/nvidia/version").exists(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpus_per_rank": stages.allowed_cpus(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),  # bytes
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,  # bytes
        "open_files": None if open_files == UNLIMITED else open_files,
        "locked_memory": None if locked == UNLIMITED else locked,  # bytes
        "infiniband": Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
        "folders": {name: disk(path) for name, path in folders.items()},
    }


def versions() -> dict[str, str | None]:
    """What is installed of all that decides numbers."""
    found: dict[str, str | None] = {"mimstream": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() and torch.distributed.is_nccl_available() else None
    return found | {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl)) if nccl else None}


def sources_hash() -> str:
    """Hash of the source files of `mim` and `tokenizer`, by their names inside the package."""
    total = hashlib.sha256()
    for package in (mim, tokenizer):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            total.update(f"{root.name}/{file.relative_to(root)}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def devices() -> list[dict[str, Any]]:
    """The GPUs that this process sees: name, id, bytes of memory, and whether this torch was built for them."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "uuid": str(getattr(properties, "uuid", index)),
                "memory": properties.total_memory,
                "supported": supported(f"sm_{properties.major}{properties.minor}", torch.cuda.get_arch_list()),
            }
        )
    return found


def supported(architecture: str, built_for: list[str]) -> bool:
    """Whether code built for these architectures runs on this one: binaries of its major version, or PTX to compile."""
    number = int(architecture.removeprefix("sm_"))
    for built in built_for:
        kind, _, digits = built.partition("_")
        lowest = int("".join(c for c in digits if c.isdigit()))
        if lowest <= number and (kind == "compute" or lowest // 10 == number // 10):
            return True
    return not built_for


def disk(path: Path) -> dict[str, Any]:
    """Where a folder lies, or will lie: free and total bytes of its disk."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    return {"path": str(path), "free": usage.free, "total": usage.total}


def problems(found: dict[str, Any]) -> list[str]:
    """What stands in the way on this machine, one sentence with a remedy each."""
    lines = []
    if found["driver"] and not found["devices"]:
        lines.append(
            f"there is an NVIDIA driver, but torch {found['versions']['torch']} (CUDA {found['versions']['cuda']}) "
            f"sees no GPU; ask for one (--gpus of docker and Slurm), or install a torch built for this driver"
        )
    for device in found["devices"]:
        if not device["supported"]:
            lines.append(f"torch has no code for {device['name']}; install a torch whose CUDA build knows it")
    if found["shared_memory"] < SHARED_MEMORY:
        lines.append(
            f"/dev/shm has {size(found['shared_memory'])} free, and loader workers pass batches through it; give "
            f"{size(SHARED_MEMORY)} or more (docker --shm-size=8g, Kubernetes emptyDir with medium: Memory), or set "
            f"train.workers=0"
        )
    if found["open_files"] is not None and found["open_files"] < OPEN_FILES:
        lines.append(f"a process may open {found['open_files']} files; raise it with ulimit -n 65536")
    if found["infiniband"] and found["locked_memory"] is not None:
        lines.append(
            f"a process may lock {size(found['locked_memory'])} of memory, but InfiniBand needs it unlimited; set "
            f"ulimit -l unlimited (Slurm: PropagateResourceLimits, docker: --ulimit memlock=-1)"
        )
    for name, folder in found["folders"].items():
        if folder["free"] < FREE_DISK:
            lines.append(
                f"{name} {folder['path']} has {size(folder['free'])} free of {size(folder['total'])}; free "
                f"{size(FREE_DISK)}, or choose another disk"
            )
    return lines


def folders_of(cfg: Config | None, run: Path | None) -> dict[str, Path]:
    """The folders that a run writes, by the keys that choose them."""
    found = {}
    if cfg is None or uses_cache(cfg):
        cache = cfg.train.cache_dir if cfg is not None else None
        found["train.cache_dir"] = Path(cache or "~/.cache/mimstream").expanduser()
    return found | ({"train.run": run} if run is not None else {})


def uses_cache(cfg: Config) -> bool:
    """Whether a recipe keeps anything in `train.cache_dir`: shards of a folder of images, or remote ones."""
    return any(
        lock is None or b"://" in (Path(folder) / shards.LOCK).read_bytes() for folder, lock in locks(cfg).items()
    )


def locks(cfg: Config) -> dict[str, str | None]:
    """The sha256 of every dataset lock that a recipe names, by its folder; None where there is no dataset.

    Locks alone are read: a folder of images is not made into shards here.
    """
    data = typed(stream.Config, cfg.data, "data")
    sources = [source.path for source in data.sources or ()]
    found: dict[str, str | None] = {}
    for text in filter(None, (data.path, data.val_path, *sources)):
        if "://" in text:
            raise ConfigError("data.path is an address where `data` wants a folder; make one: mim shards index URL OUT")
        root = Path(text).expanduser()
        datasets = [folder for folder in (root, root / "train", root / "val") if shards.is_dataset(folder)]
        if not datasets:
            found[str(root)] = None
        found |= {str(folder): hash_of(folder / shards.LOCK) for folder in datasets}
    return found


def inputs(cfg: Config) -> dict[str, bool]:
    """The files and folders that a recipe names beside its data, and whether they are here."""
    named: dict[str, Any] = {
        "tokenizer.path": (cfg.tokenizer or {}).get("path"),
        "tokens": cfg.tokens,
        "teacher.path": (cfg.teacher or {}).get("path"),
        "init.run": (cfg.init.run or "").partition("@")[0],
    }
    return {f"{key}={path}": Path(path).expanduser().exists() for key, path in named.items() if path}


def missing(cfg: Config, found: dict[str, str | None]) -> list[str]:
    """What a recipe reads and this machine lacks, one sentence with a remedy each; `found` are its locks."""
    lines = []
    for folder, lock in found.items():
        if lock is None and Path(folder).is_dir():
            lines.append(f"data {folder} is no dataset; make one before several machines read it: mim shards make")
        elif lock is None:
            lines.append(f"data {folder} is not here; mount its file system, or correct data.path")
    lines += [
        f"{name} is not here; mount its file system, or correct it" for name, here in inputs(cfg).items() if not here
    ]
    return lines


def hash_of(file: Path) -> str:
    """sha256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def text(found: dict[str, Any], lines: list[str]) -> str:
    """Facts and problems for people."""
    installed = "  ".join(f"{name} {value}" for name, value in found["versions"].items() if value is not None)
    limits = (("open_files", "open files"), ("locked_memory", "bytes of locked memory"))
    told = [
        f"host      {found['host']}  {found['system']}",
        f"versions  {installed}",
        f"sources   {found['sources'][:12]}",
        *(f"device    {device['name']}, {size(device['memory'])}" for device in found["devices"]),
        *([] if found["devices"] else ["device    cpu"]),
        f"cpus      {found['cpus']} allowed",
        f"memory    {size(found['memory'])}, /dev/shm {size(found['shared_memory'])} free",
        "limits    " + ", ".join(f"{found[key] or 'unlimited'} {name}" for key, name in limits),
        *(f"folder    {key} {f['path']}: {size(f['free'])} free" for key, f in found["folders"].items()),
    ]
    return "\n".join([*told, *(f"problem   {line}" for line in lines), *([] if lines else ["no problem found"])])
