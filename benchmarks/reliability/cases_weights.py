"""Group F, continued: weights, tokenizers and checkpoints that were made to do harm."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.cases_checkpoints import left, newest
from benchmarks.reliability.cases_hostile import MEMORY, Harm, unharmed
from benchmarks.reliability.training import Training, saved_tokenizer
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import LOUD, PASS, SKIPPED, Verdict, joined, refused
from mim.saving.checkpoint import verify

HUGE = 1 << 60


def pickles(canary: Path) -> dict[str, bytes]:
    """Files that run a program when they are unpickled, as torch writes them and as pickle does."""
    buffer = io.BytesIO()
    torch.save({"model": Harm(canary)}, buffer)
    return {"zip": buffer.getvalue(), "plain": pickle.dumps({"model": Harm(canary)})}


def harmful_pickles(bench: Bench, reader: str) -> Verdict:
    """F1t: pickles as initial weights, as a tokenizer, and planted in a checkpoint, where DCP and Accelerate look."""
    verdicts = []
    for form in ("zip", "plain"):
        folder = bench.scratch().parent
        canary = folder / "canary"
        harm = pickles(canary)[form]
        fired(b"system" in harm or form == "zip", "the planted pickle starts nothing")
        if reader == OURS:
            for what, (results, name) in _given(bench, folder, harm).items():
                verdicts.append((unharmed(results, canary) or refused(results, name)).of(f"{form}, {what}"))
        verdicts.append(_planted(bench, reader, harm, canary).of(f"{form}, in a checkpoint"))
    return joined(verdicts)


def _given(bench: Bench, folder: Path, harm: bytes) -> dict[str, tuple[list[Result], str]]:
    """Give a pickle to every command that takes somebody's weights: what came of it, and what must be named."""
    mae, beit = Training(bench, "mae"), Training(bench, "beit")
    found = {}
    for ending in ("pt", "pth", "bin", "safetensors"):
        file = folder / f"evil.{ending}"
        file.write_bytes(harm)
        found[f"encoder.init=evil.{ending}"] = mae.start(mae.folder(), f"encoder.init={file}"), file.name
    env = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    file = folder / "evil.pt"
    found["with torch told to read anything"] = mae.start(mae.folder(), f"encoder.init={file}", env=env), file.name
    imported = [bench.mim("tokenizer", "import", file, folder / "imported", env=more) for more in ({}, env)]
    found["tokenizer import"] = imported, file.name
    tokenizer = folder / "tokenizer"
    shutil.copytree(saved_tokenizer(bench), tokenizer)
    (tokenizer / "tokenizer.safetensors").write_bytes(harm)
    found["a tokenizer's weights"] = beit.start(beit.folder(), f"tokenizer.path={tokenizer}"), "tokenizer"
    return found


def _planted(bench: Bench, reader: str, harm: bytes, canary: Path) -> Verdict:
    """Pickles in the newest checkpoint, one at a time, under names that DCP and Accelerate unpickle.

    Ours must take no notice of them. The usual recipe has no other files: it must refuse them.
    """
    training = Training(bench, "mae") if reader == OURS else Training(bench, "usual", ordered=True)
    run, verdicts = left(training), []
    for name in (".metadata", "tensors/.metadata", "custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        copy = training.folder()
        shutil.copytree(run, copy)
        if not (newest(copy) / name).parent.is_dir() or (reader != OURS and not (newest(copy) / name).exists()):
            continue
        (newest(copy) / name).write_bytes(harm)
        results = training.start(copy)
        verdict = unharmed(results, canary)
        canary.unlink(missing_ok=True)
        verdicts.append((verdict or training.judged(results, copy)).of(name))
    return joined(verdicts)


# ---- weights that are not what they say ----------------------------------------------------------


def lying_header(shape: list[int], end: int) -> bytes:
    """A safetensors file whose header promises a tensor that is not there."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header


BOMBS = {
    "a header of 2^60 bytes": struct.pack("<Q", HUGE) + b"{}",
    "a tensor of 2^60 bytes": lying_header([HUGE // 4], HUGE),
    "a shape that is not its bytes": lying_header([1000, 1000], 16) + bytes(16),
    "a header without an end": struct.pack("<Q", 100 << 20) + b'{"a":' * 1000,
    "a deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "nothing": b"",
}


def tampered(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a run whose newest checkpoint holds other tensors, by the hand of somebody who mended the manifest."""
    copy = run.parent / "tampered"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    for file in (newest(copy) / "tensors").glob("*.safetensors"):
        found = load_file(file)
        change(found)
        save_file(found, file)
        mend(newest(copy), file)
    fired(verify(newest(copy)) is None, "the manifest was not mended")
    return copy


def mend(checkpoint: Path, file: Path) -> None:
    """Write size and hash of a file into the manifest."""
    manifest, data = json.loads((checkpoint / "manifest.json").read_text()), file.read_bytes()
    entry = manifest["files"][str(file.relative_to(checkpoint))]
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def not_finite(found: dict[str, Any]) -> None:
    """Put a NaN into every weight of the model and of its average."""
    for name in found:
        if name.startswith(("model.", "ema.")) and found[name].dtype == np.float32:
            found[name] = found[name].copy()
            found[name].flat[0] = np.nan


def other_shapes(found: dict[str, Any]) -> None:
    """Give every matrix a row more."""
    for name in found:
        if found[name].ndim == 2:
            found[name] = np.concatenate([found[name], found[name][:1]])


def lying_weights(bench: Bench, reader: str) -> Verdict:
    """F8: bombs in headers, NaN, other shapes: as initial weights, as a checkpoint, as a tokenizer."""
    if reader != OURS:
        return Verdict(SKIPPED, "torch and safetensors read them; what they refuse is theirs")
    mae, beit, verdicts = Training(bench, "mae"), Training(bench, "beit"), []
    run = left(mae)
    for what, content in BOMBS.items():
        file = bench.scratch().with_name("bomb.safetensors")
        file.write_bytes(content)
        verdicts.append(
            _refused(mae.start(mae.folder(), f"encoder.init={file}"), file.name).of(f"encoder.init, {what}")
        )
        folder = file.parent / "tokenizer"
        shutil.copytree(saved_tokenizer(bench), folder)
        (folder / "tokenizer.safetensors").write_bytes(content)
        results = beit.start(beit.folder(), f"tokenizer.path={folder}")
        verdicts.append(_refused(results, "tokenizer.safetensors").of(f"tokenizer, {what}"))
        copy = tampered(run, lambda _found: None)
        for tensors in (newest(copy) / "tensors").glob("*.safetensors"):
            tensors.write_bytes(content)
            mend(newest(copy), tensors)
        verdicts.append(_refused(mae.start(copy), newest(copy).name).of(f"checkpoint, {what}"))
    for change in (not_finite, other_shapes):
        copy = tampered(run, change)
        starts = {
            "going on": mae.start(copy),
            "init.run": mae.start(mae.folder(), f"init.run={copy}"),
            "encoder.init": mae.start(mae.folder(), f"encoder.init={copy}"),
            "export": [bench.mim("export", "timm", copy, bench.scratch(), limit=90)],
        }
        for what, results in starts.items():
            verdicts.append(_refused(results).of(f"{what}, {change.__name__}"))
    return joined(verdicts)


def _refused(results: list[Result], *naming: str) -> Verdict:
    """Refused in one sentence, by name, without taking memory for what is promised."""
    verdict = refused(results, *naming)
    if verdict.kind == PASS and "Traceback" in results[0].text:
        return Verdict(LOUD, f"a traceback: {verdict.detail}")
    if verdict.kind == PASS and results[0].grown > MEMORY:
        return Verdict(LOUD, f"took {results[0].grown >> 20} MiB")
    return verdict


CASES = (
    Case("F1t", "pickles as weights, tokenizers, in checkpoints", harmful_pickles),
    Case("F8", "header bombs, NaN, other shapes in weights", lying_weights),
)
