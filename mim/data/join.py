"""Join what the parts of `make`, `index` or `verify` left: into one dataset, or one report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import index, make, verify
from mim.data.parts import read_parts
from mim.data.plan import KIND
from mim.data.shards import LOCK, is_dataset, read_lock
from mim.data.verdict import VerifyReport


@dataclass(frozen=True)
class JoinReport:
    """What `join` did."""

    path: Path
    joined: str  # make, index, verify, or nothing
    num_samples: int
    num_quarantined: int | None
    verified: list[VerifyReport]  # of OUT, or of OUT/train and OUT/val

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, as far as it was verified."""
        return all(report.clean for report in self.verified)

    def text(self) -> str:
        """The report for people."""
        done = "nothing to join, it is whole" if self.joined == "nothing" else f"joined the parts of {self.joined}"
        bad = "" if self.num_quarantined is None else f", {self.num_quarantined} of them in quarantine"
        lines = [f"{self.path}: {done}; {self.num_samples} samples{bad}"]
        return "\n".join(lines + [report.text() for report in self.verified])


def join(out: Path | str) -> JoinReport:
    """Join all parts in OUT. May be repeated: a dataset that is whole stays as it is.

    Raises ConfigError when a part is missing, DataError when one cannot be read.
    """
    out = Path(out)
    if not out.is_dir():
        raise ConfigError(f"{out} is no folder; name the OUT of the parts")
    parts = read_parts(out, LOCK.removesuffix(".json"))
    joined = "nothing"
    if parts:
        joined = parts[0]["kind"]
        if joined == KIND:
            make.join(out, parts[0])
        else:
            _join_index(out, parts)
    roots = [root for root in (out, out / "train", out / "val") if is_dataset(root)]
    if not roots:
        read_lock(out)  # says that this is no dataset
    verified = [report for root in roots if (report := verify.join(root)) is not None]
    if verified and not parts:
        joined = verify.STEM
    quarantined = [report.num_quarantined for report in verified if report.num_quarantined is not None]
    samples = sum(shard["count"] for root in roots for shard in read_lock(root)["shards"])
    return JoinReport(out, joined, samples, sum(quarantined) if quarantined else None, verified)


def _join_index(out: Path, parts: list[dict[str, Any]]) -> None:
    facts = sorted((fact for part in parts for fact in part["shards"]), key=lambda fact: fact["number"])
    if [fact["number"] for fact in facts] != list(range(parts[0]["num_shards"])):
        raise DataError(
            f"{out}: the parts do not hold each of the {parts[0]['num_shards']} tars once; index them again"
        )
    index.finish(out, parts[0]["source"], facts)
