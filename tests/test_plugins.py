"""Plug-ins: the example of docs/extending.md trains, is evaluated and exported; code is imported only when named."""

import json
import re
import sys
from pathlib import Path

import pytest

from mim import __main__, config
from mim.config import ConfigError

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


def block(language: str) -> str:
    """The page's block of a language."""
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The page's package in a folder on the path; forgotten afterwards."""
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    (tmp_path / "mypackage" / "rotation.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture
def mim(monkeypatch, capsys):
    """`mim(*arguments)` runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mim", *map(str, arguments)])
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def trained(package, mim, shards):
    """A short run of the page's recipe."""
    (package / "rotation.yaml").write_text(block("yaml"))
    small = ["encoder.width=32", "encoder.depth=2", "encoder.num_heads=2", "data.image_size=32", "optim.batch_size=8"]
    short = ["optim.length=2 steps", "optim.warmup=1 steps", "train.cpu=true", "train.workers=0"]
    options = [f"data.path={shards}", f"train.run={package / 'run'}", *small, *short]
    code, _, err = mim("train", package / "rotation.yaml", *options, "--plugin", "mypackage")
    assert code == 0, err
    return package / "run"


def test_the_page_s_objective_is_trained_evaluated_and_exported(mim, trained, package):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert 0.5 < log[-1]["loss"] < 4  # near log 4 without training
    code, out, err = mim("eval", "knn", trained, "--plugin", "mypackage")
    assert code == 0, err
    assert 0 <= json.loads(out)["knn"] <= 1
    code, out, err = mim("export", "timm", trained, package / "out", "--plugin", "mypackage")
    assert code == 0, err
    assert json.loads(out)["max_difference"] == 0.0


def test_the_maker_of_a_token_cache_imports_a_plug_in_that_the_command_names(mim, package, shards):
    (package / "rotation.yaml").write_text(block("yaml") + f"tokenizer: {{path: {package / 'none'}}}\n")
    command = ["tokens", "make", package / "rotation.yaml", f"data.path={shards}", "--out", package / "tokens"]
    assert "add --plugin mypackage" in mim(*command, "--views", "2")[2]
    assert "holds no trained tokenizer" in mim(*command, "--views", "2", "--plugin", "mypackage")[2]


def test_a_run_of_a_plug_in_says_so_when_it_is_opened_without_the_flag(mim, trained, package):
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        del sys.modules[name]
    for command in (["eval", "knn", trained], ["export", "timm", trained, package / "out"]):
        code, out, err = mim(*command)
        assert (code, out) == (2, "")
        assert err == (
            "mim: objective.name='mypackage.rotation' is code of the package mypackage, which runs only if the command "
            "names it: add --plugin mypackage if you trust it\n"
        )
    assert "mypackage" not in sys.modules


def test_the_page_s_images_are_turned_as_their_labels_say(package):
    import torch
    from mypackage import rotation

    images = torch.arange(2 * 4).view(2, 1, 2, 2)
    assert rotation.turned(images, torch.tensor([0, 1])).tolist() == [[[[0, 1], [2, 3]]], [[[5, 7], [4, 6]]]]
    with pytest.raises(ValueError, match="square images, got 2x3"):
        rotation.turned(torch.zeros(1, 1, 2, 3), torch.zeros(1, dtype=torch.int64))


def test_code_of_a_package_that_is_not_named_is_never_imported(package):
    (package / "mypackage" / "__init__.py").write_text("raise SystemExit('imported')")
    for allowed in ((), ("mypack",), ("other",)):
        with config.plugins(allowed), pytest.raises(ConfigError, match="add --plugin mypackage if you trust it"):
            config.component("mim.objectives", {"name": "mypackage.rotation"}, "objective")


def test_the_permission_ends_with_the_command(package):
    with config.plugins(["mypackage"]):
        assert (
            config.component("mim.objectives", {"name": "mypackage.rotation", "hidden": 5}, "objective")[1].hidden == 5
        )
    with pytest.raises(ConfigError, match="--plugin"):
        config.component("mim.objectives", {"name": "mypackage.rotation"}, "objective")


@pytest.mark.parametrize(
    ("folder", "name", "words"),
    [
        (
            "mim.objectives",
            "mypackage.rotatoin",
            "cannot be imported (No module named 'mypackage.rotatoin'); install the",
        ),
        ("mim.objectives", "mypackage.empty", "is no plug-in: {root}/empty.py has no dataclass Config"),
        ("mim.evals", "mypackage.rotation", "is no plug-in: {root}/rotation.py has no function run"),
        ("tokenizer", "mypackage.rotation", "is unknown; choose one of dvae"),
    ],
)
def test_what_is_no_plug_in_is_refused(package, folder, name, words):
    (package / "mypackage" / "empty.py").write_text("")
    with config.plugins(["mypackage"]), pytest.raises(ConfigError) as error:
        config.component(folder, {"name": name}, "section")
    assert words.format(root=package / "mypackage") in str(error.value)


def test_options_of_a_plug_in_are_checked_as_those_of_any_component(package):
    with (
        config.plugins(["mypackage"]),
        pytest.raises(ConfigError, match=r"objective\.hiden is not a known key; did you"),
    ):
        config.component("mim.objectives", {"name": "mypackage.rotation", "hiden": 5}, "objective")
