"""The token cache: codes of K views of every image, made once by a frozen tokenizer, read by every epoch after it.

With `data.views: K` crop, flip and colours of a sample are drawn by (epoch mod K), so the codes of its views come again
and need not be computed again. A cache is a folder beside the shards:

    codes-00000.npy      uint16 or uint32 (samples, K, draws, N), one file per shard of the dataset
    tokens.lock.json     format; `binding`: what decides the codes; `made`: rows per micro-batch, type and device;
                         the tokenizer's facts; samples, size, sha256 and bad samples of each file

The binding holds the dataset, the tokenizer's hash, and all that decides what the tokenizer sees of an image. A recipe
that differs in any of it is refused. A file is mapped, and proven by its hash when it is first read.

Convolutions of other micro-batches round otherwise, so a code near a tie may differ: a cached run equals an uncached
one bit for bit when `made` is what it would run with.

A sample that could not be decoded has no codes, and is never shown: what stands in its slot is another sample, whose
view is drawn by that sample's own name where there are views (`stream.Renderer`), so its codes are known.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from mim.config import ConfigError, difference
from mim.contracts import Batch, DataError
from mim.data.mapped import MAX_MAPPED, map_array
from mim.data.order import Place, Recent, Slots, key64
from mim.data.shards import locate
from mim.data.stream import Renderer
from mim.log import aside

FORMAT = 1
LOCK = "tokens.lock.json"
AGAIN = "run its `mim tokens make` again, which makes what is damaged anew"


@dataclass(frozen=True)
class TokenizerFacts:
    """What training must know of a tokenizer that it does not load."""

    sha256: str  # of its two files
    num_codes: int
    stride: int  # pixels per code
    channels: int
    card: dict[str, float]  # its score card

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the codes of an (H, W) image."""
        return image_size[0] // self.stride, image_size[1] // self.stride


class TokenCache:
    """A token cache opened for reading. Cheap to pickle, safe to fork: files are opened, and proven, on use."""

    def __init__(self, path: Path, lock: dict[str, Any]) -> None:
        self.path = path
        self.binding: dict[str, Any] = lock["binding"]
        self.made: dict[str, Any] = lock["made"]
        self.tokenizer = TokenizerFacts(**lock["tokenizer"])
        self._shards: list[dict[str, Any]] = lock["shards"]
        self._ends = np.cumsum([shard["count"] for shard in self._shards])
        self._files: Recent[np.ndarray] = Recent(MAX_MAPPED)
        self._proven: set[int] = set()

    @classmethod
    def open(cls, path: Path | str) -> TokenCache:
        """Open a cache; check that its files are there in full length. Raises ConfigError or DataError."""
        path = Path(path).expanduser()
        lock = read_lock(path)
        for shard in lock["shards"]:
            file = path / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["size"]:
                fact = "is missing" if size is None else f"has {size} bytes instead of {shard['size']}"
                raise DataError(f"{file} {fact}; {AGAIN}")
        return cls(path, lock)

    def check(self, binding: dict[str, Any]) -> None:
        """Refuse a recipe for which the cache was not made, with both values. Raises ConfigError."""
        if self.binding["views"] != binding["views"]:
            views = self.binding["views"]
            raise ConfigError(
                f"tokens={self.path} holds {views} views of an image, but data.views={binding['views']}; set "
                f"data.views={views}, or make another cache: mim tokens make RECIPE --views K --out PATH"
            )
        if changed := difference(self.binding, binding):
            raise ConfigError(
                f"tokens={self.path} was made for something else, cache -> recipe: {'; '.join(changed)}; make another "
                f"cache (mim tokens make RECIPE --views K --out PATH), or leave out `tokens`"
            )

    def codes(self, sample: int, view: int, draw: int) -> np.ndarray:
        """The codes (N,) of a view of a sample, by its index over the dataset. Raises DataError if there are none."""
        shard, row = locate(self._ends, sample)
        found = self._file(int(shard))[row, view, draw]
        if found[0] == missing(found.dtype):
            raise DataError(
                f"{self.path / self._shards[shard]['file']}: sample {sample} of the dataset has no codes, it could not "
                f"be decoded when the cache was made; run `mim shards verify --decode` on the dataset, or make the "
                f"cache again in another folder"
            )
        return found

    def describe(self, made: dict[str, Any]) -> str:
        """The start line: how it was made, and whether that gives this run (`made`) the very codes."""
        views, by = self.binding["views"], ", ".join(f"{name} {value}" for name, value in self.made.items())
        same = "a run without it" if made == self.made else "nearly those of a run without it"
        differs = "; ".join(difference(self.made, made))
        shown = f" (cache -> run: {differs})" if differs else ""
        return f"tokens {self.path}: {views} views, made with {by}; codes of {same}{shown}"

    def _file(self, shard: int) -> np.ndarray:
        """The codes of a shard (samples, K, draws, N), mapped; its bytes are proven once."""
        return self._files.get((shard,), lambda: self._open_file(shard))

    def _open_file(self, shard: int) -> np.ndarray:
        entry, file = self._shards[shard], self.path / self._shards[shard]["file"]
        if shard not in self._proven:
            found = hash_of(file)
            if found != entry["sha256"]:
                raise DataError(f"{file} is damaged: its sha256 is {found}, {LOCK} says {entry['sha256']}; {AGAIN}")
            self._proven.add(shard)
        try:
            codes = map_array(file)
        except ValueError as error:
            raise DataError(f"{file} is no array of codes ({error}); {AGAIN}") from error
        h, w = self.binding["grid"]
        shape = (entry["count"], self.binding["views"], self.binding["repeats"], h * w)
        dtype = code_dtype(self.tokenizer.num_codes)
        if codes.shape != shape or codes.dtype != dtype:
            raise DataError(f"{file} holds {codes.dtype} {codes.shape}, {LOCK} says {dtype} {shape}; {AGAIN}")
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": Recent(MAX_MAPPED), "_proven": set()}


class EveryView(torch_data.Dataset[Batch]):
    """Micro-batches of samples in all their views, as the training stream shows them, padded to one size."""

    def __init__(self, renderer: Renderer, size: int, repeats: int) -> None:
        assert renderer.views is not None
        self.renderer, self.size, self.repeats = renderer, size, repeats
        self._ends = np.cumsum(renderer.dataset.counts)

    def plan(self, shards: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, last row) of each micro-batch; rows are (sample, view, draw) of the shard, in order."""
        for shard in shards:
            total = int(self.renderer.dataset.counts[shard]) * self._per_sample
            for start in range(0, total, self.size):
                yield shard, start, min(start + self.size, total)

    def __getitem__(self, rows: tuple[int, int, int]) -> Batch:
        shard, start, end = rows
        row, rest = np.divmod(np.arange(start, end), self._per_sample)
        view, draw = np.divmod(rest, self.repeats)
        first = self._ends[shard] - self.renderer.dataset.counts[shard]
        slots = Slots(view, np.full_like(row, shard), row, first + row, draw)
        batch = self.renderer.render(slots, end - start, self.size, lambda at, attempt: self._other(slots, at, attempt))
        batch["rows"], batch["shown"] = rows, torch.from_numpy(np.array(batch.pop("samples")) == slots.sample)
        return batch

    @property
    def _per_sample(self) -> int:
        assert self.renderer.views is not None
        return self.renderer.views * self.repeats

    def _other(self, slots: Slots, at: int, attempt: int) -> Place:
        """Any sample in the place of a bad one: its row is not kept."""
        number = key64("tokens", int(slots.sample[at]), attempt) % int(self._ends[-1])
        shard, row = locate(self._ends, number)
        return Place(int(shard), int(row), number)


def made_with(rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What decides how the tokenizer rounds; `dtype` is that of its matrix products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    in_words = str(dtype).removeprefix("torch.")
    return {"rows": rows, "dtype": in_words, "device": name, "torch": str(torch.__version__)}


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest type for the codes, and one number more for what has none."""
    return np.dtype("<u2") if num_codes <= np.iinfo("<u2").max else np.dtype("<u4")


def missing(dtype: np.dtype) -> int:
    """What stands in the place of the codes of a sample that could not be decoded."""
    return int(np.iinfo(dtype).max)


def file_name(shard: int) -> str:
    """Name of the codes of a shard of the dataset."""
    return f"codes-{shard:05d}.npy"


def write_codes(folder: Path, shard: int, codes: np.ndarray) -> dict[str, Any]:
    """Write the codes (samples, K, draws, N) of a shard aside, then rename the file; return its entry in the lock."""
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=False)
    content = buffer.getbuffer()
    with aside(folder / file_name(shard), "wb") as file:
        file.write(content)
    bad = np.flatnonzero(codes[:, 0, 0, 0] == missing(codes.dtype)).tolist()
    sha256 = hashlib.sha256(content).hexdigest()
    return {"file": file_name(shard), "count": len(codes), "size": len(content), "sha256": sha256, "bad": bad}


def hash_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_lock(path: Path) -> dict[str, Any]:
    """Read and check the lock of a token cache. Raises ConfigError or DataError."""
    file = path / LOCK
    if not file.is_file():
        raise ConfigError(
            f"{path} is no token cache, or one that is not finished: it holds no {LOCK}; make one: "
            f"mim tokens make RECIPE --views K --out {path}"
        )
    try:
        lock = json.loads(file.read_bytes())
        if (version := int(lock["format"])) > FORMAT:
            raise DataError(
                f"{file} has format {version}, newer than the {FORMAT} that this version reads; update mimstream"
            )
        TokenizerFacts(**lock["tokenizer"])
        names = [Path(shard["file"]).name == shard["file"] for shard in lock["shards"]]
        if not all(names) or not {"views", "repeats", "grid"} <= lock["binding"].keys() or not lock["made"]:
            raise ValueError("its entries are not those of a cache")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a lock of a token cache ({error!r}); make the cache again") from error
    return lock
