"""The codebook: nearest codes, averages equal to an independent implementation's, revival, k-means, any split alike."""

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from tokenizer import codebook
from tokenizer.codebook import NEVER, Codebook, draw, k_means, merge, nearest


def vectors(b, n, d, seed=0):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


def noise(b, start=0):
    return torch.arange(start, start + b) * 7919 + 1


def a_codebook(num_codes=32, width=8, **options):
    torch.manual_seed(0)
    return Codebook(num_codes, width, **options).train()


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_the_nearest_code_is_the_one_at_the_smallest_distance_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(codebook, "CHUNK", chunk)
    some, codes = vectors(1, 257, 8)[0], vectors(1, 33, 8, seed=1)[0]
    assert torch.equal(nearest(some, codes), torch.cdist(some, codes).argmin(dim=1))


def test_the_gradient_passes_straight_through_and_the_commitment_draws_to_the_code():
    book = a_codebook(unit=False)
    z = vectors(2, 4, 8).requires_grad_()
    found, ids, commitment = book(z, noise(2))
    assert torch.allclose(found, book.codes[ids])
    found.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z))
    z.grad = None
    commitment.sum().backward()
    assert torch.allclose(z.grad, 2 * (z - book.codes[ids]).detach() / 8)


def test_no_gradient_reaches_the_codes():
    assert not list(a_codebook().parameters())


def test_three_updates_equal_those_of_an_independent_implementation():
    ours = a_codebook(num_revived=0)
    oracle = VectorQuantize(8, codebook_size=32, decay=0.99, use_cosine_sim=True, threshold_ema_dead_code=0, eps=0.0)
    oracle._codebook.embed.data.copy_(ours.codes[None])
    oracle._codebook.embed_avg.data.copy_(ours.codes[None])
    oracle.train()
    for step in range(3):
        z = vectors(4, 50, 8, seed=step)
        _, ids, _ = ours(z, noise(4))
        ours.update()
        _, expected, _ = oracle(z)
        assert torch.equal(ids, expected)
        assert torch.allclose(ours.codes, oracle._codebook.embed[0], atol=1e-6)
        assert torch.allclose(ours.sizes, oracle._codebook.cluster_size[0], atol=1e-5)


def test_a_batch_in_parts_updates_as_the_batch_in_one():
    z, whole, parts = vectors(6, 16, 8), a_codebook(dead_below=0.9), a_codebook(dead_below=0.9)
    whole(z, noise(6))
    for part in ((0, 2), (2, 3), (3, 6)):
        parts(z[slice(*part)], noise(6)[slice(*part)])
    whole.update()
    parts.update()
    assert torch.allclose(whole.codes, parts.codes, atol=1e-6)
    assert torch.allclose(whole.sizes, parts.sizes, atol=1e-5)


def test_rows_that_only_pad_count_nowhere():
    z, padded, plain = vectors(4, 16, 8), a_codebook(dead_below=0.9), a_codebook(dead_below=0.9)
    padded(z, noise(4), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    plain(z[:2], noise(2))
    padded.update()
    plain.update()
    assert torch.equal(padded.codes, plain.codes)
    assert torch.equal(padded.sizes, plain.sizes)


def test_a_dead_code_is_revived_as_a_vector_of_the_batch_and_survives_the_next_update():
    book = a_codebook(num_revived=4)
    book.sizes[5] = 0.01  # all others are 1
    z = vectors(4, 16, 8)
    book(z, noise(4))
    book.update()
    closeness = (F.normalize(z.flatten(0, 1), dim=1) @ book.codes[5]).max()
    assert closeness > 1 - 1e-6
    assert book.sizes[5] == pytest.approx(book.sizes.mean().item(), rel=0.05)
    before = book.codes[5].clone()
    book(z, noise(4))
    book.update()
    assert book.codes[5] @ before > 0.9


def test_no_code_is_moved_by_revival_while_none_is_dead():
    alive, without = a_codebook(dead_below=1e-9), a_codebook(num_revived=0)
    for book in (alive, without):
        book(vectors(4, 16, 8), noise(4))
        book.update()
    assert torch.equal(alive.codes, without.codes)


def test_revival_brings_back_codes_that_lie_far_from_all_vectors():
    """The vectors lie on one side of the sphere and the codes on the other, as after a collapse."""

    def used(num_revived):
        book = a_codebook(num_codes=64, num_revived=num_revived)
        book.codes.copy_(F.normalize(0.1 * torch.randn(64, 8) - 1, dim=1))
        book.sums.copy_(book.codes)
        for step in range(300):
            book(vectors(4, 64, 8, seed=step) + 2, noise(4, start=100 * step))
            book.update()
        return len(book.ids(book.place(vectors(64, 64, 8, seed=999) + 2)).unique())

    assert used(16) >= 60
    assert used(0) < 30


def test_evaluation_collects_nothing():
    book = a_codebook().eval()
    codes = book.codes.clone()
    book(vectors(2, 4, 8), noise(2))
    book.update()
    assert torch.equal(book.codes, codes)


def test_draws_of_parts_merge_to_the_draw_of_the_whole_and_leave_out_what_pads():
    z, weight = vectors(6, 5, 3), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    keys, chosen = draw(z, noise(6), weight, 8)
    parts = [draw(z[i : i + 2], noise(6)[i : i + 2], weight[i : i + 2], 8) for i in (0, 2, 4)]
    merged_keys, merged = merge(parts, 8)
    assert torch.equal(keys, merged_keys)
    assert torch.equal(chosen, merged)
    padding = z[[1, 5]].flatten(0, 1)
    assert not (chosen[:, None] == padding).all(dim=2).any()
    assert (draw(z, noise(6), weight, 40)[0] < NEVER).sum() == 20


def test_k_means_finds_separated_clusters():
    centres = F.normalize(torch.eye(8), dim=1)
    some = F.normalize(centres.repeat_interleave(40, dim=0) + 0.05 * vectors(1, 320, 8)[0], dim=1)
    some = some[torch.randperm(320, generator=torch.Generator().manual_seed(1))]
    codes = k_means(some, 8)
    assert torch.equal((codes @ centres.T).argmax(dim=1).sort().values, torch.arange(8))
    assert (codes @ centres.T).max(dim=1).values.min() > 0.99


def test_k_means_gives_a_vector_to_a_code_that_takes_none():
    some = torch.cat([torch.zeros(6, 2), torch.tensor([[9.0, 9.0]]), torch.tensor([[-9.0, 9.0]])])  # 3 equal starts
    codes = k_means(some, 3, unit=False)
    assert {tuple(code) for code in codes.tolist()} == {(0.0, 0.0), (9.0, 9.0), (-9.0, 9.0)}


def test_k_means_of_too_few_vectors_says_how_many_there_are():
    with pytest.raises(ValueError, match="k-means of 8 codes needs as many vectors, but there are 4"):
        k_means(torch.randn(4, 2), 8)
