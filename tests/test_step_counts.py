"""What a step costs, in numbers that no machine changes: waits for the device, kernels, operations, graphs and bytes.

A step that waits for the device, or one kernel for every parameter, is slow on a GPU and cannot be seen in the time of
a test on a CPU. These counts are the guard: whoever makes a step dearer finds it here.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_contracts import OBJECTIVES, a_batch, an_objective
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mim import build, optim, train
from mim.blocks import blocks, compile_each
from mim.config import to_yaml
from mim.data import stream
from mim.data.shards import Dataset
from mim.data.store import Store
from mim.guard import Average
from mim.planning import footprint

HALF = torch.tensor(0.5)
LOG_STEP, QUIET_STEP, STEPS = 3, 2, 4
WIDTH, DEPTH, PATCH, PATCHES, ROWS = 32, 2, 8, 16, 3  # of the tiny ViT at 32 pixels, and of `a_batch`

MAE_KERNELS = 470  # of a forward and backward pass of the tiny MAE; 10 of them embed visible patches alone

# What waits for a GPU: a value that the host reads, a shape that depends on values, and a value that the host sends, by
# `torch.tensor` or by `torch.where` with a number.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive"}
CALLS = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__, Tensor.new_tensor, torch.tensor, torch.as_tensor}


class Kernels(TorchDispatchMode):
    """Counts what is launched, and notes which of it waits for the device."""

    def __init__(self):
        super().__init__()
        self.launched, self.waits = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.launched[name] += 1
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_truth = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in chosen)
        if name in WAITING or by_truth:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes in a list the calls that wait for a GPU, and show no operation for it on a CPU."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        numbers = func is torch.where and any(not isinstance(value, Tensor) for value in args)
        if func in CALLS or numbers:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits_of_steps(recipe, tmp_path, monkeypatch):
    """`waits_of_steps(objective, changes)`: what waited for the device in each step of a run, from the second on."""
    honest = train.loader
    monkeypatch.setattr(train, "loader", lambda job, start: list(honest(job, start)))  # rendered before the loop

    def measure(objective="mae", changes=()):
        sections = recipe(objective)
        sections["optim"] |= {"length": f"{STEPS} steps", "ema": 0.9, "clip_grad": 1.0}
        sections["train"] = {"workers": 0, "cpu": True, "log_every": f"{LOG_STEP} steps", "save_every": "9 steps"}
        for section, key, value in changes:
            (sections[section] if section else sections)[key] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(sections))
        kernels, until = Kernels(), [0]

        def stop(step):
            until.append(len(kernels.waits))
            return False

        with kernels, Calls(kernels.waits):
            assert train.main(str(path), [f"train.run={tmp_path / 'run'}"], stop=stop) == 0
        return {step: kernels.waits[until[step - 1] : until[step]] for step in range(2, STEPS + 1)}

    return measure


# ---- waits for the device ------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_that_does_not_log_never_waits_for_the_device(waits_of_steps, objective):
    changes = [("data", "jitter", 0.4)]
    if objective == "classify":
        changes += [("objective", key, 0.5) for key in ("mixup_alpha", "cutmix_alpha", "erase_rate")]
    found = waits_of_steps(objective, changes)
    assert found[QUIET_STEP] == []
    assert 0 < len(found[LOG_STEP]) <= 9  # of a tokenizer, which logs four values of the last batch


@pytest.mark.parametrize("tokenizer", ["vqkd", "fsq"])
def test_no_quantizer_waits_for_the_device_when_it_learns(waits_of_steps, tokenizer):
    found = waits_of_steps("tokenize", [("", "tokenizer", {"name": tokenizer, **TINY[tokenizer]})])
    assert found[QUIET_STEP] == []


def test_the_count_would_find_a_wait(waits_of_steps, monkeypatch):
    honest = train.on_device

    def asks(job, batch):
        batch = honest(job, batch)
        if batch["mask"].any() and batch["weight"].tolist():
            batch["images"][batch["mask"][:, 0]] *= 1
            batch["images"] = torch.where(batch["images"] > 0.5, batch["images"], 0.0)
        return batch

    monkeypatch.setattr(train, "on_device", asks)
    assert waits_of_steps()[QUIET_STEP] == ["_local_scalar_dense", "tolist", "index", "index_put_", "where"]


# ---- kernels -------------------------------------------------------------------------------------


def launched(step):
    """How many operations a callable launches."""
    with Kernels() as kernels:
        step()
    return sum(kernels.launched.values())


def update_of(count):
    """What a step does after the backward pass, as a callable, on `count` parameters."""
    network = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(count)])
    optimizer = optim.create(network, optim.Config(lr=1e-3))
    average = Average([p.detach().clone() for p in network], list(network), 0.1)
    for parameter in network:
        parameter.grad = torch.randn(4, 4)

    def update():
        norm = nn.utils.get_total_norm([p.grad for p in network])
        nn.utils.clip_grads_with_norm_(network, 1.0, norm)
        finite = torch.isfinite(norm)
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        average.move(finite)

    update()  # makes the state of the optimizer
    return update


def test_clipping_the_update_and_the_average_launch_as_much_for_many_parameters_as_for_few():
    few, many = launched(update_of(4)), launched(update_of(40))
    assert many - few == 0


def test_a_step_of_mae_launches_no_more_than_is_stated_here():
    """Forward and backward of two encoder blocks and one of the decoder; a number to lower, or to raise on purpose."""
    objective, batch = an_objective("mae").train(), a_batch()
    found = launched(lambda: objective(batch, HALF)["loss"].sum().backward())
    assert found <= MAE_KERNELS


# ---- operations ----------------------------------------------------------------------------------


def products(objective, batch):
    """Operations per image of the matrix products with weights: linear layers and patch embeddings, both ways."""
    counted = footprint.operations()
    with counted:
        objective(batch, HALF)["loss"].sum().backward()
    total = counted.get_flop_counts()["Global"]
    names = {op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else op.__name__: n for op, n in total.items()}
    return sum(names.get(name, 0) for name in ("mm", "addmm", "convolution", "convolution_backward")) / ROWS


def linear(rows, *sizes):
    """Operations of linear layers of (in * out) weights on rows, forward and backward: three products of two each."""
    return 3 * 2 * rows * sum(sizes)


def test_mae_embeds_and_encodes_the_visible_patches_and_predicts_the_masked_ones():
    options = TINY["mae"]
    width, visible, pixels = options["decoder_width"], PATCHES // 2, 3 * PATCH**2
    stem = 2 * 2 * visible * pixels * WIDTH  # no gradient of the image
    encoder = linear(1 + visible, DEPTH * 12 * WIDTH**2)
    decoder = linear(1 + visible, WIDTH * width) + linear(1 + PATCHES, options["decoder_depth"] * 12 * width**2)
    head = linear(PATCHES - visible, width * pixels)
    assert products(an_objective("mae").train(), a_batch()) == stem + encoder + decoder + head


@pytest.mark.parametrize(("objective", "outputs"), [("beit", 16), ("simmim", 3 * PATCH**2)])
def test_the_last_mlp_and_the_head_compute_the_masked_positions_alone(objective, outputs):
    masked = PATCHES // 2
    stem = 2 * 2 * PATCHES * 3 * PATCH**2 * WIDTH
    encoder = linear(1 + PATCHES, (12 * DEPTH - 8) * WIDTH**2) + linear(1 + masked, 8 * WIDTH**2)
    assert products(an_objective(objective).train(), a_batch()) == stem + encoder + linear(masked, WIDTH * outputs)


# ---- graphs --------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def dropping(objective):
    """The objective with a rate of drop path of its own in every block, as a deep network has them."""
    for number, block in enumerate(blocks(objective).values(), start=1):
        for part in block.modules():
            if hasattr(part, "drop_prob"):
                part.drop_prob = 0.1 * number
    return objective


PAIRS = [(name, "vit") for name in OBJECTIVES] + [("mae", "eva"), ("beit", "beit"), ("beit2", "beit")]
PAIRS += [("simmim", "dense")]


@pytest.mark.parametrize(("name", "encoder"), PAIRS)
def test_compiled_blocks_are_one_graph_each_and_no_later_step_compiles_again(name, encoder, fresh_compiler):
    objective, batch = dropping(an_objective(name, encoder)).train(), a_batch()
    assert compile_each(objective, backend="eager") > 0

    def step():
        objective(batch, HALF)["loss"].sum().backward()

    step()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        step()
        objective.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # an evaluation, of another batch
            objective({k: v[:2] if isinstance(v, Tensor) else v for k, v in batch.items()}, HALF)
        objective.train()
        step()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


# ---- bytes ---------------------------------------------------------------------------------------


def test_a_sample_is_read_once_and_travels_as_bytes(recipe, monkeypatch):
    """One read of the shard; over the bus a byte for each value of a pixel, and little more."""
    read = []
    honest = Store.pread
    monkeypatch.setattr(Store, "pread", lambda self, *a: read.append(a[2]) or honest(self, *a))
    sections = recipe("mae")
    dataset = Dataset.open(Path(sections["data"]["path"]) / "train")
    views = build.build(sections, dataset=dataset).views
    del read[:]
    found = stream.evaluate(dataset, view=views.train, sizes=views.train_sizes, mask=views.mask, batch_size=8, limit=8)
    (batch,) = list(found)
    assert len(read) == 8
    assert batch["images"].dtype == torch.uint8
    sent = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor)) / 8
    assert sent <= 3 * 32 * 32 + PATCHES + 32  # pixels, mask, and weight, label and seeds
