"""The dry run: what a recipe comes to, with its data and tokenizer at hand or without, and nothing written."""

import json

import pytest

from mim import config, dry_run, job, optim
from mim.config import ConfigError
from mim.data import shards as datasets
from mim.watch import stopping


@pytest.fixture
def planned(write, capsys):
    """`planned(objective, images=..., section__key=value)`: the plan as programs read it."""

    def run(objective="mae", images=None, **changes):
        assert dry_run.main(write(objective, **changes), [], images=images, as_json=True) == stopping.DONE
        return json.loads(capsys.readouterr().out)

    return run


def test_with_the_data_at_hand_the_start_lines_come_first_and_nothing_is_written(write, shards, tmp_path, capsys):
    path = write(train__run=str(tmp_path / "run"))
    assert dry_run.main(path, []) == stopping.DONE
    said = capsys.readouterr()
    num_images = len(datasets.Dataset.open(shards / "train"))
    assert f"{num_images} images in" in said.err
    assert "order: a full permutation" in said.err
    assert f"epochs of {num_images} images = 2 steps" in said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mae.yaml"]


def test_bytes_of_an_epoch_are_those_of_the_shards(planned, shards):
    assert planned()["bytes_per_epoch"] == datasets.inspect(shards / "train")["num_bytes"]
    assert planned(data__repeats=2)["bytes_per_epoch"] == round(datasets.inspect(shards / "train")["num_bytes"] / 2)


def test_a_number_of_images_stands_for_data_that_is_not_there(planned):
    found = planned(
        images=1000,
        data__path="/nowhere",
        optim__length="10 epochs",
        optim__warmup="1 epochs",
        train__save_every="2 epochs",
    )
    assert (found["images"], found["bytes_per_epoch"]) == (1000, None)
    assert found["length"] == {"steps": 1250, "images": 10_000, "epochs": 10.0, "steps_per_epoch": 125.0}
    assert (found["warmup_steps"], found["every"]["save"]) == (125, 250)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim__length": "10 epochs"}, "optim.length='10 epochs'"),
        ({"train__log_every": "1 epochs", "train__save_every": "9 steps"}, "train.log_every='1 epochs'"),
        ({"train__save_every": "9 steps", "evals": {"knn": {"every": "2 epochs"}}}, "evals.knn.every='2 epochs'"),
    ],
)
def test_epochs_of_data_that_is_not_there_are_refused_with_the_remedy(write, changes, key):
    with pytest.raises(ConfigError) as error:
        dry_run.main(write(data__path="/nowhere", **changes), [])
    assert f"data.path=/nowhere is not there, and {key} counts its epochs" in str(error.value)
    assert "--images 1281167" in str(error.value)


def test_steps_need_neither_data_nor_its_size(planned):
    found = planned(data__path="/nowhere", train__save_every="1 steps")
    assert found["length"] == {"steps": 2, "images": 16, "epochs": None, "steps_per_epoch": None}


def test_a_tokenizer_that_is_not_trained_yet_is_planned_from_its_recipe(write, capsys):
    section = {"recipe": "dvae_small_cifar10", "path": "runs/none"}
    path = write("beit", tokenizer=section, objective__num_codes=512, encoder__patch_size=4)
    dry_run.main(path, [], as_json=True)
    said = capsys.readouterr()
    assert "no trained tokenizer yet: planned from its recipe dvae_small_cifar10" in said.err
    found = json.loads(said.out)
    assert found["parts"]["tokenizer"]["forward"] > 0
    assert found["memory"]["frozen"] > 0


def test_a_teacher_that_is_not_trained_yet_is_planned_from_its_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever runs/ holds here
    assert dry_run.main("vqkd_mae_cifar10", [], images=1000, as_json=True) == stopping.DONE
    said = capsys.readouterr()
    assert "no trained teacher yet: planned from its recipe mae_vittiny_cifar10" in said.err
    parts = json.loads(said.out)["parts"]
    assert parts["teacher"]["forward"] > 0
    assert (parts["teacher"]["trained"], parts["teacher"]["backward"]) == (0, 0)


def test_the_weights_of_a_timm_teacher_are_not_fetched_for_a_plan(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = ["teacher.model=resnet10t", "data.image_size=32", "encoder.patch_size=8", "encoder.depth=1"]
    assert dry_run.main("classify_deits16_in1k", [*small, "train.cpu=true"], images=1000, as_json=True) == stopping.DONE
    said = capsys.readouterr()
    assert "no trained teacher yet: planned from its timm model resnet10t" in said.err
    assert json.loads(said.out)["parts"]["teacher"]["forward"] > 0


def test_a_frozen_network_without_path_and_recipe_is_refused():
    with pytest.raises(ConfigError, match=r"teacher\.path is missing"):
        dry_run.main("vqkd_mae_cifar10", ["teacher.path=null", "teacher.recipe=null"], images=1000)


def test_a_trained_tokenizer_is_the_one_that_is_planned(planned, saved_tokenizer):
    described = json.loads((saved_tokenizer / "tokenizer.json").read_text())
    assert described["config"]["num_codes"] == 16
    assert planned("beit")["parts"]["tokenizer"]["parameters"] < 100_000  # the recipe that it names has more


def test_rates_are_those_of_the_loop(planned, write):
    found = planned(
        optim__length="100 steps", optim__warmup="10 steps", optim__min_lr=1e-5, optim__weight_decay_end=0.2
    )
    rates = optim.resolve(config.typed(job.Config, config.read(write())).optim, 1)
    named = {name: (value["step"], value["lr"]) for name, value in found["lr"].items()}
    assert named["start"] == (0, pytest.approx(1e-4))
    assert named["end of warm-up"] == (10, pytest.approx(rates.lr))
    assert named["half"] == (50, pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5791, rel=1e-3))  # (1 + cos(pi * 40 / 89)) / 2
    assert named["end"] == (99, pytest.approx(1e-5))
    assert found["weight_decay"] == pytest.approx([0.05, 0.2])
    assert found["lr_curve"][0] == named["start"][1]
    assert found["lr_curve"][-1] == named["end"][1]


def test_layer_decay_tells_the_range_of_the_rates(planned):
    assert planned(optim__layer_decay=0.5)["lr_scale"] == [0.125, 1.0]  # stem, two blocks, head
    assert planned()["lr_scale"] == [1.0, 1.0]


def test_the_batch_is_resolved_into_micro_batches(planned, monkeypatch):
    found = planned(train__micro_batches=3)
    assert found["batch"] == {"size": 8, "ranks": 1, "micro_batches": 3, "rows": 3}
    assert found["flops"] == pytest.approx(16 * found["flops_per_image"])


def test_the_plot_rises_to_the_peak_and_falls(planned):
    found = planned(optim__length="100 steps", optim__warmup="50 steps")
    drawn = list(dry_run.rate_lines(found))[: dry_run.ROWS]
    heights = [
        sum(line[12:].ljust(dry_run.COLUMNS)[column] == "█" for line in drawn) for column in range(dry_run.COLUMNS)
    ]
    assert heights.index(max(heights)) in range(27, 31)
    assert heights[: heights.index(max(heights))] == sorted(heights[: heights.index(max(heights))])
    assert drawn[0].lstrip().startswith("0.001 |")
    assert heights[-1] == 0


def test_a_device_that_is_too_small_needs_more_micro_batches(planned):
    found = planned(images=64, optim__batch_size=65536, encoder__width=768, encoder__depth=12, encoder__num_heads=12)
    fits = found["fits"]
    assert 1 < fits["24"] < fits["16"] <= 65536
    assert found["memory"]["total"] > 24 * 2**30


def test_the_text_tells_what_the_numbers_are(write, capsys):
    dry_run.main(write(optim__ema=0.99, optim__clip_grad=3.0, optim__name="lion"), [])
    said = capsys.readouterr().out
    for words in (
        "mae: mae on vit\n",
        "16 patches, 8 masked, 8 visible, 9 in the encoder, 17 in the decoder / head",
        "batch 8 = 1 rank x 1 micro-batch of 8",
        "lion betas [0.9, 0.99], average of the weights 0.99, gradient clipped at norm 3",
        "every: log 50 steps (1 times), save ",
        "train.micro_batches that fit about: 16 GiB with 1, ",
    ):
        assert words in said


def test_no_precision_needs_no_quotes(write, capsys):
    """YAML makes False of a bare no."""
    assert dry_run.main(write(), ["train.precision=no"], as_json=True) == stopping.DONE
    assert json.loads(capsys.readouterr().out)["memory"]["precision"] == "no"


def test_a_precision_that_is_unknown_is_refused(write):
    with pytest.raises(ConfigError, match=r"train\.precision='half' is unknown; choose no, bf16 or fp16"):
        dry_run.main(write(), ["train.precision=half"])
