"""The loss terms against independent formulas (torch.distributions, float64), and the denoising corruptions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from latent_codec.training import losses

LEVELS = torch.arange(256) / 127.5 - 1  # what 8 bits can say in [-1, 1]


def discretized_log_mass(image, mean, std):
    """log P(level): the normal distribution's mass over a level's bin, the outermost bins reaching to infinity."""
    normal = Normal(mean.double(), std)
    half = 1 / 255
    above = torch.where(image > 0.999, 1.0, normal.cdf(image.double() + half))
    below = torch.where(image < -0.999, 0.0, normal.cdf(image.double() - half))
    return (above - below).log()


@pytest.mark.parametrize("std", [0.02, 0.3, 2.0])
def test_gaussian_nll_is_the_mean_log_mass_of_the_levels(std):
    random = torch.Generator().manual_seed(0)
    image = LEVELS[torch.randint(256, (2, 3, 8, 8), generator=random)]
    mean = image + std * torch.randn(image.shape, generator=random)
    expected = -discretized_log_mass(image, mean, std).mean()

    found = losses.gaussian_nll(image, mean, torch.tensor(math.log(std)))

    # float32 loses digits where two nearly equal masses are subtracted
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("std", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999, 1.1])
def test_discretized_gaussian_sums_to_one_over_the_256_levels(mean, std):
    nats = torch.stack(
        [losses.gaussian_nll(level, torch.tensor(mean), torch.tensor(math.log(std))) for level in LEVELS]
    )

    # the far tails' bins hold less than 1e-6 each, and are approximated
    assert float(nats.neg().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_gaussian_nll_far_from_the_level_has_a_finite_pull_toward_it():
    image = torch.tensor([-1.0, 0.0, 1.0])
    mean = torch.tensor([3.0, -3.0, -3.0], requires_grad=True)

    losses.gaussian_nll(image, mean, torch.tensor(-4.0)).backward()

    assert torch.isfinite(mean.grad).all()
    assert (mean.grad.sign() == torch.tensor([1.0, -1.0, -1.0])).all()


def test_bits_of_a_uniform_image_known_exactly_are_near_zero_and_of_a_blind_guess_eight():
    image = LEVELS.repeat(4, 1)
    known = losses.gaussian_nll(image, image, torch.tensor(-8.0))
    # A very broad Gaussian over the image's range leaves the two outermost bins nearly all mass, so that the best
    # blind guess with one Gaussian costs a little more than the 8 bits of the uniform distribution.
    blind = losses.gaussian_nll(image, torch.zeros_like(image), torch.tensor(math.log(0.58)))

    assert float(losses.nats_to_bits_per_dim(known)) == pytest.approx(0, abs=1e-3)
    assert 8 < float(losses.nats_to_bits_per_dim(blind)) < 8.5


def test_bernoulli_nll_is_the_mean_log_probability():
    random = torch.Generator().manual_seed(0)
    image = torch.randint(2, (2, 1, 8, 8), generator=random) * 2.0 - 1
    mean = torch.rand(image.shape, generator=random) * 1.9 - 0.95
    expected = -Bernoulli(probs=(mean.double() + 1) / 2).log_prob((image.double() + 1) / 2).mean()

    torch.testing.assert_close(losses.bernoulli_nll(image, mean).double(), expected, rtol=1e-5, atol=0)


def test_bernoulli_nll_goes_on_along_its_tangent_beyond_the_margin():
    edge = 1 - 2 * losses.BERNOULLI_MARGIN
    white, black = torch.tensor(1.0), torch.tensor(-1.0)

    def value_and_slope(target, at):
        mean = torch.tensor(at, requires_grad=True)
        value = losses.bernoulli_nll(target, mean)
        value.backward()
        return value.item(), mean.grad.item()

    value, slope = value_and_slope(black, edge + 0.01)
    beyond, slope_beyond = value_and_slope(black, 3.0)
    assert beyond == pytest.approx(value + slope * (3 - edge - 0.01), rel=1e-4)
    assert slope_beyond == pytest.approx(slope, rel=1e-4)
    limit, _ = value_and_slope(black, edge)
    assert value == pytest.approx(limit + slope * 0.01, rel=1e-4), "continuous at the margin"
    assert value_and_slope(white, 3.0)[1] == 0, "an overshoot to the right side is left alone"
    assert value_and_slope(black, 3.0)[1] > 0, "an overshoot to the wrong side is pulled back"


def test_kl_divergence_is_torch_distributions():
    random = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 2, 4, 5, 5, generator=random)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))

    torch.testing.assert_close(losses.kl_divergence(mean, log_variance), expected, rtol=1e-4, atol=1e-6)


def test_hinge_loss_punishes_logits_inside_the_margin_alone():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # real: 0, 0.5, 2; fake: 0, 1, 2
    assert float(losses.hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))


def test_adaptive_weight_is_the_ratio_of_gradient_norms_capped_and_without_gradient():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (weight * torch.tensor([6.0, 8.0])).sum()  # gradient norm 10
    adversarial = (weight * torch.tensor([0.0, -2.0])).sum()  # gradient norm 2

    ratio = losses.adaptive_gan_weight(reconstruction, adversarial, weight, maximum=100)
    capped = losses.adaptive_gan_weight(reconstruction, adversarial, weight, maximum=3)
    vanishing = losses.adaptive_gan_weight(reconstruction, adversarial * 0, weight, maximum=3)

    assert float(ratio) == pytest.approx(5, rel=1e-5)
    assert float(capped) == float(vanishing) == 3
    assert not ratio.requires_grad and weight.grad is None


def test_adaptive_weight_compares_gradients_averaged_over_processes():
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    here = weight.sum()
    there = torch.tensor([[1.0, -1.0], [1.0, -1.0]])  # the other process's two gradients

    ratio = losses.adaptive_gan_weight(here, 2 * here, weight, 10, lambda mine: (mine + there) / 2)

    # means: (1, 0) and (1.5, 0.5); a ratio of the processes' own weights would be another number
    assert float(ratio) == pytest.approx(1 / math.hypot(1.5, 0.5), rel=1e-5)


def test_ramp_is_zero_before_the_start_and_one_after_its_length():
    assert [losses.ramp(step, start=10, length=4) for step in (0, 9, 10, 11, 13, 14, 99)] == [
        0.0,
        0.0,
        0.25,
        0.5,
        1.0,
        1.0,
        1.0,
    ]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_corrupt_leaves_the_clean_image_alone():
    image = torch.rand(2, 3, 9, 10) * 2 - 1
    before = image.clone()

    same = losses.corrupt(image, generators(0, 1), noise=0.0, dropped=0.0, patch=1)
    noisy = losses.corrupt(image, generators(0, 1), noise=0.5, dropped=0.5, patch=2)

    assert torch.equal(same, image) and torch.equal(image, before) and not torch.equal(noisy, image)


def test_corrupt_drops_whole_patches_in_every_channel():
    image = torch.ones(1, 3, 11, 14)  # not a multiple of the patch
    dropped = losses.corrupt(image, generators(5), noise=0.0, dropped=0.5, patch=4)

    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    for top in range(0, 11, 4):
        for left in range(0, 14, 4):
            assert len(dropped[:, :, top : top + 4, left : left + 4].unique()) == 1


def test_corrupt_drops_the_share_that_is_asked_for_and_noise_has_its_deviation():
    image = torch.full((1, 1, 100, 100), 0.5)

    dropped = losses.corrupt(image, generators(0), noise=0.0, dropped=0.3, patch=1)
    noisy = losses.corrupt(image, generators(0), noise=0.2, dropped=0.0, patch=1)

    # 10,000 draws: three standard errors
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.014)
    assert float(noisy.std()) == pytest.approx(0.2, rel=0.03)


def test_corruption_belongs_to_the_image_and_not_to_its_batch():
    image = torch.rand(3, 1, 8, 8)
    together = losses.corrupt(image, generators(7, 8, 9), noise=0.1, dropped=0.2, patch=2)
    alone = losses.corrupt(image[1:2], generators(8), noise=0.1, dropped=0.2, patch=2)

    assert torch.equal(together[1:2], alone)


def test_bernoulli_loss_is_never_negative_however_far_the_decoder_overshoots():
    for target in (-1.0, 1.0):
        image = torch.full((1, 1, 1, 1), target)
        for value in (-5.0, -1.0, 0.0, 1.0, 5.0):
            loss = losses.bernoulli_nll(image, torch.full_like(image, value))
            assert loss >= 0
            assert (loss < 0.01) == (value * target >= 1)
