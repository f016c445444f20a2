"""The probes as users run them: in the loop of a training, and by `mim eval` on one process and on two."""

from tests.test_cli import mim, trained  # noqa: F401  (fixtures)
from tests.test_eval_command import evaluated, torchrun
from tests.test_train import dataset, lines, recipe, run  # noqa: F401  (dataset is a fixture)

QUICK = {
    "linear": ("layers=[1,-1]", "min_updates=20", "epochs=1", "base_lrs=[0.01,0.1]", "weight_decays=[0.0]"),
    "attentive": ("min_updates=10", "epochs=1", "base_lrs=[0.01,0.1]", "weight_decays=[0.0]"),
    "fewshot": ("shots=[1]", "draws=2"),
}


def test_probes_run_in_the_loop(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path, data__val_path=str(dataset))
    every = [f"evals.{name}.every=7 steps" for name in QUICK]
    run(path, tmp_path / "run", *every, *(f"evals.{name}.{option}" for name in QUICK for option in QUICK[name]))
    told = {entry["eval"]: entry for entry in lines(tmp_path / "run") if entry["event"] == "eval"}
    for name, key in (("linear", "linear"), ("attentive", "attentive"), ("fewshot", "fewshot_1")):
        assert 0 <= told[name][key] <= 1


def test_two_processes_give_the_numbers_of_one(mim, trained):  # noqa: F811
    options = ("linear", trained, "batch_size=7", *QUICK["linear"])
    one = evaluated(mim, *options)
    assert one["linear"] > 0.3
    assert torchrun(*options) == one
