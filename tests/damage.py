"""Shards whose images are damaged but whose bytes are proven: what an index made from a stranger's tar looks like."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np

from mim.data.shards import LOCK, Dataset, build_index, dataset_id

DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "text": lambda data: b"<html>please log in</html>",
    "empty": lambda data: b"",
    "other format": lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n",
}


def spoil_images(path: Path, samples: list[int], kind: str = "cut") -> Dataset:
    """Replace the images of a dataset folder, by index over the dataset; index and lock follow."""
    lock = json.loads((path / LOCK).read_bytes())
    first = 0
    for shard in lock["shards"]:
        rows = {number - first for number in samples if first <= number < first + shard["count"]}
        first += shard["count"]
        if rows:
            rewrite(path / shard["file"], rows, kind)
            content = (path / shard["file"]).read_bytes()
            shard |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            index = build_index(path / shard["file"], labelled=lock["schema"]["classes"] is not None)
            np.save((path / shard["file"]).with_suffix(".npy"), index, allow_pickle=False)
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    (path / LOCK).write_text(json.dumps(lock))
    return Dataset.open(path)


def rewrite(file: Path, rows: set[int], kind: str) -> None:
    with tarfile.open(file) as old:
        members = [(member, old.extractfile(member).read()) for member in old.getmembers()]
    keys: dict[str, int] = {}
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in members:
            row = keys.setdefault(member.name.partition(".")[0], len(keys))
            if row in rows and not member.name.endswith(".cls"):
                data = DAMAGES[kind](data)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def quarantine(dataset: Dataset, samples: list[int]) -> None:
    """Write quarantine.json as `mim shards verify` does."""
    lock = json.loads((dataset.path / LOCK).read_bytes())
    ends = np.cumsum(dataset.counts)
    entries = []
    for number in samples:
        shard = int(np.searchsorted(ends, number, side="right"))
        row = number - int(ends[shard] - dataset.counts[shard])
        key = dataset.read(shard, row).key.partition("/")[2]
        entries.append({"shard": lock["shards"][shard]["file"], "row": row, "key": key, "reason": "image: truncated"})
    found = {"format": 1, "dataset_id": dataset.id, "samples": entries}
    (dataset.path / "quarantine.json").write_text(json.dumps(found))
