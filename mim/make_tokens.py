"""Make a token cache: a recipe's frozen tokenizer over K views of every image (format: mim/data/tokens.py).

Views, device, precision, micro-batches and the call of the tokenizer are those of training, so its codes are too.
Every process of a launch takes shards of its own, and so does every `part`; nothing is sent between them. A shard is
finished when its facts lie beside its codes, so a killed process loses only the shard it was at. The lock comes last.
Made again, a finished cache is proven, and what is damaged is repaired.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mim import build, config, frozen_networks, job
from mim.config import ConfigError, difference
from mim.contracts import Batch, DataError
from mim.data import mixture, order, quarantine, stream, tokens
from mim.data.parts import WHOLE, Part, read_parts, remove_parts
from mim.data.write import storing
from mim.log import Progress, clock, say, write_json

STEM = tokens.LOCK.removesuffix(".json")  # of the files that parts leave
BEGUN = f".{tokens.LOCK}"  # the head of a cache that is not finished
KIND = "tokens"
MEASURED = 5  # micro-batches that a dry run times


@dataclass(frozen=True)
class TokensReport:
    """What `make` did, or what it would take."""

    path: Path
    num_samples: int
    views: int
    num_codes: int
    num_bytes: int  # of all codes
    num_bad: int | None = None  # samples without codes; None: not known
    num_reused: int = 0  # shards that were finished before
    images_per_second: float = 0.0  # views of images, by one process
    seconds: float | None = None  # of making all, by as many processes as now; only of a dry run
    part: str | None = None  # i/n: only these shards were made

    def text(self) -> str:
        """The report for people."""
        views = f"{self.views} view{'s' * (self.views > 1)} of {self.num_samples} images"
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        if self.seconds is not None:
            return (
                f"{self.path} would hold the codes of {views}: {size}, {clock(self.seconds)} "
                f"at {self.images_per_second:.0f} images/s per process"
            )
        if self.part is not None:
            return f"part {self.part} of the codes of {views}; when all are made: mim tokens join {self.path}"
        bad = f", none of {self.num_bad} that cannot be decoded" if self.num_bad else ""
        reused = f"; {self.num_reused} shards were finished before" if self.num_reused else ""
        rate = f"; {self.images_per_second:.0f} images/s per process" if self.images_per_second else ""
        train_with = f"train with data.views={self.views} tokens={self.path}"
        return f"codes of {views} in {self.path}: {size}{bad}{reused}{rate}; {train_with}"


@dataclass
class Work:
    """What is made."""

    out: Path
    head: dict[str, Any]  # of the lock: all but the shards
    built: build.Built
    dataset: mixture.AnyDataset
    rows: int  # per micro-batch
    workers: int
    accelerator: Accelerator
    precision: str  # train.precision

    @property
    def num_codes(self) -> int:
        return self.head["tokenizer"]["num_codes"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, draws, N) of a sample."""
        bound = self.head["binding"]
        return bound["views"], bound["repeats"], bound["grid"][0] * bound["grid"][1]

    def planned(self, **values: Any) -> TokensReport:
        """What all of it comes to."""
        size = len(self.dataset) * int(np.prod(self.shape)) * tokens.code_dtype(self.num_codes).itemsize
        return TokensReport(self.out, len(self.dataset), self.shape[0], self.num_codes, size, **values)


def make(
    recipe: str,
    overrides: list[str],
    out: Path,
    *,
    views: int | None = None,
    part: Part | None = None,
    dry_run: bool = False,
) -> TokensReport | None:
    """Make the codes of `views` views (default: the recipe's `data.views`) of a recipe's training images, in OUT.

    Returns None on all processes but the first. Raises ConfigError, DataError, StorageError.
    """
    work = prepare(recipe, overrides, out, views)
    if dry_run:
        return estimate(work)
    main_rank, world = work.accelerator.is_main_process, work.accelerator.num_processes
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
        check_folder(work)
        theirs = (part or WHOLE).take(list(range(len(work.dataset.counts))))
        mine = Part(work.accelerator.process_index + 1, world).take(theirs)
        unfinished = [shard for shard in mine if not finished(work, shard)]
        began = time.monotonic()
        num_rows = encode(work, unfinished) if unfinished else 0
        rate = num_rows / max(time.monotonic() - began, 1e-9)
        work.accelerator.wait_for_everyone()
        if not main_rank:
            return None
        told = {"num_reused": len(mine) - len(unfinished), "images_per_second": round(rate, 1)}
        if part is not None:  # for `join`
            content = {"kind": KIND, "source": work.head, "num_shards": len(work.dataset.counts)}
            write_json(out / part.file(STEM), content)
            return work.planned(part=f"{part.number}/{part.count}", **told)
        finish(out, work.head, len(work.dataset.counts))
    return report(out, **told)


def join(out: Path) -> TokensReport:
    """Write the lock over what all parts have made. May be repeated. Raises ConfigError or DataError."""
    parts = read_parts(out, STEM)
    if parts:
        with storing(out):
            finish(out, parts[0]["source"], parts[0]["num_shards"])
    return report(out)


def report(out: Path, **told: Any) -> TokensReport:
    """What a finished cache holds, from its lock."""
    lock = tokens.read_lock(out)
    num_samples, num_bytes = (sum(shard[name] for shard in lock["shards"]) for name in ("count", "size"))
    num_bad = sum(len(shard["bad"]) for shard in lock["shards"])
    views, num_codes = lock["binding"]["views"], lock["tokenizer"]["num_codes"]
    return TokensReport(out, num_samples, views, num_codes, num_bytes, num_bad, **told)


def prepare(recipe: str, overrides: list[str], out: Path, views: int | None) -> Work:
    """Open the data and build the tokenizer as training does."""
    cfg = config.typed(job.Config, config.read(recipe, overrides))
    stated = cfg.data.get("views")
    if views is None and stated is None:
        raise ConfigError("the number of views is missing; give --views K, or set data.views in the recipe")
    if views is not None and stated not in (None, views):
        raise ConfigError(f"--views {views} differs from data.views={stated} of the recipe; leave out --views")
    cfg.data["views"], cfg.tokens = views if views is not None else stated, None
    if cfg.encoder is None or cfg.tokenizer is None:
        raise ConfigError(
            f"{recipe} has no frozen tokenizer; name a recipe that reads codes, e.g. beit_vittiny_cifar10"
        )
    accelerator = Accelerator(cpu=cfg.train.cpu or not torch.accelerator.is_available())
    with accelerator.main_process_first():
        dataset, _ = build.open_data(config.plain(cfg))
    built = build.build(config.plain(cfg), dataset=dataset)
    tokenizer = built.frozen["tokenizer"].to(accelerator.device)
    for line in frozen_networks.check_tokenizer(cfg.tokenizer, tokenizer):
        say(line, main=accelerator.is_main_process)
    data, world, micro_batches = built.views.data, accelerator.num_processes, cfg.train.micro_batches
    rows = order.Plan(data.repeats, cfg.optim.batch_size, world=world, micro_batches=micro_batches).micro_size
    size = built.views.sizes[0]
    head = {
        "format": tokens.FORMAT,
        "binding": build.token_binding(built.views, built.sections, dataset, built.encoder.grid(size)),
        "made": tokens.made_with(rows, accelerator.device, frozen_networks.dtype_of(cfg.train.precision)),
        "tokenizer": asdict(build.tokenizer_facts(built.sections, tokenizer)),
    }
    workers = job.num_workers(cfg.train.workers)
    return Work(out, head, built, dataset, rows, workers, accelerator, cfg.train.precision)


# ---- encoding ------------------------------------------------------------------------------------


def batches(work: Work, shards: list[int]) -> tuple[Any, int]:
    """Micro-batches of all views of shards, on the device and with their codes, and how many there are."""
    data = work.built.views.data
    known = mixture.bad_samples(work.dataset)
    source = tokens.EveryView(
        stream.Renderer(
            work.dataset,
            work.built.views.train,
            work.built.views.sizes,
            None,
            data.channels,
            data.seed,
            data.jitter,
            known,
            data.views,
        ),
        work.rows,
        data.repeats,
    )
    device = work.accelerator.device
    plan = list(source.plan(shards))
    patience = max(stream.TIMEOUT, work.dataset.longest_read())
    loader = stream.in_order(source, plan, work.workers, device.type == "cuda", patience)

    def encoded() -> Iterator[Batch]:
        for batch in loader:
            batch = stream.to_device(batch, device)
            with frozen_networks.computing(work.precision, device):
                frozen_networks.write_targets({"tokenizer": work.built.frozen["tokenizer"]}, batch)
            yield batch

    return encoded(), len(plan)


def encode(work: Work, shards: list[int]) -> int:
    """Write the codes of shards, one after the other; return how many views that were."""
    found, total = batches(work, shards)
    progress = Progress(0, total, batch_size=work.rows, main=work.accelerator.is_main_process)
    budget = work.built.views.data.bad_budget
    journal = quarantine.Journal(mixture.bad_samples(work.dataset), work.dataset.counts, budget=budget)
    dtype = tokens.code_dtype(work.num_codes)
    rows, done = 0, 0
    codes = np.empty(0, dtype)
    for batch in found:
        shard, start, end = batch["rows"]
        count, num = int(work.dataset.counts[shard]), end - start
        if start == 0:
            codes = np.empty((count * work.shape[0] * work.shape[1], work.shape[2]), dtype)  # (rows, N)
        codes[start:end] = batch["codes"][:num].cpu().numpy()
        codes[start:end][~batch["shown"].cpu().numpy()] = tokens.missing(dtype)
        for met in batch["bad"]:
            journal.bad[met["sample"]] = quarantine.Bad(met["key"], met["reason"])
        rows, done = rows + num, done + 1
        progress.advance()
        if end == len(codes):
            journal.check()
            entry = tokens.write_codes(work.out, shard, codes.reshape(count, *work.shape))
            write_json(facts_file(work.out, shard), {"of": config.digest(work.head), "entry": entry})
            progress.show(done, progress.rates(done))
    progress.close()
    return rows


def estimate(work: Work) -> TokensReport | None:
    """Time a few micro-batches after the first, and say what all of them come to."""
    found, _ = batches(work, list(range(len(work.dataset.counts))))
    times, rows = [time.monotonic()], []
    for batch in itertools.islice(found, 1 + MEASURED):
        rows.append(int((batch["weight"] > 0).sum()))  # waits for the device
        times.append(time.monotonic())
    first = min(1, len(rows) - 1)  # it starts workers and chooses kernels
    rate = sum(rows[first:]) / max(times[-1] - times[first], 1e-9)
    if not work.accelerator.is_main_process:
        return None
    total = len(work.dataset) * work.shape[0] * work.shape[1]
    seconds = total / rate / work.accelerator.num_processes
    return work.planned(images_per_second=round(rate, 1), seconds=seconds)


# ---- the folder ----------------------------------------------------------------------------------


def facts_file(out: Path, shard: int) -> Path:
    """Where the facts of a finished shard lie."""
    return (out / tokens.file_name(shard)).with_suffix(".json")


def finished(work: Work, shard: int) -> bool:
    """Whether a shard was finished before, and its bytes still are what was written."""
    entry = read_entry(work.out, config.digest(work.head), shard)
    file = work.out / tokens.file_name(shard)
    return entry is not None and file.is_file() and tokens.hash_of(file) == entry["sha256"]


def read_entry(out: Path, of: str, shard: int) -> dict[str, Any] | None:
    """The entry of a shard of the cache with this digest; None where there is none."""
    try:
        found = json.loads(facts_file(out, shard).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found["entry"] if found.get("of") == of else None


def check_folder(work: Work) -> None:
    """Refuse an OUT that holds another cache, or anything else; leave the head of the one that is begun."""
    ours, lock, began = config.plain(work.head), work.out / tokens.LOCK, work.out / BEGUN
    theirs: dict[str, Any] | None = None
    if lock.is_file():
        theirs = {key: value for key, value in tokens.read_lock(work.out).items() if key != "shards"}
    elif began.is_file():
        theirs = json.loads(began.read_bytes())
    elif strange := sorted(e.name for e in work.out.iterdir() if not e.name.startswith((STEM, f".{STEM}", "codes-"))):
        raise ConfigError(f"{work.out} is not empty (it holds {strange[0]!r}); choose a folder that is empty or new")
    if theirs is not None and (changed := difference(theirs, ours)):
        raise ConfigError(
            f"{work.out} holds another token cache, there -> now: {'; '.join(changed)}; choose another folder, or "
            f"delete it"
        )
    work.accelerator.wait_for_everyone()  # all have looked
    if work.accelerator.is_main_process and theirs is None:
        write_json(began, ours)


def finish(out: Path, head: dict[str, Any], num_shards: int) -> None:
    """Write the lock. Raises DataError when a shard is not finished."""
    entries = [read_entry(out, config.digest(head), shard) for shard in range(num_shards)]
    if None in entries:
        raise DataError(
            f"{out}: the codes of {entries.count(None)} of {num_shards} shards are not there, the first is "
            f"{tokens.file_name(entries.index(None))}; make them, or their parts, again"
        )
    write_json(out / tokens.LOCK, {**head, "shards": entries})
    (out / BEGUN).unlink(missing_ok=True)
    remove_parts(out, STEM)
