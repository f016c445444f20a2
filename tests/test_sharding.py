"""Sharded over two gloo processes, everything is what it is whole: gradients, evaluations, checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenizer as tokenizers
from mim import build, optim
from mim.saving import checkpoint
from tests import sharded
from tests.test_distributed import torchrun
from tests.test_train import dataset, lines, recipe, run  # noqa: F401  (dataset is a fixture)

ROOT = Path(__file__).parent.parent


def on_two(*arguments: object) -> None:
    """Run tests/sharded.py on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "tests/sharded.py", *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two ranks found out about every objective and encoder."""
    out = tmp_path_factory.mktemp("objectives")
    on_two("objectives", out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(params=[" ".join(case) for case in sharded.CASES])
def case(request, found) -> list[dict]:
    return [of_rank[request.param] for of_rank in found]


def test_gradients_of_shards_are_those_of_the_whole(case):
    assert max(of_rank["gradient"] for of_rank in case) < 1e-5


def test_each_rank_holds_about_half_of_a_parameter(case):
    assert max(of_rank["share"] for of_rank in case) < 0.7


def test_a_twin_computes_what_the_whole_does_on_each_rank_as_often_as_it_likes(case):
    assert all(of_rank["twin"] for of_rank in case)


def test_what_a_twin_is_changed_to_goes_back_into_the_shards(case):
    assert all(of_rank["put_back"] for of_rank in case)


def test_a_twin_that_is_emptied_holds_no_parameters(case):
    assert all(of_rank["emptied"] for of_rank in case)


@pytest.mark.parametrize("optimizer", optim.ELEMENTWISE)
def test_an_optimizer_moves_shards_as_it_does_wholes_and_skips_what_is_not_finite(case, optimizer):
    assert all(of_rank[optimizer] for of_rank in case)


def test_a_run_goes_from_ddp_to_fsdp_to_one_process_and_back(dataset, tmp_path):  # noqa: F811
    """Bit for bit what was saved at each resume, and then the losses of a run on one process."""
    changes = {"encoder__drop_path_rate": 0.0, "train__log_every": "1 steps", "data__val_path": str(dataset)}
    path = recipe(dataset, tmp_path, **changes)
    run(path, tmp_path / "one", *sharded.EVALS)
    on_two("chain", tmp_path, path, "ddp:2", "fsdp:4")
    assert json.loads((tmp_path / "restored.json").read_text()) == [[]]
    of_shards = build.load_run(tmp_path / "run")  # one process reads what two have written
    assert of_shards.step == 4
    sharded.chain(tmp_path, path, "one:5")
    assert json.loads((tmp_path / "restored.json").read_text()) == [[]]
    on_two("chain", tmp_path, path, "ddp:6", "fsdp:7")
    assert json.loads((tmp_path / "restored.json").read_text()) == [[], []]
    logged, wanted = lines(tmp_path / "run"), lines(tmp_path / "one")
    assert [(entry["event"], entry["step"]) for entry in logged] == [(e["event"], e["step"]) for e in wanted]
    for name in ("loss", "grad_norm", "knn"):
        values = [entry[name] for entry in logged if name in entry]
        assert len(values) == (4 if name == "knn" else 7)
        assert values == pytest.approx([entry[name] for entry in wanted if name in entry], abs=1e-5), name


def test_a_sharded_tokenizer_starts_its_codebook_and_is_written_whole(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path, "vqkd")
    run(path, tmp_path / "one")
    launched = torchrun(path, tmp_path / "two", "train.shard=true", "train.micro_batches=2")
    assert launched.returncode == 0, launched.stderr
    assert "sharded over 2 ranks (FSDP2)" in launched.stderr
    assert [e["loss"] for e in lines(tmp_path / "two")] == pytest.approx(
        [e["loss"] for e in lines(tmp_path / "one")], abs=1e-5
    )
    one, two = (tokenizers.load(checkpoint.newest(tmp_path / name)) for name in ("one", "two"))
    for name, value in one.state_dict().items():
        assert two.state_dict()[name].allclose(value, atol=1e-5), name
