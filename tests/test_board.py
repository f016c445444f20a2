"""Notes of ranks."""

import threading
import time

import torch.distributed as dist

from mim.watch.board import Board


def test_the_first_note_stands_where_only_the_first_counts():
    board = Board(dist.HashStore(), 0, 1)
    assert board.get("end") is None
    assert board.first("end", "one") == "one"
    assert board.first("end", "two") == "one"
    board.put("end", "three")
    assert board.get("end") == "three"


def test_the_notes_of_all_ranks_are_there_when_the_last_has_written():
    store = dist.HashStore()
    first, second = (Board(store, rank, 2) for rank in range(2))
    second.put_mine("step", "7")
    assert first.of_all("step") is None
    first.put_mine("step", "8")
    assert first.of_all("step") == second.of_all("step") == ["8", "7"]


def test_the_main_rank_goes_first_however_long_it_takes():
    store = dist.HashStore()
    order = []

    def go(rank):
        with Board(store, rank, 3).main_first("data"):
            time.sleep(0.3 * (rank == 0))
            order.append(rank)

    threads = [threading.Thread(target=go, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]
