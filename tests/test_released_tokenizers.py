"""Released tokenizers: synthetic files in their structure, names and shapes become tokenizers that compute the same."""

import argparse
import collections
import json
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokenizer as tokenizers
from mim.config import ConfigError
from mim.pretrained.released_tokenizers import dalle_config, import_tokenizer, vqkd_config, vqkd_names
from tokenizer import dvae, vqkd

# ---- DALL-E's files: whole networks of classes that nobody has ------------------------------------------------------


def dall_e_package():
    """Modules `dall_e.*` with classes that hold what the release's hold beside their parts; none of them can run."""
    package = types.ModuleType("dall_e")
    modules = {"dall_e": package}
    for name, classes in {"encoder": ["Encoder", "EncoderBlock"], "decoder": ["Decoder", "DecoderBlock"],
                          "utils": ["Conv2d"]}.items():  # fmt: skip
        module = modules[f"dall_e.{name}"] = types.ModuleType(f"dall_e.{name}")
        for title in classes:
            setattr(module, title, type(title, (nn.Module,), {"__module__": f"dall_e.{name}"}))
    return modules


def dressed(kind, **parts):
    """An instance of a class with parameters, parts and settings."""
    module = kind()
    for name, value in parts.items():
        setattr(module, name, value)
    return module


def pickled_halves(own, modules):
    """The encoder and the decoder of our dVAE as networks of `dall_e`."""

    def convert(module, side):
        inner = {name: convert(child, side) for name, child in module.named_children()}
        classes = modules[f"dall_e.{side}"]
        title = side.title()
        device = torch.device("cpu")
        match type(module).__name__:
            case "Conv2d":
                kind = modules["dall_e.utils"].Conv2d
                return dressed(kind, w=module.w, b=module.b, kw=module.w.shape[-1], use_float16=True, device=device)
            case "Block":
                kind = getattr(classes, f"{title}Block")
                return dressed(kind, n_layers=4, post_gain=1 / 16, device=device, **inner)
            case "Encoder" | "Decoder":
                return dressed(getattr(classes, title), group_count=4, n_hid=8, device=device, **inner)
            case "Sequential":
                return nn.Sequential(collections.OrderedDict(inner))
        return module

    return [convert(getattr(own, side), side) for side in ("encoder", "decoder")]


@pytest.fixture
def own():
    torch.manual_seed(0)
    return dvae.build(dvae.Config(num_codes=16, width=8, n_init=4, num_groups=3, blocks_per_group=2)).requires_grad_(
        False
    )


@pytest.fixture
def halves(own, tmp_path, monkeypatch):
    """`encoder.pkl` and `decoder.pkl`, and no package that knows their classes."""
    modules = dall_e_package()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    files = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for file, network in zip(files, pickled_halves(own, modules), strict=True):
        torch.save(network, file)
    monkeypatch.undo()
    for name in modules:  # nor the real one, where it is installed
        monkeypatch.delitem(sys.modules, name, raising=False)
    return files


def equal(found, expected, size=16):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    codes = expected.encode(images)
    assert codes.unique().numel() > 2
    assert found.encode(images).equal(codes)
    grid = (size // expected.stride, size // expected.stride)
    assert found.decode(codes, grid).equal(expected.decode(codes, grid))


@pytest.mark.parametrize("order", [1, -1])
def test_whole_pickled_networks_become_the_same_tokenizer_in_either_order(own, halves, tmp_path, order):
    report = import_tokenizer(halves[::order], tmp_path / "out")
    found = tokenizers.load(tmp_path / "out")
    equal(found, own)
    assert found.cfg == own.cfg
    assert report.family == "DALL-E's dVAE"
    assert sorted(report.loaded) == sorted(own.state_dict())
    assert report.unused == []
    assert json.loads((tmp_path / "out" / "init.json").read_text()) == vars(report)
    assert "dall_e" not in sys.modules


def test_plain_state_dicts_and_both_halves_in_one_file_do_as_well(own, tmp_path):
    parts = {side: getattr(own, side).state_dict() for side in ("encoder", "decoder")}
    files = [tmp_path / "encoder.pth", tmp_path / "decoder.pth", tmp_path / "both.pth"]
    torch.save({"state_dict": {f"module.{n}": t for n, t in parts["encoder"].items()}, "epoch": 3}, files[0])
    torch.save(parts["decoder"] | {"steps": torch.ones(1)}, files[1])
    torch.save({"model": own.state_dict()}, files[2])
    assert import_tokenizer(files[:2], tmp_path / "two").unused == ["steps"]
    import_tokenizer(files[2:], tmp_path / "one")
    for name in ("two", "one"):
        equal(tokenizers.load(tmp_path / name), own)


def test_a_likelihood_of_squares_shows_in_the_decoder_s_outputs(tmp_path):
    own = dvae.build(dvae.Config(num_codes=16, channels=5, width=8, n_init=4, blocks_per_group=1, likelihood="mse"))
    torch.save(own.state_dict(), tmp_path / "dvae.pth")
    import_tokenizer([tmp_path / "dvae.pth"], tmp_path / "out")
    assert tokenizers.load(tmp_path / "out").cfg == own.cfg


DALLE = {  # reference/recipes of the release: names and shapes at full size
    "encoder": {
        "input": (3, 256, 7),
        "groups": [(256, 256), (256, 512), (512, 1024), (1024, 2048)],
        "kernels": (3, 3, 3, 1),
        "output": (2048, 8192),
    },
    "decoder": {
        "input": (8192, 128, 1),
        "groups": [(128, 2048), (2048, 1024), (1024, 512), (512, 256)],
        "kernels": (1, 3, 3, 3),
        "output": (256, 6),
    },
}


def published_shapes(table):
    def conv(name, n_in, n_out, kernel):
        return {f"blocks.{name}.w": (n_out, n_in, kernel, kernel), f"blocks.{name}.b": (n_out,)}

    shapes = conv("input", *table["input"])
    for g, (n_in, n_out) in enumerate(table["groups"], 1):
        for j, first in ((1, n_in), (2, n_out)):
            block = f"group_{g}.block_{j}"
            shapes |= conv(f"{block}.id_path", first, n_out, 1) if first != n_out else {}
            widths = (first, n_out // 4, n_out // 4, n_out // 4, n_out)
            for c, kernel in enumerate(table["kernels"]):
                shapes |= conv(f"{block}.res_path.conv_{c + 1}", widths[c], widths[c + 1], kernel)
    return shapes | conv("output.conv", *table["output"], 1)


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_published_shapes_of_the_dvae_are_those_of_its_default_config():
    shapes = {side: published_shapes(table) for side, table in DALLE.items()}
    config = dalle_config(*map(on_meta, shapes.values()), {"encoder": "encoder.pkl", "decoder": "decoder.pkl"})
    assert dvae.Config(**config) == dvae.Config()
    with torch.device("meta"):
        own = dvae.build(dvae.Config(**config)).state_dict()
    expected = {f"{side}.{name}": shape for side, of in shapes.items() for name, shape in of.items()}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == expected


@torch.no_grad()
def test_the_forward_equals_that_of_the_dall_e_package(tmp_path):
    """Needs the package `DALL-E` of 2021; its smallest networks."""
    pytest.importorskip("dall_e")
    from dall_e import Decoder, Encoder, map_pixels, unmap_pixels

    torch.manual_seed(0)
    encoder, decoder = Encoder(n_hid=64, vocab_size=512), Decoder(n_hid=64, n_init=16, vocab_size=512)
    for parameter in (*encoder.parameters(), *decoder.parameters()):  # biases, too
        parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(encoder, tmp_path / "encoder.pkl")
    torch.save(decoder, tmp_path / "decoder.pkl")
    import_tokenizer([tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"], tmp_path / "out")
    found = tokenizers.load(tmp_path / "out")
    images = torch.rand(2, 3, 64, 64)
    logits = encoder(map_pixels(images))
    assert torch.allclose(found.encoder(dvae.map_pixels(images)), logits, atol=1e-5)
    codes = logits.argmax(dim=1)
    assert codes.unique().numel() > 1
    assert found.encode(images).equal(codes.flatten(1))
    one_hot = F.one_hot(codes, 512).permute(0, 3, 1, 2).float()
    theirs = unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
    assert torch.allclose(found.decode(codes.flatten(1), (8, 8)), theirs, atol=1e-5)


# ---- hostile files ---------------------------------------------------------------------------------------------------


class Trap:
    """Runs a command when it is unpickled by an ordinary reader."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def test_a_pickle_that_names_a_system_call_is_refused_and_nothing_runs(tmp_path):
    torch.save(Trap(f"touch {tmp_path / 'trace'}"), tmp_path / "encoder.pkl")
    with pytest.raises(ConfigError, match=r"wants to load (posix|nt|os)\.system, which could run code"):
        import_tokenizer([tmp_path / "encoder.pkl"], tmp_path / "out")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "encoder.pkl", weights_only=False)  # the trap is real
    assert (tmp_path / "trace").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["device", "part", "parameter", "settings"])
def test_a_call_hidden_inside_a_network_is_refused_and_does_not_run(own, tmp_path, monkeypatch, place):
    modules = dall_e_package()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    encoder, trap = pickled_halves(own, modules)[0], Trap(f"touch {tmp_path / 'trace'}")
    block = encoder.blocks.group_2.block_1
    match place:
        case "device":
            block.device = trap
        case "part":
            block._modules["id_path"] = trap
        case "parameter":
            block.res_path.conv_1._parameters["w"] = trap
        case "settings":
            encoder.blocks.__dict__["_forward_hooks"] = {0: [{"deep": (trap,)}]}
    torch.save(encoder, tmp_path / "encoder.pkl")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="which could run code"):
        import_tokenizer([tmp_path / "encoder.pkl"], tmp_path / "out")
    assert not (tmp_path / "trace").exists()


def test_a_network_of_another_package_is_refused_by_name(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "other.pkl")
    with pytest.raises(ConfigError, match=r"wants to load torch\.nn\.modules\.linear\.Linear"):
        import_tokenizer([tmp_path / "other.pkl"], tmp_path / "out")


def test_a_network_inside_itself_ends_in_a_sentence(tmp_path):
    around = nn.Sequential(nn.ReLU())
    around._modules["1"] = around
    torch.save(around, tmp_path / "loop.pkl")
    with pytest.raises(ConfigError, match="holds more than 1000 networks, or one inside itself"):
        import_tokenizer([tmp_path / "loop.pkl"], tmp_path / "out")


# ---- VQ-KD -----------------------------------------------------------------------------------------------------------


def vqkd_shapes(width, depth, codes, side, patch, target, decoder_depth=3):
    """Names and shapes of a checkpoint, with one tensor of each part that is dropped."""

    def linear(name, n_in, n_out):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}

    def vit(name, channels, kernel, blocks):
        shapes = {f"{name}.cls_token": (1, 1, width), f"{name}.pos_embed": (1, side**2 + 1, width)}
        shapes |= {f"{name}.patch_embed.proj.weight": (width, channels, kernel, kernel)}
        shapes |= {f"{name}.patch_embed.proj.bias": (width,)}
        for i in range(blocks):
            block = f"{name}.blocks.{i}"
            shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
            shapes |= {f"{block}.attn.{bias}": (width,) for bias in ("q_bias", "v_bias")}
            shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)} | linear(f"{block}.attn.proj", width, width)
            shapes |= linear(f"{block}.mlp.fc1", width, 4 * width) | linear(f"{block}.mlp.fc2", 4 * width, width)
        return shapes | {f"{name}.fc_norm.{part}": (width,) for part in ("weight", "bias")}

    num, d = codes
    embedding = {"weight": (num, d), "cluster_size": (num,), "embed_avg": (num, d), "initted": (1,)}
    return {
        **vit("encoder", 3, patch, depth),
        **vit("decoder", d, 1, decoder_depth),
        **{f"quantize.embedding.{name}": shape for name, shape in embedding.items()},
        "quantize.cluster_size": (num,),
        **linear("encode_task_layer.0", width, width),
        **linear("encode_task_layer.2", width, d),
        **linear("decode_task_layer.0", width, width),
        **linear("decode_task_layer.2", width, target),
        "teacher_model.visual.proj": (width, target),
        "scaling_layer.shift": (1, 3, 1, 1),
        "loss.weight": (2,),
    }


def a_release(**changes):
    generator = torch.Generator().manual_seed(0)
    shapes = vqkd_shapes(**{"width": 128, "depth": 2, "codes": (24, 8), "side": 4, "patch": 8, "target": 20} | changes)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state |= {n: t + 1 for n, t in state.items() if "norm" in n and n.endswith("weight")}
    state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"], dim=1)
    state["quantize.embedding.initted"] = torch.ones(1)
    state["quantize.cluster_size"] = torch.arange(len(state["quantize.cluster_size"])).float()
    return state


def write_release(path, state):
    args = argparse.Namespace(model="vqkd_encoder_base_decoder_3x768x12_clip", lr=5e-5)
    torch.save({"model": state, "optimizer": {"step": 3}, "epoch": 99, "scaler": {}, "args": args}, path)
    return path


def reference_vit(state, name, images, num_heads=2):
    """Tokens after `fc_norm`, without the class token, by the table of names."""

    def part(key):
        return state[f"{name}.{key}"]

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], part(f"{key}.weight"), part(f"{key}.bias"), eps=1e-6)

    def linear(x, key):
        return x @ part(f"{key}.weight").T + part(f"{key}.bias")

    kernel = part("patch_embed.proj.weight")
    x = F.conv2d(images, kernel, part("patch_embed.proj.bias"), stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([part("cls_token").expand(len(x), -1, -1), x], dim=1) + part("pos_embed")
    for i in range(len({n.split(".")[2] for n in state if n.startswith(f"{name}.blocks.")})):
        b, n, width = x.shape
        qkv = norm(x, f"blocks.{i}.norm1") @ part(f"blocks.{i}.attn.qkv.weight").T
        q, k, v = qkv.view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q + part(f"blocks.{i}.attn.q_bias").view(num_heads, 1, -1)
        v = v + part(f"blocks.{i}.attn.v_bias").view(num_heads, 1, -1)
        weights = (q @ k.mT / (width / num_heads) ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return norm(x[:, 1:], "fc_norm")


def reference_task(state, name, x):
    x = torch.tanh(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
    return x @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]


def test_codes_and_features_of_vq_kd_equal_a_reference_by_the_table_of_names(tmp_path):
    state = a_release()
    import_tokenizer([write_release(tmp_path / "vqkd.pth", state)], tmp_path / "out")
    found = tokenizers.load(tmp_path / "out")
    images = torch.rand(3, 3, 32, 32)
    vectors = reference_task(state, "encode_task_layer", reference_vit(state, "encoder", 2 * images - 1))
    book = state["quantize.embedding.weight"]
    distances = (F.normalize(vectors, dim=-1)[:, :, None] - book).square().sum(dim=-1)  # (3, 16, 24)
    codes = distances.argmin(dim=-1)
    assert codes.unique().numel() > 2
    assert found.encode(images).equal(codes)
    placed = book[codes].mT.unflatten(2, (4, 4))
    features = reference_task(state, "decode_task_layer", reference_vit(state, "decoder", placed))
    assert torch.allclose(found.decode(codes, (4, 4)), features, atol=1e-4)
    assert found.quantizer.sums.equal(book * state["quantize.cluster_size"][:, None])


def test_the_report_of_vq_kd_names_what_was_dropped_and_the_config_says_what_the_shapes_say(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in a_release().items()}
    report = import_tokenizer([write_release(tmp_path / "vqkd.pth", state)], tmp_path / "out")
    assert set(report.unused) == {
        "module.teacher_model.visual.proj", "module.scaling_layer.shift", "module.loss.weight",
        "module.quantize.embedding.cluster_size", "module.quantize.embedding.embed_avg",
        "module.quantize.embedding.initted",
    }  # fmt: skip
    assert report.num_wanted == len(report.loaded) == len(tokenizers.load(tmp_path / "out").state_dict())
    config = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["config"]
    wanted = {"num_codes": 24, "code_width": 8, "target_width": 20, "image_size": 32, "stride": 8, "depth": 2,
              "num_heads": 2, "decoder_depth": 3, "decoder_num_heads": 2, "target": "features"}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    text = "\n".join(report.lines())
    assert "module.teacher_model.visual.proj" in text
    assert "no score card yet" in text


def test_a_codebook_without_counts_gets_equal_ones_and_the_report_says_so(tmp_path):
    state = a_release()
    del state["quantize.cluster_size"]
    report = import_tokenizer([write_release(tmp_path / "vqkd.pth", state)], tmp_path / "out")
    assert report.neutral == ["quantizer.sizes", "quantizer.sums"]
    assert tokenizers.load(tmp_path / "out").quantizer.sizes.equal(torch.ones(24))


@pytest.mark.parametrize("target", [512, 768])
def test_the_published_shapes_of_vq_kd_are_those_of_its_default_config(target):
    theirs = on_meta(vqkd_shapes(768, 12, (8192, 32), 14, 16, target))
    config = vqkd_config(theirs, "vqkd.pth")
    assert vqkd.Config(**config) == vqkd.Config(target_width=target)
    with torch.device("meta"):
        own = vqkd.build(vqkd.Config(**config)).state_dict()
    found, _ = vqkd_names(theirs)
    assert {n: tuple(t.shape) for n, t in found.items()} == {n: tuple(t.shape) for n, t in own.items()}


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pkl is not a file; give the release's own"):
        import_tokenizer([tmp_path / "none.pkl"], tmp_path / "out")


def test_tensors_that_share_memory_are_written_apart(own, tmp_path):
    own.encoder.blocks.group_1.block_2.res_path.conv_2.w = own.encoder.blocks.group_1.block_1.res_path.conv_2.w
    torch.save(own.state_dict(), tmp_path / "dvae.pth")
    import_tokenizer([tmp_path / "dvae.pth"], tmp_path / "out")
    equal(tokenizers.load(tmp_path / "out"), own)


def test_a_file_that_is_neither_is_refused_with_the_keys_it_has(tmp_path):
    torch.save({f"layer{i}.conv.weight": torch.ones(3) for i in range(9)}, tmp_path / "resnet.pth")
    with pytest.raises(ConfigError, match=r"is no released tokenizer: .*it has layer0\.conv\.weight, .* and 3 more; "):
        import_tokenizer([tmp_path / "resnet.pth"], tmp_path / "out")


def test_a_network_without_tensors_is_refused(tmp_path):
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "empty.pkl")
    with pytest.raises(ConfigError, match="but it has no tensors"):
        import_tokenizer([tmp_path / "empty.pkl"], tmp_path / "out")


def test_half_a_dvae_is_refused_and_so_are_two_of_a_kind(halves, tmp_path):
    encoder, decoder = halves
    with pytest.raises(ConfigError, match=r"encoder\.pkl is the encoder of a dVAE without its decoder; .* give both"):
        import_tokenizer([encoder], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"decoder\.pkl is the decoder of a dVAE without its encoder"):
        import_tokenizer([decoder], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"are both encoders; give one encoder, one decoder"):
        import_tokenizer([encoder, encoder], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"are both decoders"):
        import_tokenizer([encoder, decoder, decoder], tmp_path / "out")


def save_halves(tmp_path, own, **changed):
    """State dicts of both halves, some tensors replaced, `None` left out."""
    for side in ("encoder", "decoder"):
        state = getattr(own, side).state_dict() | changed.get(side, {})
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / f"{side}.pth")
    return [tmp_path / "encoder.pth", tmp_path / "decoder.pth"]


@pytest.mark.parametrize(
    ("side", "name", "tensor", "message"),
    [
        ("decoder", "input.w", torch.ones(4, 17, 1, 1), "encodes to 16 codes, .* decodes 17; take both from one"),
        (
            "decoder",
            "output.conv.w",
            torch.ones(7, 8, 1, 1),
            "3 channels, but .* gives 7 values per pixel, not 6",
        ),
        ("encoder", "output.conv.b", torch.ones(15), r"output\.conv\.b \(\[15\] instead of \[16\]\); fetch it again"),
        ("encoder", "group_1.block_2.res_path.conv_1.w", None, r"lacks encoder\.blocks\.group_1\.block_2\.res_path"),
        ("encoder", "group_1.extra.w", torch.ones(1), r"also holds encoder\.blocks\.group_1\.extra\.w"),
        ("encoder", "input.w", torch.ones(8), r"blocks\.input\.w should have 4 dimensions, but .* has 8"),
        ("encoder", "output.conv.w", None, r"blocks\.output\.conv\.w should have 4 dimensions, but .* lacks it"),
        ("decoder", "input.b", torch.full((4,), torch.nan), r"not finite, first in blocks\.input\.b; take"),
    ],
)
def test_halves_that_contradict_themselves_or_each_other_are_refused(own, tmp_path, side, name, tensor, message):
    files = save_halves(tmp_path, own, **{side: {f"blocks.{name}": tensor}})
    with pytest.raises(ConfigError, match=message):
        import_tokenizer(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.pos_embed", torch.ones(1, 16, 128), "positions for 15 patches, which make no square"),
        ("encoder.blocks.0.gamma_1", torch.ones(128), r"also holds encoder\.vit\.blocks\.0\.ls1\.gamma"),
        ("encoder.blocks.1.attn.v_bias", None, r"lacks 'blocks\.1\.attn\.v\.bias' of a VQ-KD tokenizer"),
        ("encode_task_layer.2.weight", torch.ones(9, 128), r"task_layer\.2\.weight \(\[9, 128\] instead of \[8, 128\]"),
        ("quantize.embedding.weight", torch.ones(24), "should have 2 dimensions, but .* has 24"),
        ("quantize.embedding.initted", torch.zeros(1), "the codebook of .* was never started"),
        ("quantize.cluster_size", torch.full((24,), torch.inf), r"not finite, first in quantize\.cluster_size"),
    ],
)
def test_a_vq_kd_checkpoint_that_contradicts_itself_is_refused(tmp_path, name, tensor, message):
    state = a_release() | {name: tensor}
    file = write_release(tmp_path / "vqkd.pth", {n: t for n, t in state.items() if t is not None})
    with pytest.raises(ConfigError, match=message):
        import_tokenizer([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_that_no_heads_of_64_fill_is_refused(tmp_path):
    file = write_release(tmp_path / "vqkd.pth", a_release(width=96))
    with pytest.raises(ConfigError, match=r"the encoder of .* is 96 wide, which is no multiple of its heads of 64"):
        import_tokenizer([file], tmp_path / "out")


def test_vq_kd_is_imported_alone_into_a_new_folder_and_ours_not_at_all(halves, saved_tokenizer, tmp_path):
    file = write_release(tmp_path / "vqkd.pth", a_release())
    with pytest.raises(ConfigError, match="is a whole VQ-KD tokenizer; import it alone"):
        import_tokenizer([file, halves[0]], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another folder"):
        import_tokenizer([file], tmp_path)
    with pytest.raises(ConfigError, match=f"is a tokenizer of ours already; set tokenizer.path={saved_tokenizer}"):
        import_tokenizer([saved_tokenizer / "tokenizer.safetensors"], tmp_path / "out")
