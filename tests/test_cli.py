"""The command line: one sentence and the right exit code for every mistake, and help that tells by example."""

import json
import shlex
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest
from PIL import Image
from torch._utils import ExceptionWrapper

import tokenizer as tokenizers
from benchmarks.shapes import write_shapes
from mim import __main__, __version__, config
from mim.contracts import DataError, StorageError
from mim.data.shards import Dataset
from tests import damage
from tokenizer import vqkd


@pytest.fixture
def mim(monkeypatch, capsys):
    """`mim(*arguments)` runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mim", *map(str, arguments)])
        try:
            __main__.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(mim):
    """`refused(*arguments)` runs a command that must fail as a wrong command does; returns its one sentence."""

    def run(*arguments, code=2):
        found, out, err = mim(*arguments)
        assert found == code, err
        assert out == ""
        assert err.startswith("mim: ")
        assert len(err.splitlines()) == 1, err
        return err.removeprefix("mim: ").rstrip()

    return run


@pytest.fixture
def tiny(recipe, tmp_path):
    """`tiny(objective)`: the path of a tiny recipe."""

    def write(objective="mae"):
        path = tmp_path / f"{objective}.yaml"
        path.write_text(config.to_yaml(recipe(objective) | {"train": {"cpu": True, "workers": 0}}))
        return path

    return write


def commands(group=__main__.cli, name="mim"):
    """Every command and group with its full name."""
    yield name, group
    if isinstance(group, click.Group):
        for child, command in group.commands.items():
            yield from commands(command, f"{name} {child}")


COMMANDS = dict(commands())
EXAMPLES = [
    line.strip()
    for command in COMMANDS.values()
    for line in (command.help or "").splitlines()
    if line.strip().startswith(("mim ", "accelerate launch ", "torchrun "))
]

# ---- help ----------------------------------------------------------------------------------------


def test_help_answers_without_importing_anything_heavy():
    program = (
        "import sys\n"
        "sys.argv = ['mim', '--help']\n"
        "from mim.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'timm', 'numpy', 'PIL', 'omegaconf', 'accelerate', 'webdataset'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: mim" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_what_it_does_with_an_example(mim, name):
    code, out, _ = mim(*name.split()[1:], "--help")
    assert code == 0
    assert "Example" in out
    assert f"\n    {name} " in out


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_commands_that_parse(example):
    arguments = shlex.split(example.partition("mim ")[2])
    command, context = __main__.cli, click.Context(__main__.cli, info_name="mim")
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
    command.make_context(name, list(arguments), parent=context)


def test_the_version_is_told(mim):
    code, out, _ = mim("--version")
    assert code == 0
    assert __version__ in out


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["shards", "make", "x"], ["demo", "--seed", "few"], ["-x"]]
)
def test_a_wrong_command_ends_with_two(mim, arguments):
    code, _, err = mim(*arguments)
    assert code == 2
    assert "Error: " in err
    assert "Traceback" not in err


# ---- making shards -------------------------------------------------------------------------------


def test_a_folder_that_is_missing_is_refused(refused, tmp_path):
    message = refused("shards", "make", tmp_path / "nowhere", tmp_path / "out")
    assert message == f"{tmp_path / 'nowhere'} is not a folder; give the folder that holds the images"


def test_a_folder_without_images_is_refused_with_the_endings_that_were_found(refused, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.csv", "README"):
        (folder / name).write_text("no image")
    message = refused("shards", "make", folder, tmp_path / "out")
    assert "holds no images" in message
    assert "found: .txt (2), " in message
    assert ".csv (1)" in message
    assert "(none) (1)" in message


def folder_with_bad_images(tmp_path, num_bad):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((9, 9, 3), 50 * i, dtype=np.uint8)).save(folder / f"good{i}.png")
    for i in range(num_bad):
        (folder / f"bad{i}.jpg").write_bytes(b"this is no JPEG")
    return folder


def test_an_unreadable_image_is_named_counted_and_left_out(mim, tmp_path):
    folder = folder_with_bad_images(tmp_path, 2)
    code, out, _ = mim("shards", "make", folder, tmp_path / "out", "--workers", "1")
    assert code == 0
    assert f"4 images in {tmp_path / 'out'}" in out
    assert "left out bad0.jpg: " in out
    assert "left out bad1.jpg: " in out
    report = json.loads(mim("shards", "inspect", tmp_path / "out", "--json")[1])
    assert (report["num_samples"], report["num_left_out"]) == (4, 2)


def test_masks_become_label_maps_that_can_be_indexed_again(mim, tmp_path):
    write_shapes(tmp_path, count=3, size=(20, 24))
    masks = ["--masks", tmp_path / "masks", "--classes", tmp_path / "classes.txt", "--workers", "1"]
    assert mim("shards", "make", tmp_path / "images", tmp_path / "out", *masks)[0] == 0
    options = ["--label-maps", "seg.png", "--classes", "5", "--workers", "1"]
    assert mim("shards", "index", tmp_path / "out/shard-00000.tar", tmp_path / "again", *options)[0] == 0
    made, again = (json.loads(mim("shards", "inspect", tmp_path / name, "--json")[1]) for name in ("out", "again"))
    assert list(made["pixel_classes"]) == ["background", "circle", "square", "triangle", "stripes"]
    assert list(again["pixel_classes"].values()) == list(made["pixel_classes"].values())
    assert sum(made["pixel_classes"].values()) == pytest.approx(1)


def test_more_unreadable_images_than_accepted_end_with_65(refused, tmp_path):
    folder = folder_with_bad_images(tmp_path, 2)
    options = ["--workers", "1", "--max-left-out", "1"]
    message = refused("shards", "make", folder, tmp_path / "out", *options, code=65)
    assert "more than 1 images cannot be decoded" in message
    assert "bad0.jpg: " in message
    assert not (tmp_path / "out" / "dataset.lock.json").exists()


def test_a_report_can_be_read_by_programs(mim, tmp_path):
    folder = folder_with_bad_images(tmp_path, 1)
    code, out, _ = mim("shards", "make", folder, tmp_path / "out", "--workers", "1", "--json")
    assert code == 0
    assert json.loads(out)["num_samples"] == 4
    assert json.loads(out)["left_out"][0]["file"] == "bad0.jpg"


def test_a_clean_data_set_is_verified_with_0_and_a_damaged_one_with_65(mim, shards, tmp_path):
    folder = shutil.copytree(shards / "val", tmp_path / "copy")
    code, out, _ = mim("shards", "verify", folder, "--decode", "--workers", "1")
    assert code == 0
    assert out.splitlines()[-1] == "clean"
    shard = sorted(folder.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-3000])
    code, out, err = mim("shards", "verify", folder, "--workers", "1", "--json")
    assert (code, err) == (65, "")
    assert json.loads(out)["findings"][0]["shard"] == shard.name


def test_tars_are_indexed_and_parts_joined(mim, shards, tmp_path):
    for part in ("1/2", "2/2"):
        arguments = (shards / "train", tmp_path / "out", "--labels", "cls", "--part", part, "--workers", "1")
        assert mim("shards", "index", *arguments)[0] == 0
    code, out, _ = mim("shards", "join", tmp_path / "out", "--json")
    assert code == 0
    assert (
        json.loads(out)["num_samples"]
        == json.loads(mim("shards", "inspect", shards / "train", "--json")[1])["num_samples"]
    )


def test_parts_of_verify_are_joined_with_its_exit_code(mim, shards, tmp_path):
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    for part in ("1/2", "2/2"):
        assert mim("shards", "verify", folder, "--part", part, "--workers", "1")[0] == 0
    assert mim("shards", "join", folder)[0] == 0
    shard = sorted(folder.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-3000])
    codes = [mim("shards", "verify", folder, "--part", part, "--workers", "1")[0] for part in ("1/2", "2/2")]
    assert codes == [65, 0]
    code, out, err = mim("shards", "join", folder, "--json")
    assert (code, err) == (65, "")
    assert json.loads(out)["verified"][0]["findings"][0]["shard"] == shard.name


def test_a_data_set_is_copied_into_another_number_of_shards(mim, shards, tmp_path):
    code, out, _ = mim(
        "shards", "reshard", shards / "val", tmp_path / "out", "--shards", "3", "--workers", "1", "--json"
    )
    assert code == 0
    assert json.loads(out)["num_shards"] == 3


def test_a_contact_sheet_is_written_where_asked(mim, shards, tmp_path):
    code, out, _ = mim("shards", "inspect", shards / "val", "--sheet", tmp_path / "sheet.png", "--json")
    assert code == 0
    assert json.loads(out)["sheet"] == str(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] == 8 * (128 + 4) + 4


def test_an_option_of_the_shard_tools_that_means_nothing_is_refused(refused, shards, tmp_path):
    assert refused("shards", "verify", shards / "val", "--part", "3/2").startswith("--part 3/2 is no part; write i/n")
    assert refused("shards", "make", tmp_path, tmp_path / "out", "--resize", "long=9").startswith("--resize long=9 is")


@pytest.mark.parametrize("command", ["make", "index", "verify", "reshard"])
def test_a_tool_needs_at_least_one_process(mim, shards, tmp_path, command):
    out = [] if command == "verify" else [tmp_path / "out"]
    code, _, err = mim("shards", command, shards / "val", *out, "--workers", "0")
    assert code == 2
    assert "0 is not in the range x>=1" in err


def test_what_is_no_data_set_is_refused_with_the_remedy(refused, tmp_path):
    assert refused("shards", "inspect", tmp_path).endswith("make one: mim shards make FOLDER OUT")


def test_a_data_set_is_inspected(mim, shards):
    code, out, _ = mim("shards", "inspect", shards / "train")
    assert code == 0
    assert "num_samples" in out
    assert '"columns"' in out


# ---- training ------------------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused_with_the_closest(refused):
    assert refused("train", "mae_vittiny_cifar").endswith("did you mean 'mae_vittiny_cifar10'?")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("optm.lr=1", "optm is not a known key; did you mean 'optim'?"),
        ("optim.batchsize=8", "optim.batchsize is not a known key; did you mean 'batch_size'?"),
        ("encoder.widht=32", "encoder.widht is not a known key; did you mean 'width'?"),
        ("objective.decoder_widht=32", "objective.decoder_widht is not a known key; did you mean 'decoder_width'?"),
        ("mask.ratoi=0.5", "mask.ratoi is not a known key; did you mean 'ratio'?"),
        ("data.view.scal=1", "data.view.scal is not a known key; did you mean 'scale'?"),
        ("data.imagesize=32", "data.imagesize is not a known key; did you mean 'image_size'?"),
        ("optim.batch_size=many", "optim.batch_size: Value 'many'"),
        ("encoder.width=wide", "encoder.width: Value 'wide'"),
        ("optim=fast", "optim='fast' must be a section"),
        ("train.precision=bf8", "train.precision='bf8' is unknown; choose no, bf16 or fp16"),
        ("train.micro_batches=0", "train.micro_batches=0 must be at least 1"),
        ("objective.name=mea", "objective.name='mea' is unknown; did you mean 'mae'?"),
        ("encoder.name=resnet", "encoder.name='resnet' is unknown; choose one of "),
        ("mask.name=blok", "mask.name='blok' is unknown; did you mean 'block'?"),
        ("data.view.name=crp", "data.view.name='crp' is unknown; did you mean 'crop'?"),
        ("mask.ratio=1.5", "mask.ratio=1.5 must lie between 0 and 1"),
        ("mask=null", "objective.name=mae needs a mask"),
        ("encoder.patch_size=7", "image"),
        (
            "encoder.width=33",
            "encoder.model='vit_tiny_patch16_224' cannot be built for images of 32x32 and encoder.width=33",
        ),
        ("optim.warmup='3 epochs'", "optim.warmup='3 epochs' is"),
        ("optim.length=soon", "optim.length='soon' is not a duration"),
        ("optim.base_lr=1", "optim.lr=0.001 and optim.base_lr=1.0: give exactly one"),
        ("data.lanes=1000", "data.lanes=1000 must lie between 1 and the"),
        ("data.image_size=[32]", "data.image_size=[32] must be one number of pixels or [height, width]"),
        ("data.path=/nowhere", "data.path=/nowhere is not there, and train.save_every='1 epochs' counts its epochs"),
        ("lr", "'lr' is not an override; write section.key=value"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(refused, tiny, tmp_path, override, start):
    message = refused("train", tiny(), override, f"train.run={tmp_path / 'run'}", "--dry-run")
    assert message.startswith(start)
    assert not (tmp_path / "run").exists()


def test_a_batch_smaller_than_ranks_times_micro_batches_is_refused_with_both_numbers(refused, tiny, tmp_path):
    options = ["optim.batch_size=2", "train.micro_batches=3", f"train.run={tmp_path / 'run'}"]
    assert refused("train", tiny(), *options) == (
        "optim.batch_size=2 is smaller than 1 processes x 3 micro-batches; use at least 3"
    )


def test_an_evaluation_that_does_not_exist_is_refused_before_the_first_step(refused, tiny, tmp_path):
    message = refused("train", tiny(), "evals.kn={every: 1 steps}", f"train.run={tmp_path / 'run'}", "--dry-run")
    assert "'kn' is unknown; did you mean 'knn'?" in message


def test_a_tokenizer_that_is_not_trained_yet_is_refused_with_the_command(refused, tiny, tmp_path):
    message = refused("train", tiny("beit"), f"tokenizer.path={tmp_path / 'none'}", f"train.run={tmp_path / 'run'}")
    assert message.endswith(f"train one first, e.g. `mim train dvae train.run={tmp_path / 'none'}`")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("tokenizer=null", "objective.name=beit needs a tokenizer; add tokenizer: {recipe: NAME, path: RUN}"),
        ("tokenizer.paht=x", "tokenizer.paht is not a known key; known here: recipe, path, image_size"),
        (
            "tokenizer.image_size=48",
            "tokenizer.image_size=48 gives a grid of 6x6 codes, but the encoder has 4x4",
        ),
        ("mask=null", "objective.name=beit needs a mask"),
    ],
)
def test_a_mistake_about_the_tokenizer_is_one_sentence(refused, tiny, tmp_path, override, start):
    message = refused("train", tiny("beit"), override, f"train.run={tmp_path / 'run'}", "--dry-run")
    assert message.startswith(start)


def test_what_a_plan_can_do_without_a_training_cannot(refused, tiny, tmp_path):
    run = f"train.run={tmp_path / 'run'}"
    assert refused("train", tiny(), "data.path=/nowhere", run).startswith("/nowhere is not a folder")
    message = refused("train", tiny("beit"), "tokenizer.path=null", run)
    assert message.startswith("tokenizer.path is missing: the run of a trained tokenizer")


def test_codes_that_do_not_fit_the_tokenizer_are_refused_with_both_numbers(refused, tiny, tmp_path):
    message = refused("train", tiny("beit"), "objective.num_codes=99", f"train.run={tmp_path / 'run'}")
    assert message == "objective.num_codes=99, but the tokenizer has 16 codes; set objective.num_codes=16"


def test_a_dry_run_checks_everything_and_writes_nothing(mim, tiny, tmp_path):
    code, _, err = mim("train", tiny(), f"train.run={tmp_path / 'run'}", "--dry-run")
    assert code == 0
    assert "1 epoch = " in err
    assert not (tmp_path / "run").exists()


# ---- a run, from training to export --------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A run of two steps, made by the program itself in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = {
        "data": {"path": str(shards), "image_size": 32},
        "mask": {"name": "random"},
        "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 32, "depth": 1, "num_heads": 2,
                    "patch_size": 8},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "optim": {"batch_size": 8, "length": "2 steps", "warmup": "1 steps", "lr": 1e-3},
        "train": {"cpu": True, "workers": 0, "run": str(folder / "run")},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(config.to_yaml(recipe))
    command = [sys.executable, "-m", "mim", "train", str(folder / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "done"
    return folder / "run"


def test_a_run_is_evaluated_by_name_with_options(mim, trained):
    code, out, _ = mim("eval", "knn", trained, "k=3", "pool=class")
    assert code == 0
    found = json.loads(out)
    assert found["eval"] == "knn"
    assert found["step"] == 2
    assert 0 <= found["knn"] <= 1


def test_a_picture_is_written_where_asked(mim, trained, tmp_path):
    code, out, _ = mim("eval", "reconstruction", trained, "num_images=2", "--out", tmp_path)
    assert code == 0
    path = json.loads(out)["reconstruction"]
    assert path.startswith(str(tmp_path))
    assert Image.open(path).size == (4 * (96 + 4) + 4, 34 + 2 * (96 + 4))


def test_a_run_is_exported(mim, trained, tmp_path):
    code, out, _ = mim("export", "timm", trained, tmp_path / "out")
    assert code == 0
    assert json.loads(out)["max_difference"] == 0.0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["eval", "kn", "{run}"], "eval.name='kn' is unknown; did you mean 'knn'?; choose one of "),
        (["eval", "knn", "{run}", "kk=3"], "eval.kk is not a known key"),
        (["eval", "knn", "{run}", "k=few"], "eval.k: Value 'few'"),
        (["eval", "knn", "{run}", "k"], "'k' is not an option; write key=value, e.g. pool=class"),
        (["eval", "knn", "{run}", "k=["], "'k=[' is not an option: while parsing"),
        (["eval", "knn", "{run}", "pool=max"], "pool='max' is unknown; choose mean, class"),
        (["eval", "knn", "{run}", "--step", "5"], "{run} has no checkpoint of step 5; steps it has: 2"),
        (["eval", "codebook", "{run}"], "{run} has no tokenizer"),
        (["eval", "knn", "{run}/checkpoints"], "{run}/checkpoints is not a run directory"),
        (["export", "tim", "{run}", "{out}"], "export.name='tim' is unknown; did you mean 'timm'?"),
        (["export", "timm", "{run}", "{run}"], "{run} exists and is not empty; choose another folder"),
        (["train", "{recipe}", "train.run={run}", "optim.lr=2e-3"], "{run} holds another experiment"),
        (
            ["train", "{recipe}", "train.run={run}/checkpoints"],
            "train.run={run}/checkpoints is a folder with other files",
        ),
    ],
)
def test_a_mistake_with_a_run_is_told(mim, trained, tmp_path, arguments, start):
    names = {"run": trained, "out": tmp_path / "out", "recipe": trained.parent / "tiny.yaml"}
    code, out, err = mim(*(argument.format(**names) for argument in arguments))
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1 if "another experiment" not in start else 0].startswith("mim: " + start.format(**names))
    assert "Traceback" not in err


# ---- tokenizers from elsewhere -------------------------------------------------------------------


@pytest.fixture
def imported(mim, saved_tokenizer, tmp_path):
    """The folder that `mim tokenizer import` makes of a file of both halves of a dVAE."""
    shutil.copy(saved_tokenizer / "tokenizer.safetensors", tmp_path / "dvae.safetensors")
    code, out, _ = mim("tokenizer", "import", tmp_path / "dvae.safetensors", tmp_path / "imported")
    assert code == 0
    assert "DALL-E's dVAE" in out
    return tmp_path / "imported"


def test_an_imported_tokenizer_serves_beit_which_says_that_it_is_unmeasured(mim, imported, tiny, tmp_path):
    run = f"train.run={tmp_path / 'run'}"
    code, _, err = mim("train", tiny("beit"), f"tokenizer.path={imported}", run, "--dry-run")
    assert code == 0
    assert f"tokenizer {imported} is amber: its file holds no score card" in err


def test_the_report_of_an_import_can_be_read_by_programs(mim, saved_tokenizer, tmp_path):
    shutil.copy(saved_tokenizer / "tokenizer.safetensors", tmp_path / "dvae.safetensors")
    code, out, _ = mim("tokenizer", "import", tmp_path / "dvae.safetensors", tmp_path / "out", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["num_wanted"] == len(report["loaded"]) > 0
    assert report["out"] == str(tmp_path / "out")


def test_an_imported_tokenizer_is_measured_on_given_images_and_keeps_its_card(mim, imported, shards):
    options = (f"data.path={shards}", "data.image_size=32", "train_limit=16", "val_limit=16")
    code, out, _ = mim("eval", "codebook", imported, *options)
    assert code == 0
    shown = json.loads(out)
    card = json.loads((imported / "tokenizer.json").read_text())["card"]
    assert {"usage", "perplexity", "recon_mae", "probe"} <= card.keys()
    assert card.items() <= shown.items()
    assert (imported / "pictures" / "codes-00000000.png").is_file()
    code, out, err = mim(
        "eval", "reconstruction", imported, f"data.path={shards}", "data.image_size=32", "num_images=2"
    )
    assert code == 0, err
    assert json.loads((imported / "tokenizer.json").read_text())["card"] == card


def test_codes_of_features_are_measured_without_their_teacher(mim, shards, tmp_path):
    options = {"image_size": 32, "stride": 8, "width": 16, "depth": 1, "num_heads": 2, "decoder_width": 16,
               "decoder_depth": 1, "decoder_num_heads": 2, "target_width": 8, "num_codes": 16,
               "code_width": 8}  # fmt: skip
    tokenizers.save(vqkd.build(vqkd.Config(**options)), tmp_path / "vqkd", name="vqkd", config=options, card={})
    data = (f"data.path={shards}", "data.image_size=32", "val_limit=16", "train_limit=16")
    code, out, _ = mim("eval", "codebook", tmp_path / "vqkd", *data)
    assert code == 0
    assert "usage" in json.loads(out)
    assert "teacher_cosine" not in json.loads(out)


def test_the_files_of_a_checkpoint_stay_as_they_were_hashed(mim, saved_tokenizer, shards, tmp_path):
    folder = shutil.copytree(saved_tokenizer, tmp_path / "step-00000002")
    (folder / "manifest.json").write_text("{}")
    before = (folder / "tokenizer.json").read_bytes()
    code, _, _ = mim("eval", "codebook", folder, f"data.path={shards}", "data.image_size=32", "val_limit=8")
    assert code == 0
    assert (folder / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["data.image_size=32"], "data.path is missing; set it in the recipe or as data.path=..."),
        (["data.path={shards}", "data.image_size=33"], "an image of 33x33 pixels does not divide by the tokenizer's"),
        (["data.path={shards}", "data.channels=1"], "the tokenizer takes 3 channels, but data.channels=1"),
        (["data.path={shards}", "val_limits=3"], "eval.val_limits is not a known key"),
        (["data.path={shards}", "data.imagesize=32"], "data.imagesize is not a known key"),
    ],
)
def test_a_mistake_about_the_images_to_measure_on_is_one_sentence(refused, saved_tokenizer, shards, arguments, start):
    message = refused("eval", "codebook", saved_tokenizer, *(a.format(shards=shards) for a in arguments))
    assert message.startswith(start)


def test_a_tokenizer_s_folder_has_no_steps(mim, saved_tokenizer):
    code, _, err = mim("eval", "codebook", saved_tokenizer, "--step", 3)
    assert code == 2
    assert "--step chooses a checkpoint of a run" in err


def test_a_file_that_is_no_tokenizer_is_one_sentence(refused, tmp_path):
    (tmp_path / "page.pkl").write_text("<html>404</html>")
    message = refused("tokenizer", "import", tmp_path / "page.pkl", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'page.pkl'} cannot be read as a torch file")


# ---- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(config.ConfigError("words"), 2), (DataError("words"), 65), (StorageError(28, "words"), 74)],
)
def test_an_error_of_the_user_s_world_is_one_sentence_with_its_own_code(mim, monkeypatch, error, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("mim.train.main", fail)
    found, out, err = mim("train", "mae_vittiny_cifar10")
    assert (found, out) == (code, "")
    assert err.startswith("mim: ")
    assert "words" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), AssertionError("ours"), KeyError("ours")])
def test_an_error_of_the_program_itself_is_a_traceback_and_70(mim, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("mim.train.main", fail)
    code, _, err = mim("train", "mae_vittiny_cifar10")
    assert code == 70
    assert "Traceback" in err
    assert "ours" in err


@pytest.mark.parametrize("code", [0, 75])
def test_the_exit_code_of_a_training_is_that_of_the_loop(mim, monkeypatch, code):
    asked = []
    monkeypatch.setattr("mim.train.main", lambda *arguments, **options: asked.append((arguments, options)) or code)
    assert mim("train", "mae_vittiny_cifar10", "optim.lr=1", "a.b=2")[0] == code
    assert asked == [(("mae_vittiny_cifar10", ["optim.lr=1", "a.b=2"]), {})]


def test_a_dry_run_is_a_plan(mim, monkeypatch):
    asked = []
    monkeypatch.setattr("mim.dry_run.main", lambda *arguments, **options: asked.append((arguments, options)) or 0)
    assert mim("train", "mae_vitb16_in1k", "optim.ema=0.9", "--dry-run", "--images", "1281167", "--json")[0] == 0
    assert asked == [(("mae_vitb16_in1k", ["optim.ema=0.9"]), {"images": 1281167, "as_json": True})]


@pytest.mark.parametrize("option", [["--images", "5"], ["--json"]])
def test_what_belongs_to_a_dry_run_is_refused_without_it(mim, option):
    code, out, err = mim("train", "mae_vittiny_cifar10", *option)
    assert (code, out) == (2, "")
    assert "--images and --json belong to --dry-run; add it, or leave them out" in err


def test_another_rank_than_the_first_says_which_it_is(mim, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert mim("train", "nothing")[2].startswith("mim: rank 3: no recipe 'nothing'")


def test_the_sentence_of_a_loader_process_is_told_without_its_traceback():
    try:
        raise DataError("shard.tar/x: 3 pixels: too few")
    except DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError) as error:
        wrapped.reraise()
    assert "Traceback" in str(error.value)
    assert __main__.one_sentence(str(error.value)) == "shard.tar/x: 3 pixels: too few"


def test_a_sentence_of_this_process_is_told_as_it_is():
    assert __main__.one_sentence("optim.lr=1: give\n  two: lines") == "optim.lr=1: give\n  two: lines"


# ---- bench ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["mae", "beit", "tokenize"])
def test_the_loader_of_a_recipe_is_measured_by_stage(mim, tiny, objective):
    code, out, err = mim("bench", "data", tiny(objective), "--seconds", "0.05", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"read", "decode", "augment", "collate", "one worker", "to device", "loader"} == found["images_per_s"].keys()
    assert found["workers"] == 0
    assert found["advice"]


def test_the_measurement_of_a_loader_is_a_table(mim, tiny):
    code, out, err = mim("bench", "data", tiny(), "--seconds", "0.05", "train.workers=1")
    assert code == 0, err
    assert "images/s" in out
    assert "measured, train.workers=1" in out
    assert "bound: " in out


# ---- bad samples ---------------------------------------------------------------------------------


def test_too_many_undecodable_images_end_a_training_with_65_and_their_names(refused, tiny, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "damaged")
    damage.spoil_images(tmp_path / "damaged" / "train", [3, 40])
    options = [f"data.path={tmp_path / 'damaged'}", f"train.run={tmp_path / 'run'}", "data.bad_budget=0"]
    damage.quarantine(Dataset.open(tmp_path / "damaged" / "train"), [3, 40])
    message = refused("train", tiny(), *options, code=65)
    assert "samples, more than the 0 that data.bad_budget=0 accepts" in message
    assert message.count("image: truncated") == 2
