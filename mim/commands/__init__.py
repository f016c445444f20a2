"""Commands of `mim`, one file each; `mim/__main__.py` collects them."""
