"""Any existing WebDataset -> a dataset folder, without rewriting it: one index per tar, and a lock that names the tars.

The tars stay where they are: local, on a web server or in a bucket, read-only if need be. By default every byte is read
once, so that sha256 and CRC32 prove all later reads. With `headers_only` a tar is listed by ranges: much less is read,
and less is proven (`mim/data/shards.py`). What the samples are is told in `mim/data/members.py`; a sample without an
image is left out by name, and what is ambiguous is refused, never guessed.

A killed index goes on where it was (`mim/data/index_tar.py`). A tar may end with zeros, with which tar writers fill up
a record; more of them are told, because there a tail may have been lost.

Pixel statistics are those of a keyed sample of NUM_MEASURED images: decoding all takes longer than indexing. The lock
says how many were measured.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from mim import __version__
from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.decode import BadImage
from mim.data.index_tar import FINISHED, Options, Task, index_or_keep
from mim.data.locations import expand, names
from mim.data.pairs import read_classes
from mim.data.parts import WHOLE, Part, remove_parts
from mim.data.picks import keyed_picks
from mim.data.shards import FORMAT, LABEL_MEMBER, LOCK, Dataset, dataset_id, is_dataset, write_lock
from mim.data.store import Store
from mim.data.workers import run_all
from mim.data.write import Written, read_sample, statistics_of, storing
from mim.log import write_json

NUM_MEASURED = 1000  # images whose pixels are measured
KIND = "index"
PUBLIC = ("file", "url", "size", "sha256", "count", "proof", "headers_sha256", "padding")  # what the lock holds of it


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
    padding: dict[str, int]  # zero bytes after the end of each tar that has more of them than tar writers leave
    num_kept: int  # tars that an index before a stop had finished
    num_stale: int  # the same, but the tar or the options have changed since
    seconds: float
    images_per_second: float  # of the tars that were read now

    def text(self) -> str:
        """The report for people."""
        lines = [
            f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes / 1e6:.1f} MB, "
            f"proven by {'every byte' if self.proof == 'bytes' else 'their headers'}, "
            f"{self.images_per_second:.0f} images/s: {self.path}"
        ]
        if self.num_kept:
            lines.append(f"{self.num_kept} of the shards were indexed before a stop, and were kept")
        if self.num_stale:
            lines.append(
                f"{self.num_stale} of the shards were indexed anew: they or the options changed since the stop"
            )
        lines += tar.padding_told(self.padding)
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
    label_maps: str | None = None,
    pixel_classes: str | None = None,
    workers: int | None = None,
    part: Part | None = None,
) -> IndexReport:
    """Index the tars that `urls` name (files, folders, URLs, braces) into the dataset folder OUT.

    labels: "cls" reads the class of each sample from its member `.cls`. image: the ending of the image member, for
    samples that have several. label_maps: the ending of the member with the class of every pixel; `pixel_classes` gives
    their classes, a number or a file of names. part: index only the shards of this part; `finish` joins them.
    Raises ConfigError, DataError, StorageError.
    """
    out = Path(out)
    if labels not in (None, LABEL_MEMBER):
        raise ConfigError(f"--labels {labels} is unknown; use --labels {LABEL_MEMBER}")
    if (label_maps is None) != (pixel_classes is None):
        raise ConfigError("--label-maps and --classes go together: the maps are not all read, so state their classes")
    endings = (text.lower().lstrip(".") if text else None for text in (image, label_maps))
    options = Options(headers_only, labels, *endings)
    locations = expand(urls)
    tasks = [
        Task(number, *pair, out, options) for number, pair in enumerate(zip(locations, names(locations), strict=True))
    ]
    digest = hashlib.sha256(repr((FORMAT, KIND, asdict(options), locations)).encode(errors="surrogateescape"))
    source = {"command": KIND, "hash": digest.hexdigest(), **asdict(options)}
    source["pixel_classes"] = read_classes(pixel_classes)
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
        _check_free(out, tasks)
        (out / FINISHED).mkdir(exist_ok=True)
        began = time.monotonic()
        some = (part or WHOLE).take(tasks)
        results = run_all(
            index_or_keep, some, workers=workers, description="index", done=lambda _, result: result.facts["count"]
        )
        seconds = max(time.monotonic() - began, 1e-9)
        facts = [result.facts for result in results]
        if part is None:
            finish(out, source, facts, workers)
        else:
            content = {"format": FORMAT, "kind": KIND, "source": source, "num_shards": len(tasks), "shards": facts}
            write_json(out / part.file(LOCK.removesuffix(".json")), content)
    read = sum(result.facts["count"] for result in results if not result.kept)
    return IndexReport(
        path=out,
        part=f"{part.number}/{part.count}" if part is not None else None,
        num_shards=len(facts),
        num_samples=sum(fact["count"] for fact in facts),
        num_bytes=sum(fact["size"] for fact in facts),
        proof="headers" if headers_only else "bytes",
        left_out=[entry for fact in facts for entry in fact["left_out"]],
        other_members=dict(sum((Counter(fact["other"]) for fact in facts), Counter[str]()).most_common()),
        padding={fact["file"]: fact["padding"] for fact in facts if "padding" in fact},
        num_kept=sum(result.kept for result in results),
        num_stale=sum(result.stale for result in results),
        seconds=round(seconds, 3),
        images_per_second=round(read / seconds, 1),
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
    if source["label_maps"] is not None:
        members["label_map"] = [source["label_maps"]]
        schema["pixel_classes"] = list(source["pixel_classes"])
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
    shutil.rmtree(out / FINISHED, ignore_errors=True)


def _check_free(out: Path, tasks: list[Task]) -> None:
    """Refuse to write over a dataset, or over arrays that are no index."""
    if is_dataset(out):
        raise ConfigError(f"{out} holds a dataset already; choose another folder or delete its {LOCK}")
    for task in tasks:
        file = (out / task.name).with_suffix(".npy")
        if file.exists() and "key" not in (np.load(file, mmap_mode="r", allow_pickle=False).dtype.names or ()):
            raise ConfigError(f"{file} is an array of yours, and the index would replace it; choose another folder")


def _measured(out: Path, lock: dict[str, Any], workers: int | None) -> dict[str, Any]:
    """Statistics of a keyed sample of the images."""
    dataset = Dataset(out, lock)
    picks = keyed_picks(len(dataset), NUM_MEASURED, "statistics")
    size = 50  # a task of some seconds even over a network
    chunks = [picks[start : start + size] for start in range(0, len(picks), size)]
    measure = functools.partial(_measure, dataset)
    written = run_all(
        measure, chunks, workers=workers, description="measure", total=len(picks), done=lambda chunk, _: len(chunk)
    )
    measured = sum(one.count for one in written)
    if not measured:
        bad = written[0].left_out[0]
        raise DataError(f"none of {len(picks)} images of {out} can be decoded; {bad['file']}: {bad['reason']}")
    used = [one for one in written if one.count]
    return {**statistics_of(used, None, dataset.pixel_classes), "num_measured": measured}


def _measure(dataset: Dataset, picks: list[int]) -> Written:
    """Decode some samples by their number in the dataset."""
    written, store = Written(""), Store()
    for pick in picks:
        sample = dataset.read_with(store, *dataset.locate(pick), label_map=True)
        try:
            written.add(*read_sample(sample, dataset.pixel_classes), sample.label)
        except BadImage as error:
            written.left_out.append({"file": sample.key, "reason": str(error)})
    return written
