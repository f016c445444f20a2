"""Heads side by side: each is what it would be alone, its optimizer is the published one, and draws have names."""

import pytest
import timm.optim
import torch
import torch.nn.functional as F

from mim.config import ConfigError
from mim.evals.attentive import AttentiveHeads
from mim.evals.linear import LinearHeads
from mim.probing import sweep
from mim.probing.bank import Bank
from mim.probing.probes import Samples, samples
from mim.probing.sweep import Entry, Normalise, Plan, Rate, best_of, grid, judge, score, train

CPU = torch.device("cpu")
RATES = [Rate(0.02, 0.0), Rate(0.2, 0.1), Rate(1.0, 0.5)]


def clusters(num, classes=3, shape=(8,), spread=0.3, seed=0, name="train"):
    """A bank of separable classes, of vectors or of patches."""
    centres = 3 * torch.randn(classes, shape[-1], generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    x = centres[labels].reshape(num, *[1] * (len(shape) - 1), shape[-1])
    x = 5 + x + spread * torch.randn(num, *shape, generator=generator)
    return Bank([f"{name}.tar/{i}" for i in range(num)], labels, {"-1/mean": x})


def both(**options):
    return samples(clusters(90, **options), clusters(60, seed=1, name="val", **options), where="a test")


def a_plan(optimizer="adamw", **changes):
    options = {"batch_size": 16, "epochs": 3, "min_updates": 0, "warmup_ratio": 0.2, "seed": 0, **changes}
    return Plan(optimizer, **options)


def make(kind, rates, width=8):
    if kind == "linear":
        return LinearHeads(width, 3, rates, name=("-1/mean", 0))
    return AttentiveHeads(width, 3, rates, num_heads=2, name=("-1/mean", 0))


# ---- side by side --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_stacked_sweep_equals_the_heads_trained_one_by_one(kind, optimizer):
    found, _ = both(shape=(8,) if kind == "linear" else (5, 8))
    together = make(kind, RATES)
    train({"-1/mean": together}, found, a_plan(optimizer), title="test")
    for i, rate in enumerate(RATES):
        alone = make(kind, [rate])
        untrained = [p.detach().clone() for p in alone.parameters()]
        train({"-1/mean": alone}, found, a_plan(optimizer), title="test")
        for one, stacked, before in zip(alone.parameters(), together.parameters(), untrained, strict=True):
            assert torch.allclose(stacked[i], one[0], atol=1e-5)
            assert not torch.equal(one, before)


def test_columns_do_not_feel_each_other():
    found, _ = both()
    found.columns["-2/mean"] = found.columns["-1/mean"].flip(1) ** 2
    heads = {column: make("linear", RATES) for column in found.columns}
    train(heads, found, a_plan(), title="test")
    alone = make("linear", RATES)
    train({"-1/mean": alone}, found, a_plan(), title="test")
    assert torch.equal(heads["-1/mean"].weight, alone.weight)
    assert not torch.equal(heads["-2/mean"].weight, alone.weight)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_blocks_of_rows_add_up_to_the_batch(kind, monkeypatch):
    found, val = both(shape=(8,) if kind == "linear" else (5, 8))
    whole, parts = make(kind, RATES), make(kind, RATES)
    x, labels = found.features("-1/mean", CPU), found.labels
    losses = whole.learn(x, labels)
    monkeypatch.setattr(sweep, "NUMBERS_AT_ONCE", 7 * parts.numbers_per_row)
    assert len(parts.blocks(len(x))) == 13
    assert torch.allclose(parts.learn(x, labels), losses, atol=1e-6)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert torch.allclose(score(parts.eval(), val, "-1/mean", 16), score(whole.eval(), val, "-1/mean", 60))


# ---- optimizers ----------------------------------------------------------------------------------


def updated(make_optimizer, weight, bias, gradients):
    """Weights after the updates of a reference optimizer."""
    weight, bias = (torch.nn.Parameter(p.clone()) for p in (weight, bias))
    optimizer = make_optimizer(weight, bias)
    for by_weight, by_bias in gradients:
        weight.grad, bias.grad = by_weight.clone(), by_bias.clone()
        optimizer.step()
    return weight.detach(), bias.detach()


def references(kind, lr, decay):
    if kind == "adamw":
        options = {"lr": lr, "betas": (0.9, 0.95)}
        return lambda w, b: torch.optim.AdamW(
            [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}], **options
        )
    return lambda w, b: timm.optim.Lars(
        [{"params": [w], "always_adapt": True}, {"params": [b], "always_adapt": False}], lr=lr, momentum=0.9
    )  # its decay enters the trust ratio in another way than MAE's


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_an_update_of_a_head_is_that_of_the_library(kind):
    generator = torch.Generator().manual_seed(0)
    heads = make("linear", RATES if kind == "adamw" else [Rate(lr, 0.0) for lr, _ in RATES])
    lr, decay = torch.tensor(heads.rates).unbind(dim=1)
    before = [p.detach().clone() for p in (heads.weight, heads.bias)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in before] for _ in range(4)]
    optimizer = sweep.OPTIMIZERS[kind](heads, lr, decay)
    for step in gradients:
        heads.weight.grad, heads.bias.grad = (g.clone() for g in step)
        optimizer.step(1.0)
    for i, rate in enumerate(heads.rates):
        of_head = [(w[i], b[i]) for w, b in gradients]
        weight, bias = updated(references(kind, *rate), before[0][i], before[1][i], of_head)
        assert torch.allclose(heads.weight[i], weight, atol=1e-6)
        assert torch.allclose(heads.bias[i], bias, atol=1e-6)


def test_decay_enters_the_trust_ratio_of_lars_as_in_mae():
    """|w| = 5, gradient + decay * w = (3, 4) + 1 * (3, 4): of norm 10; one step of rate 2."""
    heads = LinearHeads(2, 1, [Rate(2.0, 1.0)], name=("x",))
    heads.weight.data = torch.tensor([[[3.0, 4.0]]])
    heads.weight.grad, heads.bias.grad = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0.5]])
    sweep.Lars(heads, torch.tensor([2.0]), torch.tensor([1.0])).step(1.0)
    assert heads.weight.flatten().tolist() == pytest.approx([3 - 2 * 0.001 * 0.5 * 6, 4 - 2 * 0.001 * 0.5 * 8])
    assert heads.bias.item() == pytest.approx(-1.0)  # neither scaled nor decayed


# ---- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 4), (10, 6, 4)])
def test_features_are_normalised_as_batch_norm_without_affine_does(shape):
    x = 100 + 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.BatchNorm1d(4, affine=False, eps=1e-6)
    assert torch.allclose(Normalise(4)(x), reference(x.flatten(0, -2)).view(shape), atol=1e-4)


def test_after_training_features_are_normalised_by_all_samples():
    found, _ = both()
    module = Normalise(8).eval()
    module.measure(found, "-1/mean", 16)
    x = found.features("-1/mean", CPU)
    assert torch.allclose(module.mean, x.mean(dim=0), atol=1e-5)
    assert torch.allclose(module.std, x.std(dim=0, correction=0), atol=1e-4)


# ---- draws, length -------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bits_and_another_seed_others():
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)  # the default generator decides nothing
        found, _ = both()
        heads = LinearHeads(8, 3, RATES, name=("-1/mean", seed))
        train({"-1/mean": heads}, found, a_plan(seed=seed), title="test")
        results.append(heads.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_all_heads_of_a_column_start_equal():
    heads = make("attentive", RATES)
    for parameter in heads.parameters():
        assert torch.equal(parameter[0], parameter[1])
    assert heads.query.abs().max() <= 0.04


def updates_of(monkeypatch, **plan):
    factors = []
    step = sweep.AdamW.step
    monkeypatch.setattr(sweep.AdamW, "step", lambda self, factor: factors.append(factor) or step(self, factor))
    train({"-1/mean": make("linear", RATES)}, both()[0], a_plan(**plan), title="test")
    return factors


def test_a_small_dataset_is_gone_through_until_it_has_had_its_updates(monkeypatch):
    assert len(updates_of(monkeypatch, epochs=3)) == 3 * (90 // 16)
    monkeypatch.undo()
    assert len(updates_of(monkeypatch, epochs=3, min_updates=41)) == 45
    monkeypatch.undo()
    assert len(updates_of(monkeypatch, epochs=3, batch_size=1000)) == 3


def test_rates_rise_and_then_fall_to_zero(monkeypatch):
    factors = updates_of(monkeypatch, epochs=4)
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(0.0, abs=1e-9)


# ---- choice --------------------------------------------------------------------------------------


def judged(found, val, rates=RATES, plan=None):
    plan = plan or a_plan(epochs=20)
    return dict(judge(lambda _, r: make("linear", r), found, val, plan, rates=rates, choice_ratio=0.2, title="linear"))


def test_separable_classes_are_all_found():
    assert judged(*both())["linear"] == 1.0


def test_random_labels_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    found, val = (
        Bank([f"{n}/{i}" for i in range(900)], torch.randint(3, (900,), generator=generator),
             {"-1/mean": torch.randn(900, 8, generator=generator)})
        for n in ("train", "val")
    )  # fmt: skip
    assert judged(*samples(found, val, where="a test"), plan=a_plan(batch_size=200))["linear"] == pytest.approx(
        1 / 3, abs=0.06
    )


def test_the_held_out_split_has_no_say_in_the_choice(monkeypatch):
    """With the labels of the held-out split turned round, the same head is chosen, and it is all wrong."""
    found, val = both()
    turned = Samples(val.columns, val.rows, (val.labels + 1) % 3, val.keys, 3)
    right, wrong = judged(found, val), judged(found, turned)
    assert right["linear_lr"] == wrong["linear_lr"]
    assert right["linear_weight_decay"] == wrong["linear_weight_decay"]
    assert (right["linear"], wrong["linear"]) == (1.0, 0.0)
    seen = []
    original = score
    monkeypatch.setattr(sweep, "score", lambda m, s, c, b: seen.append((len(m.rates), s.keys)) or original(m, s, c, b))
    judged(found, val)
    assert [(num, keys == val.keys) for num, keys in seen] == [(3, False), (1, True)]
    assert set(seen[0][1]) < set(found.keys)


def test_the_heads_that_choose_never_learned_what_they_are_scored_on(monkeypatch):
    found, val = both()
    learned, scored = [], []
    learn, tell = sweep.train, sweep.score
    monkeypatch.setattr(sweep, "train", lambda h, s, p, **o: learned.append(set(s.keys)) or learn(h, s, p, **o))
    monkeypatch.setattr(sweep, "score", lambda m, s, c, b: scored.append(set(s.keys)) or tell(m, s, c, b))
    judged(found, val)
    assert learned[0].isdisjoint(scored[0])
    assert learned[0] | scored[0] == learned[1] == set(found.keys)


def test_of_several_columns_the_better_one_is_chosen_and_each_is_told():
    found, val = both()
    for i, part in enumerate((found, val)):
        part.columns = {
            "1/mean": torch.randn(part.columns["-1/mean"].shape, generator=torch.Generator().manual_seed(i)),
            **part.columns,
        }
    told = judged(found, val)
    assert told["linear"] == told["linear_-1/mean"] == 1.0
    assert told["linear_1/mean"] < 0.7


def test_one_setting_of_one_column_needs_no_choice():
    found, val = both()
    assert judged(found.part(torch.arange(3)), val, rates=[Rate(10.0, 0.0)])["linear_lr"] == 10.0


def test_a_head_that_blew_up_is_never_chosen():
    entries = [
        Entry("a", Rate(1.0, 0.0), 0.9, float("nan")),
        Entry("a", Rate(0.1, 0.0), 0.5, 1.0),
        Entry("a", Rate(0.2, 0.0), 0.5, 0.5),
    ]
    assert best_of(entries).rate.base_lr == 0.2


def test_the_end_of_the_sweep_is_said(capsys):
    entries = [Entry("a", Rate(lr, 0.0), accuracy, 1.0) for lr, accuracy in ((0.1, 0.2), (0.2, 0.3), (0.4, 0.5))]
    sweep.report(entries, "linear")
    told = capsys.readouterr().err
    assert "a, weight_decay 0; % by base_lr  0.1: 20.0  0.2: 30.0  0.4: 50.0" in told
    assert "the best base_lr=0.4 is the largest of the sweep; widen base_lrs" in told


def test_a_class_that_only_the_held_out_split_has_is_wrong():
    found, val = both()
    unknown = Samples(val.columns, val.rows, torch.where(torch.arange(60) < 30, -1, val.labels), val.keys, 3)
    assert judged(found, unknown)["linear"] == 0.5


def test_losses_are_mean_cross_entropies():
    found, _ = both()
    heads = make("linear", RATES)
    x, labels = found.features("-1/mean", CPU), found.labels
    logits = heads.scores(heads.normalise(x))[1].T
    assert heads.learn(x, labels)[1] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


@pytest.mark.parametrize(("lrs", "decays"), [([], [0.0]), ([0.1], []), ([-1.0], [0.0])])
def test_an_impossible_grid_is_refused(lrs, decays):
    with pytest.raises(ConfigError, match="must be a list of one or more numbers that are not negative"):
        grid(lrs, decays)
