"""Start-up does what was asked for or refuses; the files of configs/accelerate are what accelerate reads."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch import nn

from mim import launching, optim
from mim.config import ConfigError
from mim.job import Config, Machine
from tests.test_train import dataset, lines, recipe, run, tensors  # noqa: F401  (dataset is a fixture)

ROOT = Path(__file__).parent.parent
FILES = {  # processes, machines, and whether parameters are sharded
    "cpu": (1, 1, False),
    "single_gpu": (1, 1, False),
    "ddp_8gpu": (8, 1, False),
    "fsdp2_8gpu": (8, 1, True),
    "multi_node_ddp": (16, 2, False),
    "multi_node_fsdp2": (16, 2, True),
}


def accelerator(*, num_processes=2, is_fsdp2=False):
    return SimpleNamespace(num_processes=num_processes, is_fsdp2=is_fsdp2)


def recipe_with(*, optimizer="adamw", **machine):
    return Config({}, {}, optim.Config(name=optimizer, lr=1e-3), train=Machine(cpu=True, **machine))


# ---- what the launcher was told ------------------------------------------------------------------


def test_fsdp_that_accelerate_would_leave_out_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=r"asks for FSDP, but this launch runs on CPUs.* set train.shard=true"):
        launching.launch(recipe_with())


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.micro_batches"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.activation_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "true", "train.activation_checkpointing"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision=bf16"),
    ],
)
def test_what_accelerates_configuration_asks_for_beside_the_recipe_is_refused(monkeypatch, name, value, key):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=key):
        launching.check_environment(Machine())


def test_one_precision_in_both_places_is_no_contradiction(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launching.check_environment(Machine(precision="bf16"))


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU; on a CPU use train.precision=bf16"):
        launching.launch(recipe_with(precision="fp16"))


@pytest.mark.parametrize(
    ("asked", "found", "sharded"),
    [
        (False, accelerator(), False),
        (True, accelerator(), True),
        (False, accelerator(is_fsdp2=True), True),
        (True, accelerator(num_processes=1), False),  # nobody to share with
    ],
)
def test_parameters_are_sharded_where_the_recipe_or_accelerate_says_so(asked, found, sharded):
    assert launching.is_sharded(found, Machine(shard=asked)) is sharded


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_an_optimizer_that_needs_whole_tensors_is_not_sharded(monkeypatch, name):
    monkeypatch.setattr(launching, "is_sharded", lambda *_: True)
    with pytest.raises(ConfigError, match=f"optim.name={name} needs whole tensors"):
        launching.launch(recipe_with(optimizer=name))


# ---- configs/accelerate --------------------------------------------------------------------------


def test_every_file_for_accelerate_is_known_here():
    assert {file.stem for file in (ROOT / "configs/accelerate").glob("*.yaml")} == FILES.keys()


@pytest.fixture(params=FILES)
def launched(request):
    """The arguments of the launch command in a file's first lines, completed by accelerate from the file."""
    file = ROOT / f"configs/accelerate/{request.param}.yaml"
    (line,) = [line for line in file.read_text().splitlines() if line.startswith("#     accelerate launch")]
    command = shlex.split(line[1:].replace("RANK", "1").replace("HOST", "localhost"))[2:]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return request.param, arguments


def test_a_launch_command_starts_the_processes_that_its_file_names(launched):
    name, arguments = launched
    processes, machines, sharded = FILES[name]
    assert arguments.config_file == f"configs/accelerate/{name}.yaml"
    assert load_config_from_file(arguments.config_file).num_processes == processes
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert arguments.machine_rank == (1 if machines > 1 else 0)
    assert bool(arguments.use_fsdp) is sharded
    assert bool(arguments.multi_gpu) is (processes > 1 and not sharded)


def test_a_launch_command_trains_a_recipe_that_exists(launched):
    _, arguments = launched
    assert arguments.training_script == "scripts/train.py"
    assert (ROOT / f"configs/{arguments.training_script_args[0]}.yaml").is_file()


def test_start_up_accepts_what_accelerate_tells_the_processes_of_a_file(launched, monkeypatch):
    name, arguments = launched
    several = FILES[name][0] > 1
    environment = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
    for key, value in environment.items():
        if key not in os.environ:
            monkeypatch.setenv(key, value)
    launching.check_environment(Machine())
    assert (environment.get("FSDP_VERSION") == "2") is FILES[name][2]


# ---- the same run, executed otherwise ------------------------------------------------------------


def test_a_run_with_recomputed_blocks_is_the_same_run_bit_for_bit(dataset, tmp_path, capsys):  # noqa: F811
    path = recipe(dataset, tmp_path)  # drops paths
    run(path, tmp_path / "plain")
    run(path, tmp_path / "recomputed", "train.activation_checkpointing=true", stop_at=3)
    assert "activations of 3 blocks recomputed" in capsys.readouterr().err
    run(path, tmp_path / "recomputed")
    assert lines(tmp_path / "recomputed") == lines(tmp_path / "plain")
    mine, theirs = tensors(tmp_path / "recomputed"), tensors(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(value) for name, value in theirs.items())


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_and_the_names_of_one_that_is_not(dataset, tmp_path, monkeypatch):  # noqa: F811
    """With code generation, which takes minutes on a CPU, and nothing that an earlier one left half written.

    The recipe drops paths: the same ones.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "plain")
    run(path, tmp_path / "compiled", "train.compile=true")
    losses, wanted = ([entry["loss"] for entry in lines(tmp_path / name)] for name in ("compiled", "plain"))
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert tensors(tmp_path / "compiled").keys() == tensors(tmp_path / "plain").keys()


@pytest.mark.parametrize(
    ("asked", "device", "missing", "told"),
    [
        (None, "cpu", None, []),
        (None, "cuda", None, ["3 blocks compiled"]),
        (None, "cuda", "triton", ["blocks not compiled, for lack of triton"]),
        (False, "cuda", None, []),
        (True, "cpu", None, ["3 blocks compiled"]),
        (True, "cuda", "triton", ["3 blocks compiled"]),  # then torch says what it lacks
    ],
)
def test_blocks_are_compiled_by_default_on_a_gpu_that_has_what_it_takes(monkeypatch, asked, device, missing, told):
    monkeypatch.setattr(launching, "lacking", lambda _: missing)
    monkeypatch.setattr(launching, "compile_each", lambda _: 3)
    assert launching.compiled(nn.Linear(1, 1), asked, torch.device(device)) == told


@pytest.fixture
def another_precision():
    """A process has one precision for good, unless accelerate is told to forget it."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_bf16_trains_in_autocast_and_keeps_float32_weights(dataset, tmp_path, capsys, another_precision):  # noqa: F811
    path = recipe(dataset, tmp_path, encoder__drop_path_rate=0.0)
    run(path, tmp_path / "bf16", "train.precision=bf16")
    assert "matmul in bfloat16" in capsys.readouterr().err
    AcceleratorState._reset_state()
    run(path, tmp_path / "plain")
    losses, wanted = ([entry["loss"] for entry in lines(tmp_path / name)] for name in ("bf16", "plain"))
    assert losses == pytest.approx(wanted, rel=0.02)
    assert losses != wanted
    assert all(value.dtype.itemsize >= 4 for value in tensors(tmp_path / "bf16").values())
