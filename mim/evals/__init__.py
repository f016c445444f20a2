"""Evaluations: each file offers Config and run(loaded, cfg) -> (name, value) pairs."""
