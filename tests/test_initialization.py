"""Initialisations of our own."""

import torch
from timm.layers import Attention
from torch import nn

from mim.initialization import tie_keys_to_queries


def test_a_token_attends_most_to_tokens_like_itself_and_values_stay():
    torch.manual_seed(0)
    block = nn.Module()
    block.attn = Attention(32, num_heads=1)
    before = block.attn.qkv.weight.detach().clone()
    tie_keys_to_queries([block], 2.0)
    queries, keys, values = block.attn.qkv.weight.detach().chunk(3)
    assert torch.equal(keys, queries)
    assert torch.equal(queries, 2 * before[:32])
    assert torch.equal(values, before[64:])
    tokens = torch.nn.functional.normalize(torch.randn(16, 32), dim=1)
    scores = (tokens @ queries.T) @ (tokens @ keys.T).T  # (16, 16)
    assert torch.equal(scores.argmax(dim=1), torch.arange(16))
