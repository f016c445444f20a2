"""Weights that others made or another run left: files, layouts, resampled positions."""
