"""The plan over hardware: hours from operations, what the command line keeps, and real steps beside predictions."""

import json

import pytest

from mim import plan
from mim.config import ConfigError
from mim.plan import Wish
from mim.planning import devices
from mim.watch import stopping


@pytest.fixture
def planned(write, capsys):
    """`planned(wish, *overrides, section__key=value)`: the plan as programs read it."""

    def run(wish, *overrides, objective="mae", **changes):
        assert (
            plan.main(
                write(objective, **{"train__save_every": "10 steps"} | changes), list(overrides), wish, as_json=True
            )
            == stopping.DONE
        )
        return json.loads(capsys.readouterr().out)

    return run


def test_hours_follow_from_operations_rates_and_the_bytes_of_the_update(planned):
    found = planned(Wish(gpu="h100", gpus=2, mfu=0.4), "train.micro_batches=2", optim__length="3600 steps")
    load, speed = found["memory"], found["speed"]
    gradient = 8 / 2 * load["flops"] / (0.4 * 989e12)  # a step is 8 images on 2 devices, however it is split
    assert speed["seconds_per_step"] == pytest.approx(gradient + load["traffic"] / 3350e9)
    assert found["hours"] == pytest.approx(speed["seconds_per_step"])
    assert found["device_hours"] == pytest.approx(2 * found["hours"])
    assert speed["images_per_s"] == pytest.approx(8 / speed["seconds_per_step"])
    assert found["energy"]["kwh"] == pytest.approx(found["device_hours"] * 0.7 * plan.POWER_SHARE)


def test_an_assumed_share_of_the_peak_says_so(planned):
    assert "assumed for mae on an encoder of width 32" in planned(Wish(gpu="h100"))["speed"]["mfu_source"]
    assert planned(Wish(gpu="h100", mfu=0.5))["speed"]["mfu_source"] == "given"


@pytest.mark.parametrize(("gpu", "precision"), [("h100", "bf16"), ("t4", "fp16")])
def test_the_precision_that_a_gpu_is_fast_in_is_proposed(planned, gpu, precision):
    assert planned(Wish(gpu=gpu))["way"]["precision"] == precision


def test_what_the_command_line_sets_stays_and_what_the_recipe_sets_is_proposed_anew(planned):
    found = planned(Wish(gpu="h100"), "train.precision=no", "optim.batch_size=16", train__micro_batches=4)
    assert (found["way"]["precision"], found["way"]["micro_batches"]) == ("no", 1)
    assert found["recipes_own"]["micro_batches"] == 4
    assert planned(Wish(gpu="h100"), "train.micro_batches=4")["way"]["rows"] == 2
    assert found["start"].endswith("mae.yaml optim.batch_size=16 train.precision=no train.micro_batches=1")


def test_a_precision_that_a_gpu_lacks_is_refused(write):
    with pytest.raises(ConfigError, match=r"train\.precision=bf16, which v100 does not have; choose fp16 or no"):
        plan.main(write(), ["train.precision=bf16"], Wish(gpu="v100"))


def test_checkpoints_are_counted_as_retention_keeps_them(planned):
    found = planned(Wish(gpu="h100"), optim__length="95 steps", train__keep=3, train__keep_every="20 steps")
    disk = found["checkpoints"]
    state = found["memory"]["state"]
    assert disk["one"] == state["weights"] + state["optimizer"]
    assert (disk["written"], disk["kept"]) == (10, 7)  # 75 to 95 by 10 are the newest; 20, 40, 60, 80 stay besides
    assert disk["most_bytes"] == disk["kept_bytes"] + disk["one"]
    assert disk["written_bytes"] == 10 * disk["one"]


def test_a_checkpoint_is_as_large_whichever_number_of_devices_shares_it(planned):
    one, shared = planned(Wish(gpu="h100")), planned(Wish(gpu="h100", gpus=8), "train.shard=true")
    assert shared["memory"]["state"]["optimizer"] < one["memory"]["state"]["optimizer"] / 7
    assert shared["checkpoints"]["one"] == pytest.approx(one["checkpoints"]["one"], rel=1e-3)


def test_the_loader_needs_cores_for_the_images_of_a_device(planned):
    speed = planned(Wish(gpu="h100", gpus=2, per_core=500.0))["speed"]
    assert speed["loader"]["cores"] == pytest.approx(speed["images_per_s"] / 2 / 500)


def test_epochs_without_data_need_the_number_of_images(write, planned):
    changes = {"data__path": "/nowhere", "optim__length": "10 epochs"}
    with pytest.raises(ConfigError, match=r"data\.path=/nowhere is not there, and optim\.length='10 epochs'"):
        plan.main(write(**changes), [], Wish(gpu="h100"))
    assert planned(Wish(gpu="h100", images=800), **changes)["length"]["steps"] == 1000


def test_a_device_of_unknown_speed_is_measured_or_refused(write):
    with pytest.raises(ConfigError, match=r"nobody has told what cpu reaches.*--measure"):
        plan.main(write(), [], Wish())
    with pytest.raises(ConfigError, match=r"--measure takes its steps on what this machine has"):
        plan.main(write(), [], Wish(gpu="h100", measure=True))


@pytest.mark.parametrize("objective", ["mae", "beit", "tokenize"])
def test_real_steps_calibrate_the_plan(planned, objective, monkeypatch):
    monkeypatch.setattr("mim.rehearsal.SIDE", {"cpu": 64})
    found = planned(Wish(measure=True, per_core=1.0), objective=objective, optim__ema=0.9)
    measured, speed = found["measured"], found["speed"]
    assert (measured["steps"], measured["rows"], measured["device"]) == (20, 8, "cpu")
    assert speed["seconds_per_step"] == pytest.approx(measured["gradient"] + measured["update"])
    assert measured["mfu"] == pytest.approx(
        8 * found["memory"]["flops"] / (measured["gradient"] * measured["peak_flops"])
    )
    assert measured["predicted_held"] == found["memory"]["total"]
    assert found["device"]["name"] == devices.CPU
    assert found["energy"] is None


def test_the_text_tells_what_the_numbers_rest_on(write, capsys):
    plan.main(write(), ["train.shard=true"], Wish(gpu="a100", gpus=8))
    said = capsys.readouterr().out
    for words in (
        "mae: mae on 8 x a100 (80 GiB, 312 TFLOP/s in bf16; NVIDIA data sheet A100 80GB, SXM, 2021)",
        "proposed: train.precision=bf16 train.micro_batches=1 train.shard=true (FSDP2, batch 8 in micro-batches of 1)",
        "  the recipe alone: train.precision=no",
        "a tenth and 1 GiB stay free",
        "not measured",
        "8 x 400 W x 0.8 (assumed)",
        "images/s per core\n  assumed: ImageNet JPEGs",
        "start: torchrun --nproc_per_node 8 -m mim train",
    ):
        assert words in said
