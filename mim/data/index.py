"""Any existing WebDataset -> a dataset folder, without rewriting it: one index per tar, and a lock that names the tars.

The tars stay where they are: local, on a web server or in a bucket, read-only if need be. By default every byte is read
once, so that sha256 and CRC32 prove all later reads. With `headers_only` a tar is listed by ranges: much less is read,
and less is proven (`mim/data/shards.py`). What the samples are is told in `mim/data/members.py`; a sample without an
image is left out by name, and what is ambiguous is refused, never guessed.

Pixel statistics are those of a keyed sample of NUM_MEASURED images: decoding all takes longer than indexing. The lock
says how many were measured.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from mim import __version__
from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data import tar
from mim.data.decode import BadImage
from mim.data.listing import IMAGE_ENDINGS
from mim.data.locations import expand, names
from mim.data.members import Group, index_of, samples, save_index
from mim.data.parts import WHOLE, Part, remove_parts
from mim.data.picks import keyed_picks
from mim.data.shards import FORMAT, LABEL_MEMBER, LOCK, Dataset, dataset_id, is_dataset, write_lock
from mim.data.store import Store
from mim.data.workers import pool
from mim.data.write import Written, read_pixels, statistics_of
from mim.log import write_json

NUM_MEASURED = 1000  # images whose pixels are measured
MAX_LEFT_OUT = 100  # samples of one shard that the lock names; the others are counted
MAX_LABEL = 20  # bytes of a label
MAX_CLASSES = 1_000_000
KIND = "index"
PUBLIC = ("file", "url", "size", "sha256", "count", "proof", "headers_sha256")  # facts of a shard that the lock holds


@dataclass(frozen=True)
class Options:
    """What decides an index, besides the tars."""

    headers_only: bool = False
    labels: str | None = None  # "cls", or None
    image: str | None = None  # ending of the image member; None: whichever known one is there


@dataclass(frozen=True)
class Task:
    """One tar to index."""

    number: int
    location: str
    name: str
    folder: Path
    options: Options


@dataclass(frozen=True)
class IndexReport:
    """What `index` did."""

    path: Path
    part: str | None
    num_shards: int
    num_samples: int
    num_bytes: int
    proof: str  # bytes or headers
    left_out: list[dict[str, Any]]
    other_members: dict[str, int]  # members that nothing reads, by ending
    seconds: float

    def text(self) -> str:
        """The report for people."""
        rate = self.num_samples / max(self.seconds, 1e-9)
        lines = [
            f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes / 1e6:.1f} MB, "
            f"proven by {'every byte' if self.proof == 'bytes' else 'their headers'}, {rate:.0f} images/s: {self.path}"
        ]
        for entry in self.left_out[:10]:
            lines.append(f"left out {entry['file']}: {entry['reason']}")
        if len(self.left_out) > 10:
            lines.append(f"left out {len(self.left_out) - 10} more; {LOCK} names them")
        if self.other_members:
            found = ", ".join(f"{count} {ending}" for ending, count in self.other_members.items())
            lines.append(f"not read: {found}")
        if self.part is not None:
            lines.append(f"part {self.part} is done; when all are: mim shards join {self.path}")
        return "\n".join(lines)


def index(
    urls: list[str],
    out: str | Path,
    *,
    headers_only: bool = False,
    labels: str | None = None,
    image: str | None = None,
    workers: int | None = None,
    part: Part | None = None,
) -> IndexReport:
    """Index the tars that `urls` name (files, folders, URLs, braces) into the dataset folder OUT.

    labels: "cls" reads the class of each sample from its member `.cls`. image: the ending of the image member, for
    samples that have several. part: index only the shards of this part; `finish` joins them. Raises ConfigError,
    DataError, StorageError.
    """
    out = Path(out)
    if labels not in (None, LABEL_MEMBER):
        raise ConfigError(f"--labels {labels} is unknown; use --labels {LABEL_MEMBER}")
    options = Options(headers_only, labels, image.lower().lstrip(".") if image else None)
    locations = expand(urls)
    tasks = [
        Task(number, *pair, out, options) for number, pair in enumerate(zip(locations, names(locations), strict=True))
    ]
    digest = hashlib.sha256(repr((FORMAT, KIND, asdict(options), locations)).encode(errors="surrogateescape"))
    source = {"command": KIND, "hash": digest.hexdigest(), **asdict(options)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_free(out, tasks)
        began = time.monotonic()
        facts = _index_all((part or WHOLE).take(tasks), workers)
        seconds = time.monotonic() - began
        if part is None:
            finish(out, source, facts, workers)
        else:
            content = {"format": FORMAT, "kind": KIND, "source": source, "num_shards": len(tasks), "shards": facts}
            write_json(out / part.file(LOCK.removesuffix(".json")), content)
    except FileExistsError as error:
        raise ConfigError(f"{out} is a file; choose a folder") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error}") from error
    return IndexReport(
        path=out,
        part=f"{part.number}/{part.count}" if part is not None else None,
        num_shards=len(facts),
        num_samples=sum(fact["count"] for fact in facts),
        num_bytes=sum(fact["size"] for fact in facts),
        proof="headers" if headers_only else "bytes",
        left_out=[entry for fact in facts for entry in fact["left_out"]],
        other_members=dict(sum((Counter(fact["other"]) for fact in facts), Counter[str]()).most_common()),
        seconds=round(seconds, 3),
    )


def finish(out: Path, source: dict[str, Any], facts: list[dict[str, Any]], workers: int | None = None) -> None:
    """Write the lock of tars that are all indexed."""
    left_out = [entry for fact in facts for entry in fact["left_out"]]
    used = [fact for fact in facts if fact["count"]]
    if not used:
        raise DataError(f"none of the {len(facts)} tars holds a sample; nothing was indexed")
    members = {"image": sorted({ending for fact in used for ending in fact["endings"]})}
    classes, counts = None, Counter[int]()
    if source["labels"] is not None:
        members["label"] = [LABEL_MEMBER]
        for fact in used:
            counts.update({int(label): count for label, count in fact["class_counts"].items()})
        classes = [str(label) for label in range(max(counts) + 1)]
    shards = [{name: fact[name] for name in PUBLIC if name in fact} for fact in used]
    schema = {"members": members, "classes": classes}
    lock: dict[str, Any] = {
        "format": FORMAT,
        "dataset_id": dataset_id(shards, schema),
        "shards": shards,
        "schema": schema,
        "statistics": {"mean": [], "std": []},
        "left_out": left_out,
        "source": source,
        "tool": {"mimstream": __version__, "pillow": PIL.__version__},
    }
    lock["statistics"] = _measured(out, lock, workers)
    lock["statistics"]["class_counts"] = [counts[i] for i in range(len(classes))] if classes is not None else None
    write_lock(out, lock)
    remove_parts(out, LOCK.removesuffix(".json"))


def _check_free(out: Path, tasks: list[Task]) -> None:
    """Refuse to write over a dataset, or over arrays that are no index."""
    if is_dataset(out):
        raise ConfigError(f"{out} holds a dataset already; choose another folder or delete its {LOCK}")
    for task in tasks:
        file = (out / task.name).with_suffix(".npy")
        if file.exists() and "key" not in (np.load(file, mmap_mode="r", allow_pickle=False).dtype.names or ()):
            raise ConfigError(f"{file} is an array of yours, and the index would replace it; choose another folder")


def _index_all(tasks: list[Task], workers: int | None) -> list[dict[str, Any]]:
    with (
        tqdm(desc="index", unit=" images", disable=None) as bar,
        pool(workers, len(tasks)) as processes,
    ):
        futures = [processes.submit(index_shard, task) for task in tasks]
        for future in as_completed(futures):
            if error := future.exception():
                processes.shutdown(cancel_futures=True)
                raise error
            bar.update(future.result()["count"])
    return [future.result() for future in futures]


def index_shard(task: Task) -> dict[str, Any]:
    """Index one tar; return its facts."""
    store, digest, other = Store(), hashlib.sha256(), Counter[str]()
    labelled = task.options.labels is not None
    endings = (task.options.image,) if task.options.image else IMAGE_ENDINGS
    keep = MAX_LABEL if labelled else 0
    members = tar.scan(task.location, store=store, keep=keep, headers_only=task.options.headers_only, digest=digest)
    facts: dict[str, Any] = {"number": task.number, "file": task.name, "url": task.location}
    found, labels = set(), Counter[int]()
    left_out: list[dict[str, Any]] = []
    num_left_out = 0

    def usable() -> Iterator[Group]:
        nonlocal num_left_out
        groups = samples(task.location, members, labelled=labelled, image_endings=endings, other=other)
        for group in groups:
            if group.reason:
                num_left_out += 1
                if num_left_out <= MAX_LEFT_OUT:
                    left_out.append({"file": f"{task.name}/{group.key}", "reason": group.reason})
                continue
            found.add(group.ending)
            if group.label is not None:
                labels[_label(task.location, group)] += 1
            yield group

    rows = index_of(usable(), labelled=labelled)
    if num_left_out > MAX_LEFT_OUT:
        count = num_left_out - MAX_LEFT_OUT
        left_out.append({"file": task.name, "reason": f"{count} more samples like these", "count": count})
    if len(rows):
        save_index((task.folder / task.name).with_suffix(".npy"), rows)
    elif num_left_out or other:
        raise _nothing_usable(task, other)
    else:
        left_out.append({"file": task.name, "reason": "the tar is empty"})
    proof = {"sha256": None, "proof": "headers", "headers_sha256": digest.hexdigest()}
    facts |= proof if task.options.headers_only else {"sha256": digest.hexdigest()}
    facts |= {"size": store.size(task.location), "count": len(rows), "endings": sorted(found), "left_out": left_out}
    return facts | {"class_counts": {str(label): labels[label] for label in sorted(labels)}, "other": dict(other)}


def _label(location: str, group: Group) -> int:
    assert group.label is not None
    raw = group.label.data
    if raw is None or not raw.strip().isdigit() or int(raw) >= MAX_CLASSES:
        shown = raw if raw is not None else f"{group.label.size} bytes"
        raise DataError(f"{location}: sample {group.key!r} has the label {shown!r}; a class number below a million is")
    return int(raw)


def _nothing_usable(task: Task, other: Counter[str]) -> DataError:
    shown = ", ".join(f"{ending} ({count})" for ending, count in other.most_common(8))
    wanted = f".{task.options.image}" if task.options.image else f"one of {', '.join(IMAGE_ENDINGS)}"
    likely = next((ending for ending, _ in other.most_common() if ending.rpartition(".")[2] in IMAGE_ENDINGS), None)
    remedy = f"; perhaps --image {likely}" if likely and not task.options.image else ""
    return DataError(
        f"{task.location}: no sample has an image ({wanted}, after the first dot of the name); found: {shown}{remedy}"
    )


def _measured(out: Path, lock: dict[str, Any], workers: int | None) -> dict[str, Any]:
    """Statistics of a keyed sample of the images."""
    dataset = Dataset(out, lock)
    picks = keyed_picks(len(dataset), NUM_MEASURED, "statistics")
    size = 50  # a task of some seconds even over a network
    chunks = [picks[start : start + size] for start in range(0, len(picks), size)]
    with pool(workers, len(chunks)) as processes:
        written = list(processes.map(_measure, [dataset] * len(chunks), chunks))
    measured = sum(one.count for one in written)
    if not measured:
        bad = written[0].left_out[0]
        raise DataError(f"none of {len(picks)} images of {out} can be decoded; {bad['file']}: {bad['reason']}")
    return {**statistics_of([one for one in written if one.count], None), "num_measured": measured}


def _measure(dataset: Dataset, picks: list[int]) -> Written:
    """Decode some samples by their number in the dataset."""
    written = Written("")
    for pick in picks:
        sample = dataset.read(*dataset.locate(pick))
        try:
            written.add(*read_pixels(sample.image), sample.label)
        except BadImage as error:
            written.left_out.append({"file": sample.key, "reason": str(error)})
    return written
