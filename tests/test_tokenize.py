"""The tokenizer's loss as an objective: codebook statistics over epochs, for any split of the batch."""

import pytest
import torch
from torch import nn

from mim.objectives import tokenize
from tokenizer import dvae


class Scripted(nn.Module):
    """A tokenizer whose codes are its images."""

    num_codes = 4

    def loss(self, batch, progress):
        codes = batch["images"].long()
        return {"loss": batch["images"].float().mean(dim=1), "codes": codes}


def an_objective():
    return tokenize.build(Scripted(), tokenize.Config()).train()


def a_step(objective, *micro_batches):
    """One optimizer step over (epoch, codes, weight) micro-batches; returns the last output."""
    for epoch, codes, weight in micro_batches:
        batch = {"images": torch.tensor(codes), "epoch": epoch, "weight": torch.tensor(weight)}
        out = objective(batch, torch.tensor(0.0))
    objective.after_step(0, 0.0)
    return out


def reported(objective):
    card = objective.card()
    return card["usage"], card["perplexity"]


def test_the_codes_stay_inside_and_the_loss_comes_out():
    out = a_step(an_objective(), (0, [[0, 1], [2, 2]], [1.0, 1.0]))
    assert set(out) == {"loss", "usage", "perplexity"}
    assert out["loss"].tolist() == [0.5, 2.0]


def test_the_first_epoch_is_reported_as_far_as_it_got():
    objective = an_objective()
    assert reported(objective) == (0, 1)
    a_step(objective, (0, [[0, 1]], [1.0]))
    assert reported(objective) == pytest.approx((0.5, 2))
    a_step(objective, (0, [[2, 3]], [1.0]))
    assert reported(objective) == pytest.approx((1, 4))


def test_a_full_epoch_is_reported_until_the_next_is_full():
    objective = an_objective()
    a_step(objective, (0, [[0, 1]], [1.0]))
    a_step(objective, (1, [[2, 2]], [1.0]))
    assert reported(objective) == pytest.approx((0.5, 2))  # of epoch 0
    a_step(objective, (1, [[2, 2]], [1.0]))
    assert reported(objective) == pytest.approx((0.5, 2))
    a_step(objective, (2, [[0, 1]], [1.0]))
    assert reported(objective) == pytest.approx((0.25, 1))  # of epoch 1


def test_padding_rows_are_not_counted():
    objective = an_objective()
    a_step(objective, (0, [[0, 0], [1, 2]], [1.0, 0.0]))
    assert objective.counts.tolist() == [2, 0, 0, 0]


def test_an_evaluation_is_not_counted():
    objective = an_objective().eval()
    a_step(objective, (0, [[0, 1]], [1.0]))
    assert objective.counts.sum() == 0


def test_a_step_over_an_epoch_s_end_counts_towards_its_first_row_in_any_split():
    whole, split = an_objective(), an_objective()
    for objective in (whole, split):
        a_step(objective, (0, [[0, 0]], [1.0]))
    a_step(whole, (0, [[1, 1], [3, 3]], [1.0, 1.0]))
    a_step(split, (0, [[1, 1]], [1.0]), (1, [[3, 3]], [1.0]))
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in split.state_dict().items())
    assert split.counts.tolist() == [2, 2, 0, 2]


def test_statistics_resume_exactly_in_the_middle_of_an_epoch():
    steps = [(0, [[0, 1]], [1.0]), (1, [[2, 2]], [1.0]), (1, [[3, 1]], [1.0]), (2, [[0, 0]], [1.0])]
    straight, first, second = an_objective(), an_objective(), an_objective()
    for step in steps:
        a_step(straight, step)
    for step in steps[:2]:
        a_step(first, step)
    second.load_state_dict(first.state_dict())
    for step in steps[2:]:
        a_step(second, step)
    assert all(torch.equal(straight.state_dict()[name], value) for name, value in second.state_dict().items())
    assert reported(second) == reported(straight)


def test_a_run_that_starts_from_another_s_weights_counts_anew():
    objective = an_objective()
    a_step(objective, (20, [[0, 1]], [1.0]))
    a_step(objective, (0, [[2, 2]], [1.0]))
    assert objective.counts.tolist() == [0, 0, 2, 0]


def test_two_micro_batches_give_the_gradient_of_one():
    torch.manual_seed(0)
    cfg = dvae.Config(num_codes=16, channels=1, width=8, n_init=8, num_groups=2, blocks_per_group=1)
    objective = tokenize.build(dvae.build(cfg), tokenize.Config())
    batch = {"images": torch.rand(4, 1, 8, 8), "noise": torch.arange(4), "weight": torch.ones(4)}
    gradients = []
    for size in (4, 2):
        objective.zero_grad()
        for start in range(0, 4, size):
            part = {name: value[start : start + size] for name, value in batch.items()} | {"epoch": 0}
            (objective(part, torch.tensor(0.5))["loss"].sum() / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)
