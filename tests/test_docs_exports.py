"""docs/exports.md works as it stands: its commands export a tiny run, its Python blocks run on the result."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mim import __main__, build, config

PAGE = (Path(__file__).parent.parent / "docs" / "exports.md").read_text()
COMMANDS = re.findall(r"^    mim (export [^#\n]+)", PAGE, re.MULTILINE)
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_has_commands_and_blocks():
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"timm", "onnx", "torch"}
    assert len(BLOCKS) > 5


def test_the_commands_and_then_the_blocks_of_the_page_run(loaded_run, tmp_path, monkeypatch):
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(build, "load_run", lambda path, step: loaded_run("mae"))
    for command in COMMANDS:
        words = shlex.split(command)
        if "--push-to-hub" not in words and words[1] in config.known_names("mim.exports"):
            __main__.cli(words, standalone_mode=False)
    torch.manual_seed(0)
    namespace = {}
    for block in BLOCKS:
        run = compile(block, "docs/exports.md", "exec")
        exec(run, namespace)
    assert namespace["report"]["max_difference"] == 0.0
    assert namespace["patches"].shape == (2, 16, 32)
    assert namespace["features"].shape == (1, 32)
    assert namespace["outputs"]["pooled"].shape == (3, 32)
    assert namespace["loss"].isfinite()
    assert [tuple(found.shape) for found in namespace["maps"]] == [(1, 32, 4, 4)] * 2
    assert {"boxes", "labels", "scores"} == namespace["found"].keys()
    assert all(torch.isfinite(value) for value in namespace["losses"].values())
