"""An upload happens only when it is asked for, and what cannot work is told before anything is exported."""

import json
import types
import typing

import huggingface_hub
import pytest

from mim import __main__, build
from mim.config import ConfigError
from mim.contracts import StorageError
from mim.handover import hub


class Api:
    """What huggingface_hub.HfApi does, written down instead of done."""

    calls: typing.ClassVar[list] = []

    def __init__(self, **options):
        pass

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, options))
        return types.SimpleNamespace(repo_id=repository, __str__=lambda self: "")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return Api


def command(capsys, *arguments):
    __main__.cli(["export", "timm", *map(str, arguments)], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def test_nothing_is_uploaded_unless_it_is_asked_for(api, loaded_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "load_run", lambda path, step: loaded_run("mae"))
    report = command(capsys, "run", tmp_path / "out")
    assert "uploaded" not in report
    assert api.calls == []


def test_the_whole_export_goes_to_a_private_repository(api, loaded_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "load_run", lambda path, step: loaded_run("mae"))
    report = command(capsys, "run", tmp_path / "out", "--push-to-hub", "me/my-vit")
    assert report["uploaded"]
    assert api.calls == [
        ("create", "me/my-vit", {"private": True, "exist_ok": True}),
        ("upload", "me/my-vit", ["README.md", "config.json", "model.safetensors", "recipe.json", "report.json"]),
    ]


def test_without_a_token_nothing_is_exported(api, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token of the Hugging Face hub; run `hf auth login` or set HF_TOKEN"):
        __main__.cli(["export", "timm", "run", str(tmp_path / "out"), "--push-to-hub", "me/x"], standalone_mode=False)
    assert api.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_none_and_offline_mode_are_told(api, monkeypatch):
    with pytest.raises(ConfigError, match=r"'a/b/c' is no name of a repository"):
        hub.check("a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/x")


def test_an_upload_that_fails_leaves_the_export_and_says_so(api, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(StorageError, match=r"out is exported, but was not uploaded to me/x: no route to host"):
        hub.push(tmp_path / "out", "me/x")
