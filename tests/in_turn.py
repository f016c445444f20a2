"""Train recipes one after another in one launch: `python -m tests.in_turn OUT KEY=VALUE RECIPE ...`."""

import sys
from pathlib import Path

from mim import train


def main(out: str, override: str, *recipes: str) -> None:
    for recipe in recipes:
        assert train.main(recipe, [f"train.run={Path(out) / Path(recipe).stem}", override]) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
