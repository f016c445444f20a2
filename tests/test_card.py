"""The verdict on a tokenizer: the worst number decides, in words that a user can act on."""

import math

import pytest

from tokenizer.card import AMBER, GREEN, RED, verdict

GOOD = {"usage": 0.95, "perplexity": 400.0, "distinct": 0.8, "surprise": 0.99, "recon_mae": 0.05}


@pytest.mark.parametrize(
    ("changes", "colour", "words"),
    [
        ({}, GREEN, "95% of the codes are used"),
        ({"usage": 0.5}, AMBER, "50% of the codes are used, less than 60%"),
        ({"usage": 0.5, "perplexity": 12.0}, RED, "12 is the perplexity of 512 codes, less than 26"),
        ({"distinct": 0.01}, RED, "1% of neighbouring patches have different codes, less than 2%"),
        ({"surprise": 0.1}, RED, "10% of the patches do not have the most frequent code, less than 30%"),
        ({"perplexity": math.nan}, RED, "its score card holds values that are not finite"),
    ],
)
def test_the_worst_number_decides(changes, colour, words):
    found, reason = verdict(GOOD | changes, 512)
    assert found == colour
    assert words in reason


def test_a_collapsed_codebook_of_8192_is_red():
    assert verdict({"usage": 0.3, "perplexity": 212.0}, 8192)[0] == RED


def test_without_numbers_there_is_no_praise():
    assert verdict({}, 512) == (AMBER, "its file holds no score card")
