"""What a machine tells of itself, and what it says stands in the way of a run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from mim import config
from mim.clusters import doctor
from mim.job import Config
from tests.test_cli import mim  # noqa: F401  (a fixture)
from tests.tiny import write_recipe

GIB = 2**30
GPU = {"name": "A", "uuid": "GPU-1", "memory": 80 * GIB, "supported": True}


@pytest.fixture
def machine(tmp_path):
    """`machine(fact=value)`: the facts of a healthy one with these instead."""
    healthy = {"driver": True, "devices": [GPU], "shared_memory": 8 * GIB, "open_files": None, "infiniband": True}
    healthy |= {"locked_memory": None, "versions": {"torch": "2.15.0", "cuda": "13.2"}}
    healthy |= {"folders": {"train.run": {"path": "runs/x", "free": 99 * GIB, "total": 100 * GIB}}}
    return lambda **changes: healthy | changes


def test_a_healthy_machine_has_no_problem(machine):
    assert doctor.problems(machine()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"devices": []}, "there is an NVIDIA driver, but torch 2.15.0 (CUDA 13.2) sees no GPU"),
        ({"devices": [GPU | {"supported": False}]}, "torch has no code for A"),
        ({"shared_memory": 64 * 2**20}, "/dev/shm has 64 MiB free"),
        ({"open_files": 256}, "a process may open 256 files; raise it with ulimit -n 65536"),
        ({"locked_memory": 8 * 2**20}, "a process may lock 8 MiB of memory, but InfiniBand needs it unlimited"),
        (
            {"folders": {"train.run": {"path": "r", "free": GIB, "total": GIB}}},
            "train.run r has 1.0 GiB free of 1.0 GiB",
        ),
    ],
)
def test_what_stands_in_the_way_is_one_sentence_with_its_remedy(machine, changes, sentence):
    (line,) = doctor.problems(machine(**changes))
    assert line.startswith(sentence)
    assert ";" in line


def test_code_runs_on_gpus_of_its_major_version_and_later_ones_by_compilation():
    assert doctor.supported("sm_86", ["sm_80", "sm_90"])
    assert doctor.supported("sm_120", ["sm_80", "compute_90"])
    assert doctor.supported("sm_90", ["sm_75", "sm_90a"])
    assert not doctor.supported("sm_70", ["sm_75", "sm_80"])
    assert not doctor.supported("sm_120", ["sm_80", "sm_90"])


def test_the_hash_of_the_sources_changes_with_any_of_them(tmp_path, monkeypatch):
    for package in (doctor.mim, doctor.tokenizer):
        root = Path(package.__file__).parent
        shutil.copytree(root, tmp_path / root.name)
    before = doctor.sources_hash()
    monkeypatch.setattr(doctor.mim, "__file__", str(tmp_path / "mim" / "__init__.py"))
    monkeypatch.setattr(doctor.tokenizer, "__file__", str(tmp_path / "tokenizer" / "__init__.py"))
    assert doctor.sources_hash() == before
    (tmp_path / "tokenizer" / "dvae.py").open("a").write("\n")
    assert doctor.sources_hash() != before


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_disk_that_it_will_lie_on(tmp_path):
    found = doctor.disk(tmp_path / "a" / "b")
    assert found["total"] == shutil.disk_usage(tmp_path).total
    assert not (tmp_path / "a").exists()


def cfg_of(tmp_path, path, **more):
    return config.typed(Config, config.read(write_recipe(tmp_path / "r.yaml", {"path": str(path)}, "2 steps", **more)))


def test_locks_are_found_where_the_data_are(tmp_path, shards):
    assert doctor.locks(cfg_of(tmp_path, shards)).keys() == {f"{shards}/train", f"{shards}/val"}
    assert doctor.locks(cfg_of(tmp_path, shards / "val")).keys() == {f"{shards}/val"}


def test_data_that_are_not_here_or_are_no_shards_are_problems(tmp_path, image_folder):
    for path, sentence in ((tmp_path / "no", "is not here; mount"), (image_folder, "is no dataset; make one")):
        cfg = cfg_of(tmp_path, path)
        (line,) = doctor.missing(cfg, doctor.locks(cfg))
        assert sentence in line


def test_the_cache_is_looked_at_where_a_run_would_use_it_alone(tmp_path, shards, image_folder):
    assert doctor.folders_of(cfg_of(tmp_path, shards), None) == {}
    assert doctor.folders_of(cfg_of(tmp_path, image_folder), None).keys() == {"train.cache_dir"}
    remote = tmp_path / "remote"
    shutil.copytree(shards / "train", remote)
    lock = (remote / "dataset.lock.json").read_text()
    (remote / "dataset.lock.json").write_text(lock.replace('"file": "', '"file": "https://host/'))
    assert doctor.folders_of(cfg_of(tmp_path, remote), None).keys() == {"train.cache_dir"}


def test_a_tokenizer_or_parent_that_is_not_here_is_a_problem(tmp_path, shards):
    cfg = cfg_of(tmp_path, shards, tokenizer={"path": str(tmp_path / "tok")}, init={"run": f"{shards}@7"})
    (line,) = doctor.missing(cfg, doctor.locks(cfg))
    assert line.startswith(f"tokenizer.path={tmp_path}/tok is not here")


def test_the_command_tells_facts_and_problems_as_json_and_by_its_exit_code(mim, tmp_path, shards):  # noqa: F811
    recipe = write_recipe(tmp_path / "r.yaml", {"path": str(tmp_path / "absent")}, "2 steps")
    code, out, err = mim("doctor", recipe, f"train.run={tmp_path / 'run'}", "--json")
    found = json.loads(out)
    assert code == 69, err
    assert f"data {tmp_path}/absent is not here" in found["problems"][-1]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["folders"]["train.run"]["path"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_tells_people_the_same(mim):  # noqa: F811
    code, out, err = mim("doctor")
    assert code in (0, 69), err
    assert (code == 0) == ("no problem found" in out)
    assert out.startswith("host ")


def test_a_wrong_recipe_is_a_wrong_command(mim):  # noqa: F811
    code, _, err = mim("doctor", "mae_vitb16_in1k", "optim.lrr=1")
    assert code == 2
    assert "did you mean 'lr'" in err
