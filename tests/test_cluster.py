"""The check of a cluster: two hosts that are as they must be, and two that are not, each named in one sentence."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from mim import config
from mim.clusters import cluster, meeting
from mim.config import ConfigError
from mim.job import Config
from tests.test_cli import mim  # noqa: F401  (a fixture)
from tests.two_hosts import TwoHosts, possible

ROOT = Path(__file__).parent.parent
PORT = "29511"  # in a network of its own


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts of this kernel; where it forbids them, what needs them is left out."""
    if not possible(tmp_path_factory.mktemp("try")):
        pytest.skip("this kernel lets no user make network namespaces")
    pair = TwoHosts(tmp_path_factory.mktemp("hosts"))
    yield pair
    pair.end()


@pytest.fixture(scope="module")
def told(hosts, image_folder, shards, tmp_path_factory):
    """`told(arguments, nodeb=environment)`: run `mim doctor --cluster` on both hosts; exit codes, output, errors."""

    def run(*arguments, **environments):
        processes = []
        for rank, host in enumerate(("nodea", "nodeb")):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            place |= {"GROUP_RANK": str(rank), "MASTER_ADDR": "nodea", "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1"}
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **place, **environments.get(host, {})}
            command = [sys.executable, "-m", "mim", "doctor", "--cluster", *map(str, arguments)]
            processes.append(hosts.start(host, command, env=environment, cwd=ROOT))
        texts = [process.communicate(timeout=180) for process in processes]
        return [p.returncode for p in processes], [out for out, _ in texts], [err for _, err in texts]

    return run


@pytest.fixture(scope="module")
def data(shards, tmp_path_factory):
    """A copy of the dataset that a test may spoil for one host, and a recipe that reads it."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(shards, folder / "stripes")
    sections = {
        "data": {"path": str(folder / "stripes"), "image_size": 32, "view": {"name": "crop"}},
        "objective": {"name": "mae"},
        "optim": {"batch_size": 8, "length": "2 steps", "lr": 1e-3},
        "train": {"cpu": True, "run": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(config.to_yaml(sections))
    return folder


@pytest.fixture(scope="module")
def ill(hosts, told, data, tmp_path_factory):
    """What the check says of a node with other code, another lock, a run directory of its own and a stray version."""
    other = tmp_path_factory.mktemp("other")
    for part in ("mim", "tokenizer", "configs"):
        shutil.copytree(ROOT / part, other / part)
    (other / "mim" / "masking.py").open("a").write("\n# changed\n")
    shutil.copytree(data / "stripes", other / "stripes")
    (other / "stripes" / "train" / "dataset.lock.json").open("a").write("\n")
    (data / "run").mkdir()
    hosts.do("nodeb", "mount", "--bind", other / "stripes", data / "stripes")
    hosts.do("nodeb", "mount", "-t", "tmpfs", "tmpfs", data / "run")
    try:
        changed = {"PYTHONPATH": str(other)}
        codes, outs, _ = told(data / "recipe.yaml", "--processes", "2", "--json", nodeb=changed)
    finally:
        hosts.do("nodeb", "umount", data / "stripes")
        hosts.do("nodeb", "umount", data / "run")
        (data / "run").rmdir()
    return codes, json.loads(outs[0])


# ---- two hosts -----------------------------------------------------------------------------------


def test_two_hosts_that_agree_are_shown_in_a_table_and_nothing_is_left_behind(told, data):
    codes, (out, silent), errors = told(data / "recipe.yaml", "--processes", "2")
    assert codes == [0, 0], errors
    assert silent == ""
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:5] == ["0", "0", "nodea", "10.77.0.1", "cpu"]
    assert rows[2][:5] == ["1", "1", "nodeb", "10.77.0.2", "cpu"]
    assert "2 ranks agree, no problem found" in out
    assert not (data / "run").exists()


def test_a_node_that_differs_fails_the_check_on_every_rank(ill):
    codes, found = ill
    assert codes == [69, 69]
    assert [row["host"] for row in found["ranks"]] == ["nodea", "nodeb"]
    assert len(found["problems"]) == 3, found["problems"]


@pytest.mark.parametrize(
    "sentence",
    [
        "nodeb (rank 1) runs other code than nodea",
        "nodeb (rank 1) has another dataset lock in ",
        "is not the folder that rank 0 writes",
    ],
)
def test_what_differs_is_named_with_its_node(ill, sentence):
    assert [line for line in ill[1]["problems"] if sentence in line and "nodeb" in line]


@pytest.mark.slow
def test_a_network_that_carries_no_collective_ends_in_a_sentence(told):
    """An interface that is not there: the store is reached all the same, and tells."""
    codes, outs, _ = told("--seconds", "8", nodeb={"GLOO_SOCKET_IFNAME": "ib7"})
    assert codes == [69, 69]
    assert "the all-reduce over gloo failed" in outs[0]
    assert "GLOO_SOCKET_IFNAME" in outs[0]
    assert "failed" in outs[0].splitlines()[1]


@pytest.mark.slow
def test_a_cut_cable_ends_in_sentences_that_name_who_is_missing(hosts, told):
    hosts.do("nodeb", "ip", "link", "set", "plug1", "down")
    try:
        codes, _, errors = told("--seconds", "5")
    finally:
        hosts.do("nodeb", "ip", "link", "set", "plug1", "up")
    assert codes == [2, 2]
    assert "rank 1 of 2 did not come to nodea" in errors[0]
    assert "rank 1 on nodeb did not reach nodea" in errors[1]


# ---- a world that is too small -------------------------------------------------------------------


def test_processes_that_srun_started_without_a_launcher_are_refused():
    told = meeting.lonely({"SLURM_NTASKS": "8"})
    assert told is not None
    assert told.startswith("SLURM_NTASKS=8 processes were launched, but WORLD_SIZE is not set")


def test_nodes_that_each_made_a_world_of_their_own_are_refused():
    alone = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert "Slurm gave 4 nodes" in meeting.lonely({**alone, "SLURM_NNODES": "4", "SLURM_NTASKS": "4"})
    assert "this world has 8 processes instead of 32" in meeting.lonely(alone, 32)
    assert meeting.lonely(alone, 8) is None
    assert meeting.lonely({**alone, "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}) is None
    assert meeting.lonely({}) is None


def test_a_lonely_rank_is_refused_by_the_command(mim, monkeypatch):  # noqa: F811
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    code, out, err = mim("doctor", "--cluster")
    assert (code, out) == (2, "")
    assert err.startswith("mim: SLURM_NTASKS=2 processes were launched")


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"ranks 1-2 of 3 did not come to 127.0.0.1:0 within 1 s"):
        meeting.meet(0, 3, 1.0)


def test_a_rank_that_falls_silent_is_a_problem():
    store = dist.HashStore()
    store.set("row/0", json.dumps({"rank": 0}))
    rows, problems = meeting.collect(store, 3, 0.1)
    assert rows == [{"rank": 0}]
    assert problems[0].startswith("ranks 1-2 came and then said nothing")


# ---- one rank ------------------------------------------------------------------------------------


def cfg_of(data):
    return config.typed(Config, config.read(str(data / "recipe.yaml")))


def test_one_process_is_a_cluster_of_one(data, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    found = cluster.check(cfg_of(data), data / "run")
    assert found.problems == []
    assert [row["rank"] for row in found.rows] == [0]
    assert not dist.is_initialized()


def test_a_run_directory_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("in the way")
    lines = cluster.writable(dist.HashStore(), tmp_path / "file" / "run", 0, 1, 1.0)
    assert len(lines) == 1
    assert f"{tmp_path}/file/run cannot be written (Not a directory)" in lines[0]


def test_an_all_reduce_that_fails_or_hangs_is_a_problem(monkeypatch):
    speed, sentence, hangs = cluster.reduced(dist.HashStore(), 0, 2, 0.2, on_gpu=False)  # rank 1 never comes
    assert speed is None
    assert sentence.startswith("the all-reduce over gloo failed (not done after 0 s); let GLOO_SOCKET_IFNAME name")
    assert hangs
    for thread in threading.enumerate():
        if thread.name == "all-reduce":  # it would abort the end of this process
            thread.join(60)
            assert not thread.is_alive()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")  # no such interface
    speed, sentence, hangs = cluster.reduced(dist.HashStore(), 0, 1, 30.0, on_gpu=False)
    assert speed is None
    assert "ib7" in sentence
    assert not hangs


def test_more_processes_than_gpus_or_cpus_are_problems(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    gpus, cpus = cluster.crowded({"num_gpus": 4, "facts": {"cpus": 1}})
    assert gpus.startswith("8 processes share 4 GPUs")
    assert cpus.startswith("8 processes share 1 CPU;")
    assert cluster.crowded({"num_gpus": 8, "facts": {"cpus": 64}}) == []


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hosts_train_as_one_process_does(hosts, recipe, tmp_path):
    """The commands of docs/cluster.md: torchrun on each host, which meet on the first."""
    path = tmp_path / "recipe.yaml"
    sections = recipe() | {"train": {"cpu": True, "workers": 0, "log_every": "1 steps"}}
    path.write_text(config.to_yaml(sections))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    train = ["-m", "mim", "train", path]
    launched = []
    for host in ("nodea", "nodeb"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"nodea:{PORT}", "--rdzv_id", "two"]
        command = [*torchrun, *train, f"train.run={tmp_path / 'two'}"]
        launched.append(hosts.start(host, command, env=environment, cwd=ROOT))
    texts = [process.communicate(timeout=300) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], texts
    alone = [sys.executable, *map(str, train), f"train.run={tmp_path / 'one'}"]
    subprocess.run(alone, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=300)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-5)
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
