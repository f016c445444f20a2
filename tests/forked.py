"""Two ranks and more as forks of the test: everything is imported already, so they start at once."""

import json
import multiprocessing

import torch.distributed as dist


def ranks(count, work, folder):
    """`work(rank)` on each rank of a gloo group; returns what it returned (JSON), by rank."""

    def main(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
        (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
        dist.barrier()
        dist.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
