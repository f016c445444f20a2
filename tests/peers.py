"""Other libraries' vision transformers as references: how near values must be. Names: benchmarks/peer_models.py."""

import torch


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
