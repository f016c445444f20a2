"""The reliability bench: faults are injected, proven, and judged, for ours and for the usual recipe alike.

fixtures   samples whose id is in their pixels     verdicts     pass, loud, silent, hang
readers    the two adapters, as subprocesses run them    cases_*   the faults, by group
trainers   the same two, training                  training     tiny trainings, and what they end with
faults     a kill, a signal, a failing disk at a named place of a training process
trials     a reader in a process of its own, under a time limit, on a small disk if asked
serving    shards on a server that fails, and how each reader is pointed at them
"""
