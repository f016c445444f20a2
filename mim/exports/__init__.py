"""Export targets: each file offers Config and export(loaded, out, cfg) -> report."""
