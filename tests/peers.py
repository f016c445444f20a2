"""Other libraries' vision transformers as references: their weights under our names, and how near values must be."""

import torch

BLOCKS = [
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.o_proj", "attn.proj"),
    ("attention.q_proj", "attn.qkv"),
    ("lambda_1", "ls1.gamma"),
    ("lambda_2", "ls2.gamma"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
]  # transformers -> timm


def renamed(state, renames):
    """Tensors of transformers under our names (pairs old, new), with query, key and value as one; no key bias is 0."""
    found = {}
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state.get(name.replace("q_proj", f"{part}_proj"), torch.zeros_like(value)) for part in "qkv"]
            value = torch.cat(parts)
        for old, new in [*renames, *BLOCKS]:
            name = name.replace(old, new)
        found[name] = value
    return found


@torch.no_grad()
def shake(module):
    """Draw every trained parameter anew: tokens and biases start at zero, and each must count."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def distance(found, reference):
    """Largest difference in units of the reference's largest entry."""
    return ((found - reference).abs().max() / reference.abs().max()).item()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
