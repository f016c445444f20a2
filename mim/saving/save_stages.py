"""The stages that a save passes, named so that a test can kill a rank or fill the disk at any one of them.

`reached` does nothing. The reliability bench puts a function of its own in its place (`save_stages.reached = ...`),
which is why callers write `save_stages.reached(...)` and never import the name itself.
"""

from __future__ import annotations

STAGES = (
    # in the training loop
    "begin",  # every rank: nothing is written yet
    "folder",  # main rank: the temporary folder exists, free space was checked
    "snapshot",  # every rank: the copies of its tensors are taken; the optimizer may go on after this
    # in the writing thread (of every rank)
    "before-tensors",  # every rank: nothing of its tensors is written
    "within-tensors",  # every rank that writes tensors: a part of a file is written
    "after-tensors",  # every rank: its files are written, hashed and synced
    "hashes",  # every rank: sizes and hashes of all ranks are known to all
    # from here on the main rank alone
    "before-state",
    "after-state",  # state.json and a tokenizer's own files are written, hashed and synced
    "before-manifest",
    "after-manifest",  # every file and folder of the temporary is on the disk
    "before-rename",
    "after-rename",  # committed, but the folder above is not synced
    "after-parent",  # the folder above is synced
    "verified",  # the new checkpoint was read again
    "before-prune",
    "within-prune",  # an old checkpoint has lost its name and is about to be deleted
    "after-prune",
)


def reached(stage: str) -> None:
    """Called by a save at each of its stages, on the ranks that pass it, in the thread that does the work."""
