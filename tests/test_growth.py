"""What must not grow: the loader with the entries of its dataset, the loop with its steps. Bytes and counts."""

import gc
import logging
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import shapes, write_recipe

from mim import guard, train
from mim.data import shards, stages, stream
from mim.data.order import Order
from mim.data.shards import Dataset, index_dtype

MIB = 2**20


class Traced:
    """Memory that Python and NumPy took inside a `with`: what stays, and the most there was."""

    def __enter__(self):
        gc.collect()
        tracemalloc.start()
        self.before = tracemalloc.take_snapshot()
        self.bytes_before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        return self

    def __exit__(self, *_):
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        self.kept, self.peak = now - self.bytes_before, peak - self.bytes_before
        self.blocks = sum(found.count_diff for found in tracemalloc.take_snapshot().compare_to(self.before, "filename"))
        tracemalloc.stop()


def lock_of(num_shards, count=1000):
    """A lock of local shards as it comes from its file."""
    shards = [
        {"file": f"shard-{i:06d}.tar", "size": 2_048_000, "sha256": f"{i:064x}", "count": count}
        for i in range(num_shards)
    ]
    schema = {"members": {"image": ["jpg"]}, "classes": None}
    return {"dataset_id": "d", "shards": shards, "schema": schema, "statistics": {"mean": [0.5] * 3, "std": [0.2] * 3}}


def test_a_dataset_of_ten_million_samples_has_no_more_objects_than_one_of_a_hundred_thousand():
    found = {}
    for num_shards in (100, 10_000):
        lock = lock_of(num_shards)
        Dataset(Path("/data"), lock)  # what is imported or cached on the way is no dataset's
        with Traced() as traced:
            dataset = Dataset(Path("/data"), lock)
        found[num_shards] = traced
        assert len(dataset) == 1000 * num_shards
    assert abs(found[10_000].blocks - found[100].blocks) < 20
    assert found[10_000].kept < 130 * 10_000  # bytes; the strings of its columns take 60


def test_indices_of_any_number_of_shards_hold_no_descriptors_and_few_mappings(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MAPPED", 20)
    num_shards = 50
    for i in range(num_shards):
        np.save(tmp_path / f"shard-{i:06d}.npy", np.full(2, i, dtype=index_dtype(["image"])))
    dataset = Dataset(tmp_path, lock_of(num_shards, count=2))
    descriptors = len(os.listdir("/proc/self/fd"))
    assert [dataset.index(shard)["key"].tolist() for shard in range(num_shards)] == [[i, i] for i in range(num_shards)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(tmp_path) in line for line in maps) == 20


def test_an_order_of_a_hundred_million_samples_takes_little_memory_wherever_it_begins():
    counts = np.full(100_000, 1000)
    with Traced() as traced:
        order = Order("d", counts, seed=0)
        for position in (0, 150_000_000):
            order.locate(np.arange(position, position + 4096))
    assert traced.peak < 12 * MIB  # of which the counts of the shards and their permutations are 8


def test_a_full_permutation_is_kept_for_two_epochs_and_in_four_bytes_a_sample():
    order = Order("d", [100_000], seed=0)
    with Traced() as traced:
        for epoch in range(6):
            order.locate([epoch * 100_000])
    assert traced.kept < 2 * 4 * 100_000 + 20_000


class Enormous:
    """Stands in for a dataset; only its length is asked for."""

    id, path = "d", Path("/nowhere")

    def __len__(self):
        return 10**8


def test_choosing_samples_for_an_evaluation_takes_memory_for_those_alone():
    with Traced() as traced:
        chosen = stream.evaluated(Enormous(), limit=2000)
    assert len(set(chosen.tolist())) == 2000
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] < 10**6  # spread over the whole dataset
    assert 10**8 - 10**6 < chosen[-1] < 10**8
    assert chosen.tolist() == stream.evaluated(Enormous(), limit=2000).tolist()
    assert chosen.tolist() != stream.evaluated(Enormous(), limit=2000, seed=1).tolist()
    assert traced.peak < MIB


# ---- the loop ------------------------------------------------------------------------------------


def objects_within(*roots):
    """How many objects can be reached from some, without types, modules and the records that pytest keeps."""
    left_out = (type, type(sys), logging.Handler)
    modules = {id(vars(module)) for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    seen, ahead = {}, list(roots)
    while ahead:
        found = ahead.pop()
        if id(found) not in seen and id(found) not in modules and not isinstance(found, left_out):
            seen[id(found)] = found  # held, or another would get its id
            ahead += gc.get_referents(found)
    return len(seen)


def variables_of_the_loop():
    """Those of the `fit` that called."""
    frame = sys._getframe()
    while frame.f_code is not train.fit.__code__:
        frame = frame.f_back
    return dict(frame.f_locals)


@pytest.fixture
def small_windows(monkeypatch):
    """What is remembered of a number of steps is full after 10."""
    monkeypatch.setattr(guard, "REMEMBERED", 10)
    monkeypatch.setattr(stages, "WINDOW", 10)


def test_what_the_loop_remembers_does_not_grow_with_its_steps(small_windows, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", {"path": str(shapes(tmp_path))}, "52 steps")
    found = {}

    def stop(step):
        if step in (26, 50):  # alike: two steps after a log and a save
            variables = variables_of_the_loop()
            variables["saver"].wait()
            found[step] = objects_within(*variables.values())

    options = ["optim.ema=0.9", "optim.batch_size=12", "train.guard.window=3"]
    intervals = ["train.log_every=4 steps", "train.save_every=6 steps"]
    train.main(path, [f"train.run={tmp_path / 'run'}", *options, *intervals], stop=stop)
    assert found[26] > 1000
    assert abs(found[50] - found[26]) < 12  # half an object a step
