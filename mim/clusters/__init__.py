"""Machines: whether they agree on the run, and the scripts that start it on them."""
