"""Is it going well? Statistics of features, heads and units, trivial predictions, and advice from the log."""
