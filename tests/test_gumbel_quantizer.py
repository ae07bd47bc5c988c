"""The linear assignment against its logits, the draw against torch's Gumbel-softmax, the KL against its definition."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from latent_codec.models import quantizers
from latent_codec.models.gumbel_quantizer import GumbelQuantizer


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(codebook_size: int = 16, dim: int = 4, **settings) -> GumbelQuantizer:
    quantizer = GumbelQuantizer(codebook_size, dim, **settings)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(randn(codebook_size, dim, seed=100))
        quantizer.proj.weight.copy_(randn(codebook_size, dim, 1, 1, seed=101))
        quantizer.proj.bias.copy_(randn(codebook_size, seed=102))
    return quantizer.eval()


def brute_force(quantizer: GumbelQuantizer, latents: torch.Tensor) -> torch.Tensor:
    """All logits, (B, K, h, w), in float64."""
    weight, bias = quantizer.proj.weight.detach().double()[:, :, 0, 0], quantizer.proj.bias.detach().double()
    return torch.einsum("kd,bdhw->bkhw", weight, latents.double()) + bias[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_the_codeword_of_the_highest_logit_is_taken(dtype, autocast):
    quantizer, latents = build(), randn(2, 4, 9, 7).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = quantizer(latents)
        assigned = quantizer.assign(latents)
    expected = brute_force(quantizer, latents).argmax(1)
    assert expected.unique().numel() > 5
    assert torch.equal(output.indices, expected) and torch.equal(assigned, expected)
    assert output.indices.dtype == torch.int64
    codewords = quantizer.embedding.weight[expected].movedim(-1, 1).to(dtype)
    assert torch.equal(output.quantized, codewords) and output.quantized.dtype == dtype
    assert torch.equal(output.latents, latents)


def test_it_is_not_the_nearest_codeword_and_the_bias_counts():
    quantizer, latents = build(), randn(2, 4, 9, 7)
    nearest = quantizers.VectorQuantizer.assign(quantizer, latents)
    assert (nearest != quantizer.assign(latents)).float().mean() > 0.5
    with torch.no_grad():
        quantizer.proj.bias[3] = 1e3
    assert quantizer.assign(latents).unique().tolist() == [3]


@pytest.mark.parametrize("limit", [100, 7])  # less than the codebook: one position at a time
def test_logits_of_all_positions_never_exist_at_once_when_indices_are_wanted(monkeypatch, limit):
    quantizer, latents = build(), randn(2, 4, 9, 7)
    expected, sizes, addmm = quantizer.assign(latents), [], torch.addmm

    def watched(*arguments, **options):
        scores = addmm(*arguments, **options)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setattr(quantizers, "SCORES_AT_ONCE", limit)
    assert torch.equal(quantizer.assign(latents), expected)
    assert max(sizes) <= max(limit, 16) and sum(sizes) == 2 * 9 * 7 * 16


def test_kl_is_that_of_the_assignment_from_uniform():
    quantizer, latents = build(kl_weight=0.25), 3 * randn(2, 4, 3, 5)
    output = quantizer(latents)
    assignment = Categorical(logits=brute_force(quantizer, latents).movedim(1, -1))
    expected = kl_divergence(assignment, Categorical(logits=torch.zeros(16, dtype=torch.float64))).mean()
    torch.testing.assert_close(output.kl.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.loss(output), 0.25 * output.kl)
    assert float(output.commitment_loss) == float(output.codebook_loss) == 0
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.zero_()
    assert abs(float(quantizer(latents).kl)) < 1e-6  # uniform itself


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draw_and_gradients_are_torchs_straight_through_gumbel_softmax(temperature):
    quantizer, goal = build().train().double(), randn(2, 4, 3, 5, seed=2).double()
    quantizer.temperature = temperature
    latents = randn(2, 4, 3, 5).double().requires_grad_()
    inputs = (latents, quantizer.proj.weight, quantizer.proj.bias, quantizer.embedding.weight)

    torch.manual_seed(7)
    output = quantizer(latents)
    found = torch.autograd.grad((output.quantized * goal).sum(), inputs)

    torch.manual_seed(7)
    one_hot = F.gumbel_softmax(quantizer.proj(latents), tau=temperature, hard=True, dim=1)
    quantized = torch.einsum("bkhw,kd->bdhw", one_hot, quantizer.embedding.weight)
    expected = torch.autograd.grad((quantized * goal).sum(), inputs)

    assert torch.equal(output.indices, one_hot.argmax(1))
    torch.testing.assert_close(output.quantized, quantized)
    assert torch.equal(output.quantized, quantizer.lookup(output.indices))  # codewords to the bit
    for mine, theirs in zip(found, expected):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)


def test_indices_are_drawn_by_their_probabilities_whatever_the_temperature():
    quantizer = build(codebook_size=5).train()
    latents = randn(1, 4, 1, 1).expand(1, 4, 200, 200)
    probabilities = brute_force(quantizer, latents[..., :1, :1]).softmax(1).flatten()
    for temperature in (0.3, 3.0):
        quantizer.temperature = temperature
        torch.manual_seed(0)
        shares = torch.bincount(quantizer(latents).indices.flatten(), minlength=5) / 200**2
        # five standard deviations of a share over 40,000 draws: sqrt(1/4 / 40,000) = 0.0025
        torch.testing.assert_close(shares.double(), probabilities, rtol=0, atol=0.0125)


def test_nothing_is_drawn_in_eval_mode_or_without_gradients():
    quantizer, latents = build(), randn(2, 4, 9, 7)
    expected = quantizer.assign(latents)
    assert torch.equal(quantizer(latents).indices, expected)
    quantizer.train()
    assert not torch.equal(quantizer(latents).indices, expected)
    with torch.no_grad():  # a decoder trained on a frozen encoder
        assert torch.equal(quantizer(latents).indices, expected)


def test_gradients_pass_in_eval_mode_too():
    quantizer, goal = build().double(), randn(2, 4, 3, 5, seed=2).double()
    latents = randn(2, 4, 3, 5).double().requires_grad_()
    output = quantizer(latents)
    (found,) = torch.autograd.grad((output.quantized * goal).sum(), latents)
    mean = torch.einsum("bkhw,kd->bdhw", quantizer.proj(latents).softmax(1), quantizer.embedding.weight)
    (expected,) = torch.autograd.grad((mean * goal).sum(), latents)
    torch.testing.assert_close(found, expected)
    assert torch.equal(output.quantized, quantizer.lookup(output.indices))


def test_bypassed_latents_go_through():
    quantizer, latents = build(), randn(2, 4, 3, 5)
    quantizer.bypassed = True
    output = quantizer(latents)
    assert torch.equal(output.quantized, latents) and float(quantizer.loss(output)) == 0


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4, 4)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, h, w\), got shape"):
        build()(torch.zeros(shape))
