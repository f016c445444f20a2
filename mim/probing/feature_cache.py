"""Features on disk: an extraction that was killed goes on, and a second evaluation reads what the first one made.

    CACHE/<hash>/head.json       what the features are of: weights, images, view, layers, machine; the hash is over it
                 block-00012.*   one .npy per column, and a .json with keys, labels and checksums, which comes last
    when all are there:  <layer>_<pooling>.npy for each column, rows.json, and no blocks

Other weights, data or settings make another hash, so features are never taken for those of another model. Each file
is written aside and renamed. Ranks write blocks of their own into the folder, which all must see.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format

from mim import config, ranks
from mim.contracts import DataError, StorageError
from mim.data.checksum import crc32
from mim.data.write import storing
from mim.log import aside, say, write_json
from mim.probing.bank import Bank, Block, Part

ROWS, HEAD = "rows.json", "head.json"
RESERVE = 64 << 20  # bytes that are left to others


class FeatureCache:
    """A `mim.probing.bank.Store` in a folder."""

    def __init__(self, root: Path, binding: dict[str, Any], device: torch.device) -> None:
        self.binding = config.plain(binding)
        self.folder = root.expanduser() / config.digest(self.binding)[:16]
        self.device = device
        self._left = 0  # rows that all ranks still have to write

    def missing(self, blocks: list[Block]) -> list[Block]:
        """The blocks that are not there, as the main rank finds them."""
        told: list[int] = []
        if ranks.place()[0] == 0:
            with storing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / HEAD, self.binding)
            whole = self._whole()
            told = [] if whole else [block.number for block in blocks if not self._has(block)]
            if whole or len(told) < len(blocks):
                say(f"features of {len(blocks) - len(told)} of {len(blocks)} blocks are in {self.folder}")
        numbers = set(ranks.gather(told, self.device))
        found = [block for block in blocks if block.number in numbers]
        self._left = sum(block.end - block.start for block in found)
        return found

    def put(self, block: Block, part: Part) -> None:
        """Write a block; its marker comes last."""
        arrays = {name: column.numpy() for name, column in part.columns.items()}
        self._check_space(arrays)
        sums = {}
        with storing(self.folder):
            for name, array in arrays.items():
                with aside(self._file(block, name), "wb") as file:
                    np.save(file, array, allow_pickle=False)
                sums[name] = checksum(array)
            facts = {"keys": part.keys, "labels": part.labels.tolist(), "crc32": sums}
            write_json(self._file(block, None), facts)

    def part(self, block: Block) -> Part:
        """A block as it was written. Raises DataError when it is not there, or not what was written."""
        facts = self._facts(block)
        columns = {name: torch.from_numpy(self._array(block, name, facts)) for name in facts["crc32"]}
        return Part(facts["keys"], torch.tensor(facts["labels"], dtype=torch.int64), columns)

    def finish(self, blocks: list[Block]) -> Bank:
        """Join the blocks into one file per column, and map these."""
        ranks.wait()
        if ranks.place()[0] == 0 and not self._whole():
            self._join(blocks)
        ranks.wait()
        rows = json.loads((self.folder / ROWS).read_bytes())
        labels = torch.tensor(rows["labels"], dtype=torch.int64)
        # copy-on-write, or torch would warn that nobody may write into it
        columns = {
            name: torch.from_numpy(np.load(self.folder / file_name(name), mmap_mode="c")) for name in rows["columns"]
        }
        return Bank(rows["keys"], labels, columns)

    def _join(self, blocks: list[Block]) -> None:
        facts = [self._facts(block) for block in blocks]
        columns = list(facts[0]["crc32"]) if facts else []
        with storing(self.folder):
            for name in columns:
                arrays = (self._array(block, name, known) for block, known in zip(blocks, facts, strict=True))
                write_column(self.folder / file_name(name), arrays, blocks[-1].end)
            rows = {key: [value for known in facts for value in known[key]] for key in ("keys", "labels")}
            write_json(self.folder / ROWS, {"columns": columns, **rows})
            for file in self.folder.glob("block-*"):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete it all, and its root where that is empty then: what is made of it is written elsewhere."""
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _whole(self) -> bool:
        """Whether the joined files are there: their list is written when they are."""
        return (self.folder / ROWS).is_file()

    def _file(self, block: Block, column: str | None) -> Path:
        ending = "json" if column is None else file_name(column)
        return self.folder / f"block-{block.number:05d}.{ending}"

    def _has(self, block: Block) -> bool:
        """Whether a block is there, and is what was written."""
        try:
            facts = self._facts(block)
            return all(len(self._array(block, name, facts)) == block.end - block.start for name in facts["crc32"])
        except DataError:
            return False

    def _facts(self, block: Block) -> dict[str, Any]:
        """Keys, labels and the checksums of the columns of a block."""
        file = self._file(block, None)
        try:
            return json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file} is missing or damaged ({error}): all processes must write into one folder that all of them "
                f"see; give another one, or run the command again"
            ) from error

    def _array(self, block: Block, name: str, facts: dict[str, Any]) -> np.ndarray:
        """A column of a block (rows, ...)."""
        file = self._file(block, name)
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is missing or damaged ({error}); run the command again") from error
        if checksum(array) != facts["crc32"][name]:
            raise DataError(f"{file} is not what was written: its checksum differs; run the command again")
        return array

    def _check_space(self, arrays: dict[str, np.ndarray]) -> None:
        """Refuse to begin what the disk cannot hold: all rows, and the largest column a second time when it is joined.

        The size of a row is known from the first block that this process makes.
        """
        if not self._left:
            return
        rows = len(next(iter(arrays.values())))
        sizes = [array.nbytes / rows for array in arrays.values()]
        needed = round(self._left * (sum(sizes) + max(sizes)))
        self._left = 0
        free = shutil.disk_usage(self.folder).free - RESERVE
        if needed > free:
            raise StorageError(
                f"the features need {needed / 2**30:.2f} GiB in {self.folder}, where {max(free, 0) / 2**30:.2f} GiB "
                f"are free; give another folder, fewer images (train_limit), or pooled features instead of tokens"
            )


def file_name(column: str) -> str:
    """The file of a column."""
    return f"{column.replace('/', '_')}.npy"


def checksum(array: np.ndarray) -> int:
    """CRC32 of the values."""
    return crc32(np.ascontiguousarray(array).view(np.uint8).data)


def write_column(path: Path, arrays: Iterable[np.ndarray], rows: int) -> None:
    """Write arrays (n_i, ...) of so many rows, one after the other, as one .npy; it takes its name when it is whole."""
    with aside(path, "wb") as file:
        for number, array in enumerate(arrays):
            if number == 0:
                header = npy_format.header_data_from_array_1_0(array)
                npy_format.write_array_header_1_0(file, {**header, "shape": (rows, *array.shape[1:])})
            file.write(np.ascontiguousarray(array).data)
