"""The quantizer, its gradients, k-means, and what a training does to a codebook, from their equations."""

import copy
import math

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from torch.nn import functional as F

from latent_codec.models import quantizers
from latent_codec.models.quantizers import (
    CodebookLearner,
    QuantizerOutput,
    VectorQuantizer,
    k_means,
    nearest_codewords,
    perplexity,
    rotate,
    straight_through,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(codebook_size: int = 16, dim: int = 4, *, seed: int = 0, **settings) -> VectorQuantizer:
    """A quantizer whose codewords spread as `randn` latents do."""
    quantizer = VectorQuantizer(codebook_size, dim, **settings)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(randn(codebook_size, dim, seed=100 + seed))
    quantizer.project_codebook()
    return quantizer


def brute_force(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """argmin of squared distances, every pair of them, in float64."""
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(2).argmin(1)


# Nearest codewords.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_codewords_are_those_of_all_distances_in_float64(dtype, autocast):
    vectors, codebook = randn(999, 4).to(dtype), randn(333, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        indices = nearest_codewords(vectors, codebook)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, brute_force(vectors, codebook))


def test_float64_is_searched_and_quantized_in_float64():
    """Codewords so near to one another that float32 cannot tell them apart."""
    codebook = 1 + 1e-6 * randn(50, 3).double()
    vectors = 1 + 1e-6 * randn(200, 3, seed=1).double()
    assert torch.equal(nearest_codewords(vectors, codebook), brute_force(vectors, codebook))
    assert not torch.equal(
        nearest_codewords(vectors.float(), codebook.float()), brute_force(vectors, codebook)
    )

    quantizer, latents = build().double(), randn(2, 4, 3, 5).double()
    output = quantizer(latents)
    expected = quantizer.embedding.weight[output.indices].movedim(-1, 1)
    torch.testing.assert_close(output.quantized, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        output.commitment_loss, F.mse_loss(latents, expected.detach()), rtol=1e-14, atol=0
    )


def test_scores_of_all_pairs_never_exist_at_once(monkeypatch):
    vectors, codebook = randn(500, 3), randn(40, 3, seed=1)
    expected = nearest_codewords(vectors, codebook)
    sizes = []
    addmm = torch.addmm

    def watched(*arguments, **options):
        scores = addmm(*arguments, **options)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setattr(quantizers, "SCORES_AT_ONCE", 1000)
    assert torch.equal(nearest_codewords(vectors, codebook), expected)
    assert max(sizes) <= 1000 and sum(sizes) == 500 * 40
    monkeypatch.setattr(quantizers, "SCORES_AT_ONCE", 7)  # fewer than codewords: one vector at a time
    assert torch.equal(nearest_codewords(vectors, codebook), expected)


def test_of_equally_near_codewords_the_first_wins():
    codebook = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    vectors = torch.tensor(
        [[0.0, 0.0], [1.0, 0.5], [2.0, 7.0]]
    )  # between 1 and 2; on 1 and 3; between 0 and 1
    assert nearest_codewords(vectors, codebook).tolist() == [1, 1, 0]


def test_one_codeword_and_no_vector():
    assert nearest_codewords(randn(5, 3), randn(1, 3)).tolist() == [0] * 5
    empty = nearest_codewords(randn(0, 3), randn(7, 3))
    assert empty.shape == (0,) and empty.dtype == torch.int64
    output = build(1, 3)(randn(2, 3, 4, 5))
    assert output.indices.unique().tolist() == [0] and float(output.perplexity) == 1
    assert build(7, 3).assign(randn(0, 3, 2, 2)).shape == (0, 2, 2)


# The step through the quantizer.


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_nearest_codeword_in_the_latents_layout_and_dtype(gradient, dtype):
    quantizer, latents = build(gradient=gradient), randn(2, 4, 3, 5).to(dtype)
    output = quantizer(latents)

    vectors = latents.movedim(1, -1).reshape(-1, 4)
    assert torch.equal(output.indices.flatten(), brute_force(vectors, quantizer.embedding.weight))
    assert output.indices.shape == (2, 3, 5) and output.indices.dtype == torch.int64
    assert output.quantized.dtype == dtype and output.quantized.is_contiguous()
    # the straight-through estimator adds the difference from the latent to it, which rounds once
    codewords = quantizer.lookup(output.indices).to(dtype)
    torch.testing.assert_close(output.quantized, codewords, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(quantizer.assign(latents), output.indices)
    assert torch.equal(output.latents, latents)


def test_straight_through_hands_the_gradient_on_unchanged():
    z, codewords, goal = (
        randn(2, 4, 3, 5).requires_grad_(),
        randn(2, 4, 3, 5, seed=1),
        randn(2, 4, 3, 5, seed=2),
    )
    (straight_through(z, codewords) * goal).sum().backward()
    assert torch.equal(z.grad, goal)

    quantizer = build()
    z = randn(2, 4, 3, 5).requires_grad_()
    (quantizer(z).quantized * goal).sum().backward()
    assert torch.equal(z.grad, goal)
    assert quantizer.embedding.weight.grad is None


def rotation(z: torch.Tensor, codeword: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Scale and matrix of arXiv:2410.06424, equation 4, that take one vector to its codeword, in float64."""
    z, codeword = z.double(), codeword.double()
    source, target = z / z.norm(), codeword / codeword.norm()
    middle = (source + target) / (source + target).norm()
    matrix = torch.eye(len(z), dtype=torch.float64)
    matrix = matrix - 2 * torch.outer(middle, middle) + 2 * torch.outer(target, source)
    return float(codeword.norm() / z.norm()), matrix


def test_rotation_turns_and_scales_gradients_as_it_does_the_vector():
    z, goal = randn(2, 4, 3, 5).requires_grad_(), randn(2, 4, 3, 5, seed=2)
    quantizer = build(gradient="rotation")
    output = quantizer(z)
    (output.quantized * goal).sum().backward()

    places = [(n, row, column) for n in range(2) for row in range(3) for column in range(5)]
    for n, row, column in places:
        vector, gradient = z.detach()[n, :, row, column], goal[n, :, row, column].double()
        codeword = quantizer.embedding.weight.detach()[output.indices[n, row, column]]
        scale, matrix = rotation(vector, codeword)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(4, dtype=torch.float64))  # it is a rotation
        torch.testing.assert_close(scale * matrix @ vector.double(), codeword.double(), rtol=1e-5, atol=1e-6)
        # float32 through a dozen operations
        expected = (scale * matrix.T @ gradient).float()
        torch.testing.assert_close(z.grad[n, :, row, column], expected, rtol=1e-4, atol=1e-5)


def test_rotation_keeps_the_gradients_angle_to_the_codeword():
    z, codewords, goal = (
        randn(1, 4, 8, 8).requires_grad_(),
        randn(1, 4, 8, 8, seed=1),
        randn(1, 4, 8, 8, seed=2),
    )
    (rotate(z, codewords) * goal).sum().backward()
    before = F.cosine_similarity(goal, codewords, dim=1)
    after = F.cosine_similarity(z.grad, z.detach(), dim=1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12])
def test_rotation_of_a_vector_without_direction_hands_the_gradient_on(length):
    z = (length * randn(1, 4, 2, 2)).requires_grad_()
    codewords, goal = randn(1, 4, 2, 2, seed=1), randn(1, 4, 2, 2, seed=2)
    rotated = rotate(z, codewords)
    (rotated * goal).sum().backward()
    assert torch.equal(rotated, codewords)
    torch.testing.assert_close(z.grad, goal)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rotation_by_half_a_turn_or_not_at_all_stays_finite_and_keeps_lengths(scale):
    codewords, goal = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=2)
    for z in (-codewords * scale, codewords * scale, codewords * -scale * (1 + 1e-7)):
        z = z.clone().requires_grad_()
        rotated = rotate(z, codewords)
        (rotated * goal).sum().backward()
        assert torch.equal(rotated, codewords)
        assert z.grad.isfinite().all()
        # 2 w w' of a w that rounding alone decides is still no more than twice a vector's length
        assert (z.grad.norm(dim=1) <= 5 / scale * goal.norm(dim=1)).all()


def test_a_codeword_of_zeros_gives_no_nan():
    z = randn(1, 4, 2, 2).requires_grad_()
    rotate(z, torch.zeros(1, 4, 2, 2)).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_bypassed_latents_go_through_unchanged_and_pay_nothing(gradient):
    quantizer, latents = build(gradient=gradient), randn(1, 4, 3, 3).requires_grad_()
    quantizer.bypassed = True
    output = quantizer(latents)
    assert torch.equal(output.quantized, latents)
    assert float(quantizer.loss(output).detach()) == 0
    output.quantized.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


# Loss terms.


def test_commitment_moves_the_encoder_and_codebook_the_codewords():
    quantizer, latents = build(), randn(2, 4, 3, 5).requires_grad_()
    output = quantizer(latents)
    codewords = quantizer.lookup(output.indices).detach()
    difference = (latents.detach() - codewords).square().mean()
    torch.testing.assert_close(output.commitment_loss.detach(), difference)
    torch.testing.assert_close(output.codebook_loss.detach(), difference)

    weight = quantizer.embedding.weight
    (to_latents, to_weight) = torch.autograd.grad(
        output.commitment_loss, (latents, weight), allow_unused=True, retain_graph=True
    )
    assert to_weight is None
    torch.testing.assert_close(to_latents, 2 * (latents.detach() - codewords) / latents.numel())

    (to_latents, to_weight) = torch.autograd.grad(output.codebook_loss, (latents, weight), allow_unused=True)
    assert to_latents is None
    expected = torch.zeros_like(weight)
    rows = (codewords - latents.detach()).movedim(1, -1).reshape(-1, 4)
    expected.index_add_(0, output.indices.flatten(), 2 * rows / latents.numel())
    torch.testing.assert_close(to_weight, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weighs_the_term_that_diffusers_own_quantizer_weighs(legacy):
    quantizer, latents = build(beta=0.2, legacy=legacy), randn(2, 4, 3, 5)
    theirs = DiffusersQuantizer(16, 4, beta=0.2, legacy=legacy)
    theirs.load_state_dict(quantizer.state_dict())
    mine, their = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    loss, their_loss = quantizer.loss(quantizer(mine)), theirs(their)[1]
    loss.backward()
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(mine.grad, their.grad)
    torch.testing.assert_close(quantizer.embedding.weight.grad, theirs.embedding.weight.grad)


@pytest.mark.parametrize(("legacy", "weight"), [(False, 0.2), (True, 1.0)])
def test_a_codebook_without_gradient_leaves_the_commitment_term_alone(legacy, weight):
    quantizer = build(beta=0.2, legacy=legacy)
    quantizer.embedding.weight.requires_grad_(False)
    output = quantizer(randn(2, 4, 3, 5).requires_grad_())
    torch.testing.assert_close(quantizer.loss(output), weight * output.commitment_loss)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5, 5, 5, 5], 4.0), ([9, 0, 0, 0], 1.0), ([0, 3, 3, 0], 2.0), ([0, 0, 0, 0], 1.0)],
)
def test_perplexity_of_known_counts(counts, expected):
    assert float(perplexity(torch.tensor(counts))) == pytest.approx(expected, rel=1e-6)


def test_perplexity_is_two_to_the_entropy_in_bits_of_the_indices():
    quantizer = build(2, 1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    output = quantizer(torch.tensor([-1.0, -2.0, -0.5, 3.0]).view(1, 1, 2, 2))
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert float(output.perplexity) == pytest.approx(2**bits, rel=1e-6)


# Unit codewords.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_vectors_find_what_diffusers_quantizer_finds_of_the_latents_as_they_are(dtype):
    quantizer, latents = build(64, 4, l2_normalized=True), (3 * randn(8, 4, 32, 32)).to(dtype)
    torch.testing.assert_close(quantizer.embedding.weight.norm(dim=1), torch.ones(64))
    output = quantizer(latents)
    theirs = DiffusersQuantizer(64, 4, beta=0.25)
    theirs.load_state_dict(quantizer.state_dict())
    assert torch.equal(output.indices.flatten(), theirs(latents.float())[2][2].flatten())
    assert torch.equal(output.indices, quantizer.assign(latents))
    unit = F.normalize(latents.float(), dim=1)
    torch.testing.assert_close(output.latents, unit.to(dtype))
    cosines = torch.einsum("bdhw,kd->bkhw", unit.double(), quantizer.embedding.weight.double())
    assert torch.equal(output.indices, cosines.argmax(1))


def test_gradients_of_unit_vectors_are_at_right_angles_to_the_latents():
    quantizer, latents = build(l2_normalized=True), randn(1, 4, 5, 5).requires_grad_()
    (quantizer(latents).quantized * randn(1, 4, 5, 5, seed=3)).sum().backward()
    along = (latents.grad * latents.detach()).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-5)


# Refusals.


def test_wrong_settings_and_shapes_are_refused():
    with pytest.raises(ValueError, match="gradient is 'rotated'; expected"):
        VectorQuantizer(4, 4, gradient="rotated")
    for size, dim in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"codebook_size is {size} and dim {dim}"):
            VectorQuantizer(size, dim)
    quantizer = build()
    for shape in ((2, 3, 5, 5), (2, 5, 5, 4), (4, 5, 5)):
        with pytest.raises(ValueError, match=r"expected latents \(B, 4, h, w\)"):
            quantizer(randn(*shape))


# k-means.


def clusters(num_clusters: int, size: int = 30, dim: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Far-apart places, and vectors close around them, in mixed order."""
    places = 100 * randn(num_clusters, dim, seed=1)
    vectors = places.repeat_interleave(size, 0) + 0.1 * randn(num_clusters * size, dim, seed=2)
    return places, vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_clusters", [1, 2, 8, 20])
def test_k_means_finds_separate_clusters(num_clusters, seed):
    places, vectors = clusters(num_clusters)
    centers = k_means(vectors, num_clusters, seed=seed)
    assert centers.shape == places.shape and centers.dtype == torch.float32
    matches = nearest_codewords(places, centers)
    assert matches.unique().numel() == num_clusters
    for place, match in enumerate(matches):
        members = vectors[nearest_codewords(vectors, places) == place]
        torch.testing.assert_close(centers[match], members.mean(0), rtol=1e-4, atol=1e-3)


def test_k_means_comes_to_rest_where_lloyds_algorithm_does():
    vectors = randn(400, 2)
    centers = k_means(vectors, 8, num_iterations=200)
    indices = brute_force(vectors, centers)
    for index in range(8):
        torch.testing.assert_close(centers[index], vectors[indices == index].mean(0), rtol=1e-4, atol=1e-5)


def test_k_means_repeats_and_follows_its_seed():
    vectors = randn(300, 4).requires_grad_()
    first, second, other = (k_means(vectors, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not first.requires_grad
    state = torch.get_rng_state()
    k_means(vectors, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_k_means_with_fewer_vectors_than_clusters_has_a_center_at_each():
    vectors = randn(5, 3)
    centers = k_means(vectors, 12)
    assert centers.shape == (12, 3) and centers.isfinite().all()
    # copies lie within a little noise of a vector
    assert (torch.cdist(centers, vectors).min(1).values < 1e-2).all()
    assert (torch.cdist(vectors, centers).min(1).values < 1e-2).all()


def test_k_means_of_duplicates():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(50, 1)
    centers = k_means(vectors, 8)
    assert centers.isfinite().all()
    assert brute_force(vectors[:2], centers).unique().numel() == 2
    torch.testing.assert_close(k_means(vectors[:1].repeat(9, 1), 4), vectors[:1].repeat(4, 1))


def test_k_means_by_directions_ignores_lengths():
    angles = torch.arange(4) * math.pi / 2
    places = torch.stack([angles.cos(), angles.sin()], 1)
    vectors = places.repeat(40, 1) + 0.01 * randn(160, 2)
    lengths = torch.rand(160, 1, generator=torch.Generator().manual_seed(5)) * 50 + 0.5
    centers = k_means(vectors * lengths, 4, normalize=True)
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(4))
    matches = brute_force(places, centers)
    assert matches.unique().numel() == 4
    torch.testing.assert_close(centers[matches], places, rtol=0, atol=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_k_means_refuses_what_is_not_finite_and_nothing_at_all(value):
    vectors = randn(10, 2)
    vectors[3, 1] = value
    with pytest.raises(ValueError, match="k-means of 10 vectors: at least one, and all finite"):
        k_means(vectors, 2)
    with pytest.raises(ValueError, match="k-means of 0 vectors"):
        k_means(randn(0, 2), 2)


# What a training does to a codebook.


def test_moving_averages_follow_appendix_a1_over_two_micro_batches_a_step():
    quantizer = build(8, 4)
    learner = CodebookLearner(quantizer, decay=0.9, restart_below=0)
    assert not quantizer.embedding.weight.requires_grad
    start = quantizer.embedding.weight.detach().double().clone()
    counts_average = sums_average = None
    for step in (1, 2, 3):
        codebook = quantizer.embedding.weight.detach().double().clone()
        counts, sums = torch.zeros(8, dtype=torch.float64), torch.zeros(8, 4, dtype=torch.float64)
        for micro in (0, 1):
            latents = randn(2, 4, 3, 5, seed=10 * step + micro)
            learner.observe(quantizer(latents))
            vectors = latents.movedim(1, -1).reshape(-1, 4).double()
            for vector, index in zip(vectors, brute_force(vectors, codebook)):
                counts[index] += 1
                sums[index] += vector
        if counts_average is None:  # codewords begin where they are, with the usage of the mean one
            counts_average = torch.full((8,), 60 / 8, dtype=torch.float64)
            sums_average = start * counts_average[:, None]
        counts_average = 0.9 * counts_average + 0.1 * counts
        sums_average = 0.9 * sums_average + 0.1 * sums
        terms, restarted = learner.update(step)

        assert not restarted.any() and terms["restarted_codes"] == 0
        assert terms["used_codes"] == (counts > 0).sum()
        shares = counts[counts > 0] / 60
        assert terms["perplexity"] == pytest.approx(
            float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5
        )
        torch.testing.assert_close(learner.usage, counts_average.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(learner.sums, sums_average.float(), rtol=1e-5, atol=1e-5)
        # Laplace smoothing, 1e-5 latents a codeword, is all that the formula does not have
        expected = (sums_average / counts_average[:, None]).float()
        torch.testing.assert_close(quantizer.embedding.weight, expected, rtol=1e-4, atol=1e-5)


def test_an_unused_codeword_stays_where_it_is_until_it_is_restarted():
    quantizer = build(2, 1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[1.0], [1000.0]]))
    learner = CodebookLearner(quantizer, decay=0.5, restart_below=0)
    for step in range(1, 8):
        learner.observe(quantizer(torch.full((4, 1, 2, 2), 2.0)))
        terms, _ = learner.update(step)
        assert terms["dead_codes"] == (step == 7)  # its usage is 0.5^step of the mean's
    assert quantizer.embedding.weight[1].item() == pytest.approx(1000, rel=1e-3)
    assert quantizer.embedding.weight[0].item() == pytest.approx(2 - 0.5**7, rel=1e-2)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_restarts_move_the_codewords_below_the_share_to_live_latents_and_grant_usage(learning):
    quantizer = build(8, 4)
    learner = CodebookLearner(quantizer, learning=learning, decay=0.5, restart_below=0.1)
    assert quantizer.embedding.weight.requires_grad == (learning == "gradient")
    with torch.no_grad():
        quantizer.embedding.weight[5:] += 1000  # out of reach
    latents = randn(8, 4, 4, 4)
    restarts = {}
    for step in range(1, 6):
        before = quantizer.embedding.weight.detach().clone()
        learner.observe(quantizer(latents))
        usage = learner.usage.clone()
        terms, restarted = learner.update(step)
        assert terms["restarted_codes"] == restarted.sum()
        counts = torch.bincount(
            brute_force(latents.movedim(1, -1).reshape(-1, 4), before), minlength=8
        ).float()
        usage = 0.5 * (usage if step > 1 else counts.mean()) + 0.5 * counts
        assert torch.equal(restarted, usage < 0.1 * usage.mean())
        kept = ~restarted
        if learning == "gradient":
            assert torch.equal(quantizer.embedding.weight[kept], before[kept])
        if restarted.any():
            restarts[step] = restarted.nonzero().flatten().tolist()
            rows = latents.movedim(1, -1).reshape(-1, 4)
            moved = quantizer.embedding.weight[restarted].detach()
            assert all((rows == row).all(1).any() for row in moved)
            assert len(moved.unique(dim=0)) == len(moved)  # a place for each
            torch.testing.assert_close(learner.usage[restarted], usage.mean().expand(restarted.sum()))
            torch.testing.assert_close(learner.sums[restarted], moved * usage.mean())
            torch.testing.assert_close(learner.usage[kept], usage[kept])
    # 2^-4 of the mean usage is the first below 0.1 of it
    assert min(restarts) == 4 and restarts[4] == [5, 6, 7]


def test_more_dead_codewords_than_latents_take_turns():
    quantizer = build(16, 4)
    with torch.no_grad():
        quantizer.embedding.weight[1:] += 1000
    learner = CodebookLearner(quantizer, decay=0.0, restart_below=0.5)
    latents = randn(1, 4, 2, 2)
    learner.observe(quantizer(latents))
    _, restarted = learner.update(1)
    rows = latents.movedim(1, -1).reshape(-1, 4)
    assert restarted.sum() == 4
    moved = quantizer.embedding.weight[restarted].detach()
    assert sorted(map(tuple, moved.tolist())) == sorted(map(tuple, rows.tolist()))


def test_gradient_learning_leaves_codewords_alone_without_restarts():
    quantizer = build(8, 4)
    learner = CodebookLearner(quantizer, learning="gradient", restart_below=0)
    before = quantizer.embedding.weight.detach().clone()
    for step in range(1, 4):
        learner.observe(quantizer(randn(2, 4, 3, 3, seed=step)))
        learner.update(step)
    assert torch.equal(quantizer.embedding.weight, before)
    assert quantizer.embedding.weight.requires_grad


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_unit_codewords_stay_unit_codewords(learning):
    quantizer = build(16, 4, l2_normalized=True)
    learner = CodebookLearner(quantizer, learning=learning, decay=0.5, restart_below=0.3)
    for step in range(1, 6):
        if learning == "gradient":
            with torch.no_grad():
                quantizer.embedding.weight += 0.1 * randn(16, 4, seed=step)  # an optimizer's step
        learner.observe(quantizer(3 * randn(1, 4, 4, 4, seed=50 + step)))
        learner.update(step)
        torch.testing.assert_close(quantizer.embedding.weight.norm(dim=1), torch.ones(16))


def test_a_training_step_waits_for_no_device():
    quantizer = build(8, 4)
    learner = CodebookLearner(quantizer, restart_below=0.5)
    output = quantizer(randn(2, 4, 3, 5))
    for module in (quantizer, learner):
        module.to("meta")  # whose tensors have no values to wait for
    learner.observe(QuantizerOutput(*(each.to("meta") for each in output[:6])))
    terms, restarted = learner.update(1)
    assert {term.device.type for term in (*terms.values(), restarted)} == {"meta"}


def test_state_of_a_learner_goes_on_to_the_same_bits():
    def advance(learner: CodebookLearner, steps: range) -> None:
        for step in steps:
            learner.observe(learner.quantizer(randn(2, 4, 3, 5, seed=step)))
            learner.update(step)

    whole = CodebookLearner(build(32, 4), decay=0.8, restart_below=0.5, seed=3)
    first = CodebookLearner(copy.deepcopy(whole.quantizer), decay=0.8, restart_below=0.5, seed=3)
    advance(whole, range(8))
    advance(first, range(5))
    second = CodebookLearner(build(32, 4, seed=9), decay=0.8, restart_below=0.5, seed=3)
    second.load_state_dict(first.state_dict())
    second.quantizer.load_state_dict(first.quantizer.state_dict())
    advance(second, range(5, 8))
    assert torch.equal(second.quantizer.embedding.weight, whole.quantizer.embedding.weight)
    assert torch.equal(second.usage, whole.usage) and torch.equal(second.sums, whole.sums)


def test_processes_that_share_sums_and_candidates_keep_one_codebook():
    # Two learners in lockstep stand for two processes; each sums and gathers over both.
    halves = [randn(2, 4, 3, 5, seed=1), randn(2, 4, 3, 5, seed=2)]
    learners = [CodebookLearner(build(16, 4), decay=0.5, restart_below=0.9) for _ in halves]
    single = CodebookLearner(build(16, 4), decay=0.5, restart_below=0.9)
    single.observe(single.quantizer(torch.cat(halves)))
    totals: list[list[torch.Tensor]] = [[], []]
    for learner, half in zip(learners, halves):
        learner.observe(learner.quantizer(half))
    for run in range(2):  # the first pass collects what each process gives, the second adds it up
        for number, learner in enumerate(copy.deepcopy(learners) if run == 0 else learners):
            given = iter(range(9))

            def share(tensor, join, number=number, given=given, run=run):
                place = next(given)
                if run == 0:
                    totals[number].append(tensor.clone())
                    return tensor
                return join([totals[0][place], totals[1][place]])

            learner.update(
                1,
                sum_over_processes=lambda tensor, share=share: share(
                    tensor, lambda parts: parts[0] + parts[1]
                ),
                gather=lambda tensor, share=share: share(tensor, torch.cat),
            )
    _, restarted = single.update(1)
    first, second = learners
    assert torch.equal(first.quantizer.embedding.weight, second.quantizer.embedding.weight)
    assert torch.equal(first.usage, second.usage)
    torch.testing.assert_close(first.usage, single.usage)
    kept = ~restarted
    assert kept.any() and restarted.any()
    torch.testing.assert_close(
        first.quantizer.embedding.weight[kept], single.quantizer.embedding.weight[kept]
    )
    rows = torch.cat(halves).movedim(1, -1).reshape(-1, 4)
    moved = first.quantizer.embedding.weight[restarted]
    assert all((rows == row).all(1).any() for row in moved)
