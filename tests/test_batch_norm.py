"""BatchNorm over ranks: torch's own on one rank, blind to rows that only pad, and the same for any number of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mim.batch_norm import BatchNorm, counting
from mim.build import normalises_batches

ROOT = Path(__file__).parent.parent
SPLIT = """
import torch, torch.distributed as dist
from mim.batch_norm import BatchNorm, counting
dist.init_process_group("gloo")
rank = dist.get_rank()
generator = torch.Generator().manual_seed(0)
x = torch.randn(5, 4, 3, 3, generator=generator)
aim = torch.randn(5, 4, 3, 3, generator=generator)
share = [slice(0, 3), slice(3, 5)][rank]
mine, weight = x[share].clone(), torch.ones(3)
if rank == 1:  # the smaller share is padded
    mine, weight = torch.cat([mine, 100 + mine[:1]]), torch.tensor([1.0, 1.0, 0.0])
mine.requires_grad_()
norm = BatchNorm(4)
with counting(norm, weight):
    y = norm(mine)
count = int(weight.sum())
(y[:count] * aim[share]).sum().backward()
whole = x.clone().requires_grad_()
reference = torch.nn.BatchNorm2d(4)
expected = reference(whole)
(expected * aim).sum().backward()
assert torch.allclose(y[:count], expected[share], atol=1e-5)
assert torch.allclose(mine.grad[:count], whole.grad[share], atol=1e-5)
assert torch.allclose(norm.running_mean, reference.running_mean, atol=1e-6)
assert torch.allclose(norm.running_var, reference.running_var, atol=1e-6)
dist.all_reduce(norm.weight.grad)
assert torch.allclose(norm.weight.grad, reference.weight.grad, atol=1e-4)
gathered = [torch.empty_like(norm.running_mean) for _ in range(2)]
dist.all_gather(gathered, norm.running_mean)
assert torch.equal(*gathered)
dist.destroy_process_group()  # threads that live on can abort the exit
"""


def a_pair(**options):
    """Ours and torch's, of the same weights."""
    ours, theirs = BatchNorm(4, **options), nn.BatchNorm2d(4, **options)
    if ours.affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
def test_values_gradients_and_running_statistics_are_torch_s(affine):
    torch.manual_seed(0)
    ours, theirs = a_pair(affine=affine)
    x, aim = torch.randn(2, 5, 4, 3, 3).unbind()
    for _ in range(2):
        results = []
        for norm in (ours, theirs):
            leaf = (3 + 2 * x).requires_grad_()
            y = norm(leaf)
            (y * aim).sum().backward()
            results.append((y, leaf.grad, *(p.grad for p in norm.parameters()), *norm.buffers()))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_rows_of_weight_0_change_nothing_for_the_others():
    torch.manual_seed(0)
    norm, alone = BatchNorm(4), BatchNorm(4)
    x = torch.randn(5, 4, 3, 3)
    with counting(norm, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])):
        y = norm(torch.cat([x[:3], 100 * x[3:]]))
    assert torch.allclose(y[:3], alone(x[:3]), atol=1e-5)
    assert torch.allclose(norm.running_var, alone.running_var, atol=1e-5)
    assert norm.rows is None


def test_statistics_stay_where_no_row_counts():
    norm = BatchNorm(5).train()
    with counting(norm, torch.zeros(3)):
        assert norm(torch.randn(3, 5, 1, 1)).isfinite().all()
    assert torch.equal(norm.running_mean, torch.zeros(5))
    assert torch.equal(norm.running_var, torch.ones(5))


def test_one_cell_of_one_image_is_normed_to_the_bias_instead_of_failing():
    """UPerNet pools to a single cell; torch's own refuses a micro-batch of one image there."""
    norm = BatchNorm(4)
    assert torch.equal(norm(torch.randn(1, 4, 1, 1)), torch.zeros(1, 4, 1, 1))


def test_half_precision_goes_in_and_out_and_is_summed_in_single():
    norm = BatchNorm(4)
    y = norm(torch.full((8, 4, 64, 64), 300.0, dtype=torch.float16))
    assert y.dtype == torch.float16
    assert not y.any()  # the sum of 32768 * 300 is beyond float16
    assert torch.allclose(norm.running_mean, torch.full((4,), 30.0))


def test_it_makes_an_objective_depend_on_its_micro_batch():
    assert normalises_batches(nn.Sequential(BatchNorm(4)))


def test_two_processes_norm_as_one_even_when_one_of_them_pads(tmp_path):
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
