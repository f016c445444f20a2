"""The snippets about transformers in docs/exports.md run, in their order, on an export of a tiny run."""

import re
from pathlib import Path

import pytest

from mim.exports import transformers as target

pytest.importorskip("transformers")

PAGE = Path(__file__).parent.parent / "docs" / "exports.md"


def test_the_snippets_of_the_page_run(loaded_run, tmp_path, monkeypatch):
    section = PAGE.read_text().partition("\n## transformers\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    target.export(loaded_run("mae"), Path("exports/hf"), target.Config(kind="dinov2"))
    scope = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["tokens"].shape == (1, 17, 32)
    assert scope["loss"].isfinite()
    assert [tuple(found.shape) for found in scope["maps"]] == [(1, 32, 4, 4)] * 2
