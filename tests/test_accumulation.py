"""However a batch is split over processes and micro-batches, the weights are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mim.config import from_yaml, to_yaml
from tests import in_turn
from tests.test_train import dataset, lines, recipe, tensors  # noqa: F401  (dataset is a fixture)

ROOT = Path(__file__).parent.parent
KINDS = ("mae", "beit", "dvae")
OPTIM = {"batch_size": 7, "length": "20 steps", "lr": 1e-3}  # 7 images: shares of ranks and micro-batches differ


@pytest.fixture
def recipes(dataset, saved_tokenizer, tmp_path):  # noqa: F811
    """`recipes(*kinds)`: paths of recipes whose loss of an image depends on that image alone."""

    def write(*kinds):
        for kind in kinds:
            sections = from_yaml(Path(recipe(dataset, tmp_path, kind if kind == "dvae" else "mae")))
            sections["optim"] |= OPTIM
            if kind != "dvae":
                sections["encoder"]["drop_path_rate"] = 0.0
            if kind == "beit":
                sections["objective"] = {"name": "beit", "num_codes": 16}
                sections["tokenizer"] = {"recipe": "dvae", "path": str(saved_tokenizer)}
            (tmp_path / "recipes").mkdir(exist_ok=True)
            (tmp_path / "recipes" / f"{kind}.yaml").write_text(to_yaml(sections))
        return [str(tmp_path / "recipes" / f"{kind}.yaml") for kind in kinds]

    return write


def train(recipes, out, *, ranks, micro_batches):
    """Train recipes one after another on so many processes; return the folder of their runs."""
    override = f"train.micro_batches={micro_batches}"
    if ranks == 1:
        in_turn.main(str(out), override, *recipes)
        return out
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               "-m", "tests.in_turn", str(out), override, *recipes]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    return out


def assert_same_weights(folder, reference):
    """Weights, buffers and their average after 20 steps, and the samples that they have seen.

    Left out is the bias of keys: its gradient is zero but for rounding, of which Adam makes whole steps.
    """
    mine, theirs = tensors(folder), tensors(reference)
    assert mine.keys() == theirs.keys()
    for name in (name for name in theirs if not name.startswith("optimizer.")):
        a, b = mine[name].float(), theirs[name].float()
        if name.endswith("qkv.bias"):
            a, b = (t.view(3, -1)[[0, 2]] for t in (a, b))  # of queries and values
        assert (a - b).abs().max() <= 1e-5, name
    assert [entry["step"] for entry in lines(folder)][-1] == 20
    assert [entry["fingerprint"] for entry in lines(folder)] == [entry["fingerprint"] for entry in lines(reference)]


def test_two_processes_with_accumulation_train_the_weights_of_one(recipes, tmp_path):
    paths = recipes("mae")
    one = train(paths, tmp_path / "one", ranks=1, micro_batches=4)
    two = train(paths, tmp_path / "two", ranks=2, micro_batches=2)
    assert_same_weights(two / "mae", one / "mae")


@pytest.mark.slow
def test_any_split_over_processes_and_micro_batches_trains_the_same_weights(recipes, tmp_path):
    """Of 7 images: two processes with accumulation 2, four without, and one with accumulation 4."""
    paths = recipes(*KINDS)
    one = train(paths, tmp_path / "one", ranks=1, micro_batches=4)
    for ranks, micro_batches in ((2, 2), (4, 1)):
        out = train(paths, tmp_path / f"{ranks}x{micro_batches}", ranks=ranks, micro_batches=micro_batches)
        for kind in KINDS:
            assert_same_weights(out / kind, one / kind)
