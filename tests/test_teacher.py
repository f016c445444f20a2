"""A frozen teacher: a run's encoder writes the targets of a tokenizer; what does not fit is refused in one sentence."""

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

import tokenizer as tokenizers
from mim import build, frozen_networks, train
from mim.config import ConfigError, to_yaml
from mim.data import stream
from mim.watch import stopping

TOKENIZER = {
    "name": "vqkd",
    "target": "features",
    "target_width": 32,
    "num_codes": 16,
    "code_width": 8,
    "image_size": 32,
    "stride": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@pytest.fixture
def trained(recipe, tmp_path):
    """A run of two steps of MAE: 4x4 patches of 8 pixels, 32 wide."""
    path = tmp_path / "mae.yaml"
    path.write_text(to_yaml({**recipe("mae"), "train": {"workers": 0}}))
    assert train.main(str(path), [f"train.run={tmp_path / 'mae'}"]) == stopping.DONE
    return tmp_path / "mae"


@pytest.fixture
def sections(recipe, trained):
    found = recipe("tokenize")
    return {**found, "tokenizer": dict(TOKENIZER), "teacher": {"recipe": "mae", "path": str(trained)}}


def refusal(sections) -> str:
    with pytest.raises(ConfigError) as error:
        build.build(sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_targets_are_the_patch_features_of_the_teachers_run(sections, trained):
    frozen = build.build(sections).frozen
    batch = {"images": torch.rand(2, 3, 32, 32)}
    frozen_networks.write_targets(frozen, batch)
    expected = build.load_run(trained).encoder(batch["images"]).patches
    assert torch.equal(batch["targets"], expected)
    assert not batch["targets"].requires_grad
    assert not any(p.requires_grad for p in frozen["teacher"].parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float32")])
def test_frozen_networks_compute_as_the_run_does_and_write_float32_and_codes(
    sections, saved_tokenizer, precision, dtype
):
    inside = []
    frozen = {"teacher": build.build(sections).frozen["teacher"], "tokenizer": tokenizers.load(saved_tokenizer)}
    frozen["tokenizer"].encoder.blocks.group_4.register_forward_hook(lambda *found: inside.append(found[-1]))
    frozen["teacher"].encoder.vit.blocks[0].mlp.fc1.register_forward_hook(lambda *found: inside.append(found[-1]))
    batch = {"images": torch.rand(2, 3, 32, 32)}
    with frozen_networks.computing(precision, torch.device("cpu")):
        frozen_networks.write_targets(frozen, batch)
    assert [str(value.dtype) for value in inside] == [f"torch.{dtype}"] * 2
    assert inside[1].is_contiguous(memory_format=torch.channels_last)
    assert batch["targets"].dtype == torch.float32
    assert batch["codes"].dtype == torch.int64


def test_a_teacher_of_another_size_sees_the_image_at_its_own(sections):
    sections["data"]["image_size"] = sections["tokenizer"]["image_size"] = 64
    sections["tokenizer"]["stride"] = 16
    batch = {"images": torch.rand(2, 3, 64, 64)}
    frozen_networks.write_targets(build.build(sections).frozen, batch)
    assert batch["targets"].shape == (2, 16, 32)


def test_a_tokenizer_learns_from_a_teacher_and_its_run_opens_again(sections, tmp_path, trained):
    path = tmp_path / "vqkd.yaml"
    path.write_text(to_yaml({**sections, "train": {"workers": 0, "log_every": "1 steps"}}))
    assert train.main(str(path), [f"train.run={tmp_path / 'run'}"]) == stopping.DONE
    loaded = build.load_run(tmp_path / "run")
    assert loaded.config["teacher"]["step"] == 2
    batch = next(
        iter(
            stream.evaluate(
                build.open_data(loaded.config)[0], view=loaded.views.evaluation, sizes=loaded.views.sizes, batch_size=4
            )
        )
    )
    batch = stream.to_device(batch, torch.device("cpu"))
    frozen_networks.write_targets(loaded.frozen, batch)
    out = loaded.objective(batch, torch.tensor(1.0))
    assert out["loss"].shape == (4,)
    assert train.main(str(path), [f"train.run={tmp_path / 'again'}"], dry_run=True) == stopping.DONE


def test_a_resume_with_another_teacher_is_refused(sections, tmp_path, trained, recipe):
    path = tmp_path / "vqkd.yaml"
    path.write_text(to_yaml({**sections, "train": {"workers": 0}}))
    assert train.main(str(path), [f"train.run={tmp_path / 'run'}"]) == stopping.DONE
    other = {**recipe("mae"), "train": {"workers": 0}}
    other["optim"]["seed"] = 1
    (tmp_path / "other.yaml").write_text(to_yaml(other))
    train.main(str(tmp_path / "other.yaml"), [f"train.run={tmp_path / 'other'}"])
    with pytest.raises(ConfigError, match=r"another experiment.*\n  teacher\.experiment: "):
        train.main(str(path), [f"train.run={tmp_path / 'run'}", f"teacher.path={tmp_path / 'other'}"])


@pytest.fixture
def released(sections, tmp_path):
    """The sections with a teacher that others released: a file of a timm ViT's weights."""
    encoder = {"name": "vit", **TINY["vit"]}
    vit = build.build({**sections, "teacher": {"encoder": encoder, "image_size": 32}}, load_frozen=False)
    weights = {f"{name}": value for name, value in vit.frozen["teacher"].encoder.vit.state_dict().items()}
    save_file(weights, tmp_path / "vit.safetensors")
    teacher = {"encoder": encoder, "init": str(tmp_path / "vit.safetensors"), "image_size": 32}
    return {**sections, "teacher": teacher}, weights


def test_released_weights_can_be_a_teacher_and_name_the_experiment(released, tmp_path, capsys):
    sections, weights = released
    built = build.build(sections)
    teacher = built.frozen["teacher"].encoder.vit.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in weights.items())
    assert "teacher: weights from " in capsys.readouterr().err
    again = build.build({**sections, "teacher": dict(built.sections["teacher"])}).sections["teacher"]
    assert again == built.sections["teacher"]
    weights["cls_token"] += 1
    save_file(weights, tmp_path / "vit.safetensors")
    changed = build.build(sections).sections["teacher"]
    assert changed["experiment"] != again["experiment"]


def test_a_released_teacher_needs_its_weights(released):
    sections, _ = released
    del sections["teacher"]["init"]
    assert refusal(sections) == (
        "teacher.init is missing: the released weights of teacher.encoder, a file, a folder or a timm name"
    )


@pytest.mark.parametrize("size", ["large", 0, [32], 32.5])
def test_a_size_that_is_none_is_refused_by_its_own_key(released, size):
    sections, _ = released
    sections["teacher"]["image_size"] = size
    assert refusal(sections) == f"teacher.image_size={size!r} must be one number of pixels or [height, width]"


def test_weights_of_another_width_are_no_teacher(released):
    sections, _ = released
    sections["teacher"]["encoder"]["width"] = 64
    sections["tokenizer"]["target_width"] = 64
    assert "width" in refusal(sections) or "64" in refusal(sections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "tokenizer.target=features needs a teacher; add teacher: {path: RUN}, or target: pixels"),
        (
            {"teacher": {"path": "nowhere"}},
            "teacher.path='nowhere' holds no trained encoder; train one first, e.g. "
            "`mim train RECIPE train.run=nowhere`",
        ),
        (
            {"teacher": {"recipe": "mae"}},
            "teacher.path is missing: the run of a trained encoder, e.g. teacher.path=runs/mae",
        ),
        ({"teacher": {"paht": "x"}}, "teacher.paht is not a known key; known here: recipe, path, step"),
        (
            {"tokenizer": {**TOKENIZER, "target_width": 48}},
            "tokenizer.target_width=48, but the teacher is 32 wide; make them equal",
        ),
        (
            {"tokenizer": {**TOKENIZER, "stride": 4}},
            "the teacher sees 4x4 patches of an image, but the tokenizer makes "
            "8x8 codes; choose data.image_size and tokenizer.stride so that they "
            "agree",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(sections, changes, message):
    assert refusal({**sections, **changes}) == message


def test_a_tokenizers_run_is_no_teacher(sections, recipe, tmp_path):
    (tmp_path / "dvae.yaml").write_text(to_yaml({**recipe("tokenize"), "train": {"workers": 0}}))
    train.main(str(tmp_path / "dvae.yaml"), [f"train.run={tmp_path / 'dvae'}"])
    sections["teacher"]["path"] = str(tmp_path / "dvae")
    assert "trained a tokenizer, which has no features" in refusal(sections)
