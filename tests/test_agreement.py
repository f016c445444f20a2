"""The judgement over the rows of the ranks."""

import copy

import pytest

from mim.clusters.agreement import SKEW, judge, ranks_text

ROW = {
    "rank": 0,
    "node": "0",
    "host": "a",
    "gpu": None,
    "clock": 0.0,
    "problems": [],
    "locks": {"shards/x": "1" * 64},
    "facts": {"sources": "5" * 64, "versions": {"torch": "2.15.0", "timm": "1.0.31"}},
}


def rows(*, hosts=("a", "a", "b", "b"), gpus=False):
    """Healthy rows, two ranks on each host."""
    found = []
    for rank, host in enumerate(hosts):
        gpu = f"GPU-{rank % 2}" if gpus else None
        found.append(copy.deepcopy(ROW) | {"rank": rank, "host": host, "node": host, "gpu": gpu})
    return found


def test_ranks_that_agree_have_no_problem():
    assert judge(rows()) == []
    assert judge(rows(gpus=True)) == []


@pytest.mark.parametrize(("seconds", "way"), [(2 * SKEW, "ahead of"), (-2 * SKEW, "behind")])
def test_a_clock_that_differs_is_named_once_per_node(seconds, way):
    found = rows()
    for row in found[2:]:
        row["clock"] = seconds
    (line,) = judge(found)
    assert line.startswith(f"the clock of b (rank 2) is 10 s {way} that of a")


def test_a_clock_within_the_time_of_a_message_is_no_problem():
    found = rows()
    found[3]["clock"] = 0.5
    assert judge(found) == []


def test_another_version_is_named():
    found = rows()
    for row in found[2:]:
        row["facts"]["versions"]["timm"] = "1.0.20"
    assert judge(found) == ["b (rank 2) has timm 1.0.20 instead of 1.0.31; install the same on all nodes"]


def test_another_lock_is_named_with_its_folder():
    found = rows()
    for row in found[2:]:
        row["locks"]["shards/x"] = "2" * 64
    (line,) = judge(found)
    assert "b (rank 2) has another dataset lock in shards/x: sha256 222222222222 instead of 111111111111" in line


def test_two_ranks_on_one_gpu_are_named():
    found = rows(gpus=True)
    found[3]["gpu"] = found[2]["gpu"]
    (line,) = judge(found)
    assert line.startswith("ranks 2-3 on b would use the same GPU GPU-0")


def test_a_problem_of_several_ranks_is_told_once():
    found = rows()
    for row in found[:2]:
        row["problems"] = ["/dev/shm is small"]
    assert judge(found) == ["ranks 0-1 on a: /dev/shm is small"]


def test_ranks_are_told_in_spans():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([8, 1, 2, 3, 5]) == "ranks 1-3, 5, 8"
