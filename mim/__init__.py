"""mimstream: masked image modeling on streaming WebDataset shards.

A run = stream -> [tokenizer] -> objective(encoder) -> one loop.

Shape legend, used by every comment of the form `# (B, N, D)`:
B batch, V global views, C channels, H x W pixels, h x w grid of patches, N = h * w patches (row-major), K kept patches,
M masked patches, R prefix tokens (class and registers), D width, P = C * patch_size**2 pixel values of a patch.
"""

__version__ = "0.1.0"
