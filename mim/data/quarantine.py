"""Samples that cannot be decoded: the quarantine of a dataset, what a run finds itself, and the budget that stops it.

A sample is bad only when its bytes are proven right by their CRC32 and the decoder refuses them (`BadImage`). A failing
disk, a flipped bit or a short file is something else and stays fatal. The slot of a bad sample is filled by a
substitute that the order names, so a run that discovers a bad sample sees what a run sees that knew it.

    DATASET/quarantine.json   what `mim shards verify` refused: {"format", "dataset_id", "samples": [{"shard", "row",
                              "key", "reason"}]}
    RUN/journal.jsonl         a line per bad sample that the run met: step, key, reason, substitute
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mim.contracts import DataError
from mim.data.shards import QUARANTINE, read_lock
from mim.log import RunLog

FORMAT = 1
BUDGET_MIN = 10  # bad samples that any budget but 0 accepts
SHARD_SHARE = 0.05  # of one shard: more is a broken shard, not a few broken images
NAMED = 10  # bad samples that a message names

Gather = Callable[[list[Any]], list[Any]]  # the lists of all ranks, joined in the order of ranks


class Bad(NamedTuple):
    """Why a sample is not used."""

    key: str  # "shard.tar/sample"
    reason: str


def read_quarantine(path: Path, dataset_id: str) -> dict[int, Bad]:
    """Read the quarantine of a dataset folder: index over the whole dataset -> Bad. A missing file is an empty one.

    Raises DataError for a file that is damaged, newer than this program, or of another dataset.
    """
    file = path / QUARANTINE
    if not file.is_file():
        return {}
    remedy = f"run `mim shards verify {path}` again"
    try:
        found = json.loads(file.read_bytes())
        version, of, samples = int(found["format"]), found["dataset_id"], list(found["samples"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a quarantine ({error!r}); {remedy}") from error
    if version > FORMAT:
        raise DataError(f"{file} has format {version}, newer than the {FORMAT} that this version reads; {remedy}")
    if of != dataset_id:
        raise DataError(f"{file} was written for the dataset {of!r}, this one is {dataset_id!r}; {remedy}")
    first, shards = 0, {}
    for shard in read_lock(path)["shards"]:
        shards[shard["file"]] = (first, shard["count"])
        first += shard["count"]
    bad = {}
    for entry in samples:
        try:
            start, count = shards[entry["shard"]]
            if not 0 <= entry["row"] < count:
                raise ValueError(f"row {entry['row']} of {count}")
            bad[start + int(entry["row"])] = Bad(f"{entry['shard']}/{entry['key']}", str(entry["reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} names a sample that the dataset does not have ({error!r}); {remedy}") from error
    return bad


class Journal:
    """The bad samples of a run: known from the quarantine and the checkpoint, or met by any rank."""

    def __init__(self, quarantine: Mapping[int, Bad], counts: np.ndarray, *, budget: float):
        """`counts` are the samples per shard, `budget` is the share of the samples that may be bad."""
        self.bad: dict[int, Bad] = dict(quarantine)
        self._quarantine = dict(quarantine)
        self.budget = budget
        self._ends = np.cumsum(counts)
        self._counts = counts
        self._open: list[dict[str, Any]] = []  # of this rank, since the last collection
        self.check()

    def restore(self, state: Iterable[dict[str, Any]]) -> None:
        """Know what a checkpoint knew beside the quarantine, and nothing that was met since.

        A decoder that could read such a sample today must not change the stream.
        Raises DataError when that is more than the budget accepts: then the budget is what stopped the run.
        """
        self.bad = self._quarantine | {entry["sample"]: Bad(entry["key"], entry["reason"]) for entry in state}
        self._open = []
        self.check()

    def state(self) -> list[dict[str, Any]]:
        """All bad samples, as JSON for a checkpoint."""
        return [{"sample": sample, **bad._asdict()} for sample, bad in sorted(self.bad.items())]

    def add(self, step: int, met: Iterable[dict[str, Any]]) -> None:
        """Note what a batch of this rank met: `bad` of a batch."""
        self._open += [{"step": step, **entry} for entry in met]

    def collect(self, log: RunLog | None, gather: Gather) -> None:
        """Join the ranks' findings since the last call and write them (called on all ranks)."""
        for entry in sorted(gather(self._open), key=lambda entry: (entry["step"], entry["sample"])):
            self.bad.setdefault(entry["sample"], Bad(entry["key"], entry["reason"]))
            if log is not None:
                log.write("bad", **entry)
        self._open = []

    def check(self) -> None:
        """Raise DataError when more samples are bad than the budget accepts."""
        if (excess := self.excess()) is not None:
            raise DataError(excess)

    def excess(self) -> str | None:
        """Say what is too much when more samples are bad than the budget accepts, in the dataset or in one shard.

        None while the budget holds. After `collect` all ranks say the same.
        """
        numbers = np.array(sorted(self.bad), dtype=np.int64)
        total = int(self._ends[-1])
        if len(numbers) > (limit := self._limit(total, self.budget)):
            return self._message(numbers, f"of {total} samples, more than the {limit}", self.budget)
        shard = np.searchsorted(self._ends, numbers, side="right")
        for number, found in zip(*np.unique(shard, return_counts=True), strict=True):
            share, count = max(SHARD_SHARE, self.budget), int(self._counts[number])
            if found > (limit := self._limit(count, share)):
                inside = numbers[shard == number]
                return self._message(inside, f"of the {count} samples of one shard, more than {limit}", share)
        return None

    @staticmethod
    def _limit(num_samples: int, share: float) -> int:
        return max(BUDGET_MIN, int(share * num_samples)) if share else 0

    def _message(self, numbers: np.ndarray, of: str, share: float) -> str:
        named = "; ".join(": ".join(self.bad[number]) for number in numbers[:NAMED].tolist())
        more = f"; and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        return (
            f"{len(numbers)} {of} that data.bad_budget={self.budget:g} accepts ({share:g} of them, at least "
            f"{BUDGET_MIN if share else 0}), cannot be decoded ({named}{more}); make the shards again without them, "
            f"or raise data.bad_budget"
        )
