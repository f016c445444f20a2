"""The run directory: checkpoints written, kept, verified and resumed from."""
