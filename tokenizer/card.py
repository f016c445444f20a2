"""The score card of a tokenizer and its verdict: is it good enough to spend a pretraining on?

The numbers are measured on held-out images (`mim eval codebook`) and written into the tokenizer's own file. The limits
are ours: a tokenizer that fails a red one tells masked prediction next to nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

RED, AMBER, GREEN = "red", "amber", "green"


class Limit(NamedTuple):
    """Values of a number from which a tokenizer is green, and below which it is red; `share` scales both by K."""

    name: str
    red: float
    green: float
    meaning: str
    share: bool = False


LIMITS = [
    Limit("usage", 0.2, 0.6, "of the codes are used"),
    Limit("perplexity", 0.05, 0.25, "is the perplexity", share=True),
    Limit("distinct", 0.02, 0.1, "of neighbouring patches have different codes"),
    Limit("surprise", 0.3, 0.6, "of the patches do not have the most frequent code"),
]


def verdict(card: dict[str, float], num_codes: int) -> tuple[str, str]:
    """The colour of a card, and the number that decides it in words. A card without numbers is amber."""
    known = [(limit, card[limit.name]) for limit in LIMITS if limit.name in card]
    if not known:
        return AMBER, "its file holds no score card"
    if not all(math.isfinite(value) for _, value in known):
        return RED, "its score card holds values that are not finite"
    for colour, bound in ((RED, "red"), (AMBER, "green")):
        for limit, value in known:
            wanted = getattr(limit, bound) * (num_codes if limit.share else 1)
            if value < wanted:
                shown, least = (f"{v:.0f}" if limit.share else f"{v:.0%}" for v in (value, wanted))
                of = f" of {num_codes} codes" if limit.share else ""
                return colour, f"{shown} {limit.meaning}{of}, less than {least}"
    return GREEN, ", ".join(
        f"{value:.0f} {limit.meaning}" if limit.share else f"{value:.0%} {limit.meaning}" for limit, value in known
    )
