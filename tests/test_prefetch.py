import json
import threading
import time

import pytest
import torch
import yaml
from fault_server import FaultServer, cut, serve_dataset, status

from mim import train
from mim.contracts import StorageError
from mim.data import prefetch
from mim.data.augment import center
from mim.data.order import Order, Plan
from mim.data.prefetch import Prefetcher
from mim.data.shards import Dataset
from mim.data.stream import loader
from mim.watch import stopping


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def dataset(shards, server, tmp_path):
    """The training set with its shards on the server, and an empty cache."""
    folder = serve_dataset(server, shards / "train", tmp_path / "dataset")
    return Dataset.open(folder, cache_dir=tmp_path / "cache")


def shard_by_shard(dataset):
    """An order in which a shard is left before the next one begins."""
    return Order(dataset.id, dataset.counts, seed=0, lanes=1, window=1)


def remote(dataset):
    return {"shards": dataset.remote_shards, "cache": dataset.cache}


def asked(server):
    """The shards that were asked for, in order of their first request."""
    return [path for path in server.requests if server.count(path)]


def in_order_of_use(dataset, order, plan):
    positions = [position for micro in plan for position in micro.positions]
    return [f"/shard-{shard:05d}.tar" for shard in dict.fromkeys(order.locate(positions).shard.tolist())]


def wait_until(fact):
    for _ in range(500):
        if fact():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_shards_of_the_next_micro_batches_are_fetched_in_the_order_of_their_use(dataset, server):
    order = shard_by_shard(dataset)
    plan = Plan(1, 4, num_steps=len(dataset) // 4, position=8)
    prefetcher = Prefetcher(plan, order, **remote(dataset))
    batches = iter(prefetcher)
    next(batches)
    expected = in_order_of_use(dataset, order, plan)
    assert len(expected) > 2
    wait_until(lambda: len(asked(server)) == len(expected))
    assert asked(server) == expected
    batches.close()


def test_it_hands_out_the_micro_batches_of_the_plan(dataset):
    plan = Plan(1, 4, num_steps=5)
    handed = list(Prefetcher(plan, shard_by_shard(dataset), **remote(dataset)))
    assert len(Prefetcher(plan, shard_by_shard(dataset), **remote(dataset))) == len(plan) == len(handed)
    assert [micro.positions.tolist() for micro in handed] == [micro.positions.tolist() for micro in plan]


def test_it_stays_within_its_bytes_until_the_loader_moves(dataset, server):
    order = shard_by_shard(dataset)
    plan = Plan(1, 1, num_steps=len(dataset))
    expected = in_order_of_use(dataset, order, plan)
    largest = max(shard.size for shard in dataset.remote_shards.values())
    batches = iter(Prefetcher(plan, order, **remote(dataset), max_bytes=largest))
    next(batches)
    wait_until(lambda: len(asked(server)) == 1)
    time.sleep(0.1)
    assert asked(server) == expected[:1]
    first = order.locate([0]).shard[0]
    for position in range(1, len(dataset)):  # to the first sample of the second shard
        next(batches)
        if order.locate([position]).shard[0] != first:
            break
    wait_until(lambda: len(asked(server)) == 2)
    batches.close()


def test_it_takes_at_most_half_of_the_cache(dataset):
    dataset.cache.limit = 1000
    assert Prefetcher(Plan(1, 4), shard_by_shard(dataset), **remote(dataset)).max_bytes == 500


def test_it_stays_within_its_micro_batches(dataset, server, monkeypatch):
    monkeypatch.setattr(prefetch, "MAX_MICRO_BATCHES", 2)
    batches = iter(Prefetcher(Plan(1, 1, num_steps=len(dataset)), shard_by_shard(dataset), **remote(dataset)))
    next(batches)
    wait_until(lambda: len(asked(server)) == 1)
    time.sleep(0.1)
    assert len(asked(server)) == 1
    batches.close()


def test_its_thread_ends_with_the_iteration(dataset):
    before = len(threads())
    batches = iter(Prefetcher(Plan(1, 4, num_steps=100), shard_by_shard(dataset), **remote(dataset), max_bytes=1))
    next(batches)
    assert len(threads()) == before + 1
    batches.close()
    wait_until(lambda: len(threads()) == before)
    list(Prefetcher(Plan(1, 4, num_steps=3), shard_by_shard(dataset), **remote(dataset)))
    wait_until(lambda: len(threads()) == before)


def test_what_it_cannot_fetch_is_told_by_the_reader_alone(dataset, server, capfd):
    order = shard_by_shard(dataset)
    plan = Plan(1, 4, num_steps=len(dataset) // 4)
    missing, *others = in_order_of_use(dataset, order, plan)
    server.put(missing, b"", then=status(404))
    batches = iter(Prefetcher(plan, order, **remote(dataset)))
    micro = next(batches)
    wait_until(lambda: len(asked(server)) == len(others) + 1)
    assert "".join(capfd.readouterr()) == ""
    slots = order.locate(micro.positions)
    with pytest.raises(StorageError, match=rf"{missing}: the server answers 404"):
        dataset.read(slots.shard[0], slots.row[0])
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_a_remote_dataset_gives_the_batches_of_the_local_one(dataset, shards, server, workers):
    def batches(source):
        order = Order(source.id, source.counts, seed=3)
        options = {"view": center, "sizes": [(16, 16)], "batch_size": 8, "num_steps": 6, "workers": workers}
        return list(loader(source, order=order, **options))

    found, expected = batches(dataset), batches(Dataset.open(shards / "train"))
    assert [batch["keys"] for batch in found] == [batch["keys"] for batch in expected]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(found, expected, strict=True))
    assert {len(requests) for requests in server.requests.values()} == {1}


def test_a_loader_waits_for_its_workers_longer_than_the_store_for_a_server(dataset, shards):
    def timeout(source, **options):
        order = Order(source.id, source.counts, seed=3)
        options = {"view": center, "sizes": [(16, 16)], "batch_size": 8, "num_steps": 6, "workers": 1, **options}
        return loader(source, order=order, **options).timeout

    largest = max(shard.size for shard in dataset.remote_shards.values())
    assert timeout(dataset, timeout=1) > dataset.cache.remote.patience.until(largest)
    assert timeout(dataset, timeout=0) == 0
    assert timeout(Dataset.open(shards / "train"), timeout=1) == 1


@pytest.mark.slow
def test_a_run_over_a_faulty_server_has_the_losses_of_a_run_over_local_shards(shards, recipe, server, tmp_path):
    def faults(body):
        return [status(503), cut(1000), cut(len(body) // 2, length=False), cut(10_000, reset=True)]

    def losses(name, path):
        sections = recipe("mae")
        sections["data"]["path"] = str(path)
        sections["optim"]["length"] = "12 steps"
        machine = {"run": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "cache_limit": 1.0}
        sections["train"] = {"workers": 2, "cpu": True, "log_every": "1 steps", **machine}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(sections))
        assert train.main(str(tmp_path / f"{name}.yaml"), []) == stopping.DONE
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [(line["loss"], line["fingerprint"]) for line in lines if "loss" in line]

    faulty = serve_dataset(server, shards / "train", tmp_path / "faulty", faults=faults)
    found, expected = losses("remote", faulty), losses("local", shards / "train")
    assert len(expected) == 12
    assert found == expected
    assert {tuple(fired) for fired in server.fired.values()} == {("status 503", "cut", "cut", "reset")}
