"""What the ranks of a launch must have in common, judged from what each told of itself (mim/clusters/cluster.py).

Pure functions of plain rows; the row of rank 0 is the measure. A node is a host with a node number.
"""

from __future__ import annotations

from typing import Any

SKEW = 5.0  # seconds between two clocks; leases of run directories and the names of logs go by them


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a launch: each sentence once, with the ranks or the node that it is true of."""
    said: dict[str, list[int]] = {}
    for row in rows:
        for line in row["problems"]:
            said.setdefault(f"{row['host']}: {line}", []).append(row["rank"])
    lines = [f"{ranks_text(ranks)} on {line}" for line, ranks in said.items()]
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        nodes.setdefault((row["host"], row["node"]), row)
    first, *others = nodes.values()
    return lines + [line for row in others for line in differences(first, row)] + shared_gpus(rows)


def differences(first: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """In what a node differs from the first one that would make them train something else, or fail later."""
    where, there = f"{row['host']} (rank {row['rank']})", first["host"]
    lines = []
    if row["facts"]["sources"] != first["facts"]["sources"]:
        lines.append(
            f"{where} runs other code than {there}: sources {row['facts']['sources'][:12]} instead of "
            f"{first['facts']['sources'][:12]}; install the same on both, or share one installation"
        )
    for name, expected in first["facts"]["versions"].items():
        found = row["facts"]["versions"].get(name)
        if found != expected:
            lines.append(f"{where} has {name} {found} instead of {expected}; install the same on all nodes")
    for folder, lock in first.get("locks", {}).items():
        other = row.get("locks", {}).get(folder)
        if None not in (lock, other) and lock != other:
            lines.append(
                f"{where} has another dataset lock in {folder}: sha256 {other[:12]} instead of {lock[:12]}; copy the "
                f"folder from {there}, or share it"
            )
    if abs(row["clock"]) > SKEW:
        way = "ahead of" if row["clock"] > 0 else "behind"
        lines.append(
            f"the clock of {where} is {abs(row['clock']):.0f} s {way} that of {there}; let both follow a time server "
            f"(chronyc tracking)"
        )
    return lines


def shared_gpus(rows: list[dict[str, Any]]) -> list[str]:
    """GPUs that more than one rank would use."""
    users: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["gpu"] is not None:
            users.setdefault((row["host"], row["gpu"]), []).append(row["rank"])
    return [
        f"{ranks_text(ranks)} on {host} would use the same GPU {gpu}; start one process per GPU, with LOCAL_RANK set"
        for (host, gpu), ranks in users.items()
        if len(ranks) > 1
    ]


def ranks_text(ranks: list[int]) -> str:
    """`rank 3` or `ranks 3, 5-8`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank, rank])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"
