"""The reliability bench: faults are injected, proven, and judged, for our data plane and for the usual recipe alike.

fixtures   samples whose id is in their pixels     verdicts     pass, loud, silent, hang
readers    the two adapters, as subprocesses run them    cases_*   the faults, by group
trials     a reader in a process of its own, under a time limit, on a small disk if asked
serving    shards on a server that fails, and how each reader is pointed at them
"""
