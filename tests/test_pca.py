"""The picture of principal components: exact, of one sign, and of all images together."""

import numpy as np
import torch
from PIL import Image

from mim.evals import pca
from mim.evals.pca import Config, colours, components


def test_components_are_exact_and_their_signs_do_not_depend_on_the_order_or_the_sign_of_a_basis():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    found = components(features)
    covariance = torch.cov(features.T.double())
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert torch.allclose(found.var(dim=0), values[:3])
    order = torch.randperm(50)
    assert torch.allclose(components(features[order]), found[order])
    directions = torch.linalg.lstsq(features.double() - features.double().mean(0), found).solution  # (6, 3)
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_few_features_have_colours_too():
    assert components(torch.randn(5, 2)).shape == (5, 3)
    assert colours(torch.zeros(5, 3)).isfinite().all()


def test_an_object_amid_a_background_is_the_foreground_whatever_the_sign(loaded_run, tmp_path, monkeypatch):
    """Features of a planted object; the picture shows it in colour and the rest white."""
    loaded = loaded_run("mae")
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    planted = torch.zeros(1, 16, 8)
    planted[:, :, 1] = torch.linspace(0, 0.1, 16)
    for sign in (1, -1):
        planted[0, [5, 6, 9, 10], 0] = sign * torch.tensor([4.0, 4.1, 4.2, 4.3])

        def layers(images, indices, norm):
            return [type("Features", (), {"patches": planted})]

        monkeypatch.setattr(loaded.encoder, "layers", layers)
        ((name, picture),) = pca.run(loaded, Config(images=[str(tmp_path / "plain.png")], height=32))
        foreground = np.asarray(picture)[34:66, -36:-4]
        inside = (foreground != 255).any(axis=2)[4::8, 4::8]  # a pixel of each patch
        assert name == "pca"
        assert inside.flatten().nonzero()[0].tolist() == [5, 6, 9, 10]
