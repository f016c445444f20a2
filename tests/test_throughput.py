"""The benchmark of a step: a small run of it."""

import json

import pytest

from benchmarks import steps, throughput

SMALL = ["encoder.width=32", "encoder.depth=2", "encoder.num_heads=2"]
QUICK = ["--cpu", "--batch-size", "2", "--rounds", "2", "--steps", "1", "--warmup", "1"]


@pytest.fixture
def quick_peak(monkeypatch):
    monkeypatch.setattr(throughput.rounds, "peak_shapes", lambda *_: [(64, 64, 64)])
    monkeypatch.setattr(throughput.rounds, "LEAST", 1e-4)


def test_a_run_tells_speed_operations_split_and_the_largest_costs(quick_peak, tmp_path, capsys):
    file = tmp_path / "found.json"
    throughput.main(["mae", "beit-codes", *QUICK, "--profile", "--json", str(file), "--set", *SMALL])
    found = json.loads(file.read_text())
    assert list(found["variants"]) == ["mae tiny, fp32", "beit-codes tiny, fp32"]
    for row in found["variants"].values():
        assert len(row["seconds"]) == 2
        assert row["images_per_s"]["low"] <= row["images_per_s"]["median"] <= row["images_per_s"]["high"]
        assert row["split_s"].keys() == set(steps.PHASES)
        assert row["split_s"]["forward"] > 0 < row["split_s"]["backward"]
        share = row["gflop_per_image"] * 1e9 * 2 / row["seconds"][0]
        assert row["mfu"]["low"] > 0 < share
        assert row["memory_bytes"] > 2**20
        costs = [cost["share"] for cost in row["profile"]]
        assert costs == sorted(costs, reverse=True)
        assert 0 < sum(costs) <= 1.001
    assert "own time of operators" in capsys.readouterr().out


def test_batches_of_the_real_loader_are_waited_for(quick_peak, shards):
    options = ["--data", str(shards), "--set", *SMALL, "train.workers=0", "data.val_ratio=0"]
    (row,) = throughput.main(["mae", *QUICK, *options])["variants"].values()
    assert row["data_wait"] > 0
