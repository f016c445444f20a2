"""Frozen features of labelled and unlabelled samples, and the probes fitted to them."""
