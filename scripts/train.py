"""Twin of `accelerate launch -m mim train ...`: `accelerate launch scripts/train.py RECIPE key=value ...`."""

import sys

from mim.__main__ import main

sys.argv.insert(1, "train")
main()
