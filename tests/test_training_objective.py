"""What each objective minimizes, against independent formulas, and which networks its gradients reach."""

import copy
import dataclasses
import math

import pytest
import torch
from helpers.training import tiny_config
from torch.distributions import Bernoulli, Normal, kl_divergence

from latent_codec import LatentCodec
from latent_codec.metrics import lab, lpips_available, round_to_8_bits
from latent_codec.models.discriminator import PatchDiscriminator
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.training import losses
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import ObjectiveConfig
from latent_codec.training.objective import AutoencoderObjective, ObjectiveTerms


def build(train_encoder=True, binarized=False, **settings):
    """An objective, its terms, a batch of images and the latents' noise."""
    autoencoder = build_autoencoder(tiny_config())
    config = ObjectiveConfig(**settings)
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(3, 8, 2) if config.gan_weight else None
    objective = AutoencoderObjective(autoencoder, config, train_encoder=train_encoder)
    terms_of = ObjectiveTerms(objective, binarized=binarized, discriminator=discriminator)
    image = round_to_8_bits(torch.rand(2, 3, 24, 32) * 2 - 1)
    return objective, terms_of, image, torch.randn(2, 2, 12, 16)


def posterior_of(objective: AutoencoderObjective, image: torch.Tensor) -> Normal:
    posterior = objective.autoencoder.encode(image).latent_dist
    return Normal(posterior.mean, posterior.std)


def nats_of_kl(objective, image) -> torch.Tensor:
    return kl_divergence(posterior_of(objective, image), Normal(0.0, 1.0)).sum()


def test_autoencoder_decodes_the_mean_and_pays_no_divergence():
    objective, terms_of, image, noise = build(posterior="mean")
    outputs = objective(image, noise)
    loss, terms = terms_of.autoencoder_loss(image, outputs, step=0)

    mean = posterior_of(objective, image).mean
    torch.testing.assert_close(outputs["reconstruction"], objective.autoencoder.decode(mean).sample)
    assert torch.equal(outputs["reconstruction"], objective(image, 100 * noise)["reconstruction"])
    assert terms.keys() == {"mse", "psnr"}
    torch.testing.assert_close(loss, (outputs["reconstruction"] - image).square().mean())


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_beta_vae_decodes_a_sample_and_weighs_the_divergence(beta):
    objective, terms_of, image, noise = build(kl_weight=beta)
    outputs = objective(image, noise)
    loss, _ = terms_of.autoencoder_loss(image, outputs, step=0)

    posterior = posterior_of(objective, image)
    sample = posterior.mean + posterior.stddev * noise  # the reparameterisation
    torch.testing.assert_close(outputs["reconstruction"], objective.autoencoder.decode(sample).sample)
    expected = (outputs["reconstruction"] - image).square().mean()
    expected = expected + beta * nats_of_kl(objective, image) / image.numel()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("std", [0.5, None])
def test_gaussian_vae_minimizes_the_negative_elbo_and_logs_it_in_bits_per_dim(std):
    objective, terms_of, image, noise = build(reconstruction="gaussian", gaussian_std=std, kl_weight=1.0)
    with torch.no_grad():  # a level too far off has no mass that float64 could tell from none
        objective.autoencoder.decoder.conv_out.weight *= 0.3
    outputs = objective(image, noise)
    loss, terms = terms_of.autoencoder_loss(image, outputs, step=0)

    normal = Normal(outputs["reconstruction"].double(), objective.log_std.double().exp())
    above = torch.where(image == 1, 1.0, normal.cdf(image.double() + 1 / 255))
    below = torch.where(image == -1, 0.0, normal.cdf(image.double() - 1 / 255))
    elbo = (above - below).log().sum() - nats_of_kl(objective, image).double()
    # float32 against float64
    torch.testing.assert_close(loss.double(), -elbo / image.numel(), rtol=1e-4, atol=0)
    assert terms["bits_per_dim"].item() == pytest.approx(-elbo.item() / image.numel() / math.log(2), rel=1e-4)
    loss.backward()
    assert (std is None) == (objective.log_std.grad is not None)


def test_gaussian_likelihood_counts_the_8_bit_level_of_a_resized_pixel():
    objective, terms_of, image, noise = build(reconstruction="gaussian", gaussian_std=0.1)
    outputs = objective(image, noise)
    between = (image + 0.4 / 255).clamp(-1, 1)  # rounds to `image`

    exact, rounded = (
        terms_of.autoencoder_loss(each, outputs, 0)[1]["gaussian_nll"] for each in (image, between)
    )

    assert torch.equal(exact, rounded)


def test_bernoulli_vae_minimizes_the_negative_elbo():
    objective, terms_of, image, noise = build(reconstruction="bernoulli", kl_weight=1.0, binarized=True)
    image = image.sign()
    with torch.no_grad():  # probabilities away from the margin
        objective.autoencoder.decoder.conv_out.weight *= 0.3
    outputs = objective(image, noise)
    loss, terms = terms_of.autoencoder_loss(image, outputs, step=0)

    probabilities = (outputs["reconstruction"] + 1) / 2
    assert probabilities.min() > 1 / 256 and probabilities.max() < 255 / 256
    log_likelihood = Bernoulli(probs=probabilities).log_prob((image + 1) / 2).sum()
    elbo = log_likelihood - nats_of_kl(objective, image)
    torch.testing.assert_close(loss, -elbo / image.numel(), rtol=1e-4, atol=0)
    assert terms["bits_per_dim"].item() == pytest.approx(-elbo.item() / image.numel() / math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("reconstruction", "binarized", "counts"),
    [
        ("gaussian", False, True),
        ("bernoulli", True, True),
        ("bernoulli", False, False),
        ("mse", False, False),
        ("l1", True, False),
    ],
)
def test_only_a_likelihood_of_the_data_counts_as_bits(reconstruction, binarized, counts):
    objective, terms_of, image, noise = build(reconstruction=reconstruction, binarized=binarized)
    _, terms = terms_of.autoencoder_loss(image, objective(image, noise), step=0)
    assert ("bits_per_dim" in terms) == counts


def test_psnr_is_of_the_clean_image_and_clamped_reconstruction():
    _, terms_of, image, _ = build(posterior="mean")
    zeros = torch.zeros(2, 2, 12, 16)
    outputs = {"reconstruction": image + 0.1, "mean": zeros, "log_variance": zeros, "activation": zeros.sum()}

    shown = (image + 0.1).clamp(-1, 1)
    error = (shown - image).square().mean((1, 2, 3))
    expected = (10 * torch.log10(2**2 / error)).mean()
    torch.testing.assert_close(terms_of.autoencoder_loss(image, outputs, 0)[1]["psnr"], expected)


def test_lpips_starts_at_its_step_and_its_gradient_reaches_encoder_and_decoder():
    if not lpips_available("squeeze"):
        pytest.skip("needs the LPIPS weights, which are absent")
    objective, terms_of, image, noise = build(lpips_weight=0.5, lpips_start=3)
    outputs = objective(image, noise)

    assert "lpips" not in terms_of.autoencoder_loss(image, outputs, step=2)[1]
    loss, terms = terms_of.autoencoder_loss(image, outputs, step=3)
    torch.testing.assert_close(loss, terms["mse"] + 0.5 * terms["lpips"])

    terms["lpips"].backward()
    for part in (objective.autoencoder.encoder, objective.autoencoder.decoder):
        assert part.conv_in.weight.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in terms_of.lpips.parameters())


GAN = {"gan_weight": 0.5, "gan_start": 10, "gan_ramp": 4, "gan_max_adaptive_weight": 2.0}


def test_gan_term_starts_late_ramps_up_and_has_a_capped_adaptive_weight():
    objective, terms_of, image, noise = build(**GAN)
    outputs = objective(image, noise)

    assert "gan" not in terms_of.autoencoder_loss(image, outputs, step=9)[1]
    for step, share in ((10, 0.25), (12, 0.75), (13, 1.0), (500, 1.0)):
        loss, terms = terms_of.autoencoder_loss(image, outputs, step)
        torch.testing.assert_close(terms["gan"], -terms_of.discriminator(outputs["reconstruction"]).mean())
        assert 0 < terms["gan_adaptive_weight"] <= 2
        expected = terms["mse"] + 0.5 * share * terms["gan_adaptive_weight"] * terms["gan"]
        torch.testing.assert_close(loss, expected)


def test_adaptive_weight_is_of_the_last_layer_of_the_decoder():
    objective, terms_of, image, noise = build(**GAN | {"gan_max_adaptive_weight": 1e6})
    outputs = objective(image, noise)
    _, terms = terms_of.autoencoder_loss(image, outputs, step=50)

    last = objective.autoencoder.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(terms[name], last, retain_graph=True)[0].norm().item() for name in ("mse", "gan")
    ]
    assert terms["gan_adaptive_weight"].item() == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-4)


def test_generator_step_leaves_the_discriminator_without_gradient():
    objective, terms_of, image, noise = build(**GAN)

    terms_of.autoencoder_loss(image, objective(image, noise), step=50)[0].backward()

    assert all(parameter.grad is None for parameter in terms_of.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in terms_of.discriminator.parameters())
    assert objective.autoencoder.encoder.conv_in.weight.grad.abs().sum() > 0


def test_discriminator_step_leaves_the_autoencoder_without_gradient():
    objective, terms_of, image, noise = build(**GAN)
    reconstruction = objective(image, noise)["reconstruction"]

    terms = terms_of.discriminator_loss(terms_of.discriminator, image, reconstruction)
    terms["discriminator"].backward()

    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(parameter.grad is not None for parameter in terms_of.discriminator.parameters())
    real, fake = terms_of.discriminator(image), terms_of.discriminator(reconstruction)
    expected = 0.5 * ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean())
    torch.testing.assert_close(terms["discriminator"], expected)


def test_transformed_latents_decode_to_the_image_as_it_is_transformed():
    objective, terms_of, image, noise = build(posterior="mean", equivariance_weight=0.5)
    moved = losses.Transformation(1, grid=(12, 16), size=(6, 8))
    outputs = objective(image, noise, None, moved)
    loss, terms = terms_of.autoencoder_loss(image, outputs, 0, moved)

    half = torch.nn.functional.interpolate(image, (12, 16), mode="bilinear", antialias=True)
    small = torch.nn.functional.interpolate(
        posterior_of(objective, image).mean, (6, 8), mode="bilinear", antialias=True
    )
    decoded = objective.autoencoder.decode(small.rot90(1, (2, 3))).sample
    expected = (decoded - half.rot90(1, (2, 3))).square().mean()
    torch.testing.assert_close(terms["equivariance"], expected)
    torch.testing.assert_close(loss, terms["mse"] + 0.5 * expected)
    gradients = torch.autograd.grad(terms["equivariance"], list(objective.autoencoder.encoder.parameters()))
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_a_hierarchys_levels_are_transformed_together():
    torch.manual_seed(0)
    network = HierarchicalVQ(
        strides=(2, 2, 2), hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=8
    )
    objective = AutoencoderObjective(network, ObjectiveConfig(posterior="mean", equivariance_weight=1.0))
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    outputs = objective(image, None, None, losses.Transformation(2, grid=(4, 4), size=(3, 3)))
    assert outputs["transformed"].shape == (1, 3, 24, 24)


def test_spectral_distance_sees_power_where_the_image_has_none():
    torch.manual_seed(1)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), 64, mode="bicubic")
    smooth = torch.nn.functional.interpolate(image, 16, mode="bilinear", antialias=True)
    white = torch.randn(2, 4, 16, 16)
    near, far = (losses.spectral_distance(each, image) for each in (smooth[:, :1] * 3 + 1, white))
    assert near < 0.5 < far  # neither scale nor offset counts
    white.requires_grad_(True)
    losses.spectral_distance(white, image).backward()
    stepped = (white - 0.5 * white.grad / white.grad.abs().max()).detach()
    assert losses.spectral_distance(stepped, image) < far


def test_a_tint_counts_and_texture_does_not():
    torch.manual_seed(0)
    image = torch.full((1, 3, 24, 16), 0.2)
    tinted = image + torch.tensor([0.02, -0.02, 0.0])[:, None, None]
    off = (lab(tinted) - lab(image))[0, 1:, 0, 0] / 100
    assert losses.color_distance(image, tinted) == pytest.approx(off.square().mean().item(), rel=1e-4)

    signs = torch.arange(24)[:, None] + torch.arange(16)
    texture = image + 0.02 * torch.tensor([1, -1, 0])[:, None, None] * (1 - 2 * (signs % 2))
    assert losses.color_distance(image, texture) < 1e-3 * losses.color_distance(image, tinted)

    black = torch.full_like(image, -1.0).requires_grad_()  # where a root's slope has no end
    losses.color_distance(image, black).backward()
    assert black.grad.isfinite().all()


def test_the_color_term_is_added_by_its_weight():
    objective, terms, image, noise = build(posterior="mean", color_weight=3.0)
    loss, found = terms.autoencoder_loss(image, objective(image, noise), 0)
    assert loss.item() == pytest.approx(found["mse"].item() + 3 * found["color"].item(), rel=1e-5)
    assert found["color"] > 0


def test_latents_stay_near_the_references():
    objective, _, image, noise = build(posterior="mean")
    reference = LatentCodec(copy.deepcopy(objective.autoencoder).eval())
    terms_of = ObjectiveTerms(objective, reference=reference)
    terms_of.config = objective.config = dataclasses.replace(
        objective.config, reference="it", reference_weight=2.0
    )
    loss, terms = terms_of.autoencoder_loss(image, objective(image, noise), 0)
    assert terms["reference"].item() == pytest.approx(0, abs=1e-9)

    with torch.no_grad():
        objective.autoencoder.quant_conv.bias[:2] += 0.5  # of the means
    scale = reference.latent_space.scaling_factor
    loss, terms = terms_of.autoencoder_loss(image, objective(image, noise), 0)
    assert terms["reference"].item() == pytest.approx((0.5 * scale) ** 2, rel=1e-4)
    torch.testing.assert_close(loss, terms["mse"] + 2 * terms["reference"])


def test_transformations_are_never_the_identity_and_belong_to_their_generator():
    drawn = [
        losses.draw_transformation(torch.Generator().manual_seed(seed), (4, 6), 0.5) for seed in range(200)
    ]
    assert {each.turns for each in drawn} == {0, 1, 2, 3}
    assert {each.size for each in drawn} == {(2, 3), (3, 4), (4, 6)}
    share = sum(each.size == (2, 3) for each in drawn) / len(drawn)
    assert 0.62 < share < 0.85  # three of five of all, and a third of the others
    assert not any(each.turns == 0 and each.size == each.grid for each in drawn)
    assert drawn[7] == losses.draw_transformation(torch.Generator().manual_seed(7), (4, 6), 0.5)
    one = losses.draw_transformation(torch.Generator().manual_seed(0), (1, 1), 0.5)
    assert one.turns and one.size == (1, 1)


def test_decoder_only_gives_the_encoder_no_gradient():
    objective, terms_of, image, noise = build(train_encoder=False)
    terms_of.autoencoder_loss(image, objective(image, noise), step=0)[0].backward()

    autoencoder = objective.autoencoder
    for part in (autoencoder.encoder, autoencoder.quant_conv):
        assert all(parameter.grad is None for parameter in part.parameters())
    for part in (autoencoder.decoder, autoencoder.post_quant_conv):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_activation_penalty_begins_at_its_limit():
    def penalty(limit):
        objective, terms_of, image, noise = build(activation_weight=3.0, activation_limit=limit)
        loss, terms = terms_of.autoencoder_loss(image, objective(image, noise), step=0)
        kl_free = terms["mse"] + 3.0 * terms["activation"]
        torch.testing.assert_close(loss, kl_free)
        return objective, terms["activation"]

    assert penalty(1e4)[1].item() == 0
    objective, value = penalty(0.5)
    value.backward()
    assert value > 0 and objective.autoencoder.encoder.mid_block.resnets[0].conv1.weight.grad.abs().sum() > 0


def test_activation_penalty_lowers_the_activations():
    objective, terms_of, image, noise = build(activation_weight=1.0, activation_limit=0.5)
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    values = []
    for _ in range(15):
        loss, terms = terms_of.autoencoder_loss(image, objective(image, noise), step=0)
        values.append(terms["activation"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("settings", [{}, {"activation_weight": 1.0, "activation_limit": 0.5}])
def test_gradient_checkpointing_gives_the_same_gradients(settings):
    gradients = []
    for checkpointing in (False, True):
        objective, terms_of, image, noise = build(kl_weight=1e-3, **settings)
        if checkpointing:
            objective.autoencoder.enable_gradient_checkpointing()
        objective.train()
        terms_of.autoencoder_loss(image, objective(image, noise), step=0)[0].backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


def test_the_posterior_stays_in_sight_of_the_forward_pass():
    # diffusers#10614: AutoencoderKL.forward hides it, so that no KL term can be had through a wrapped model
    objective, _, image, noise = build()
    outputs = objective(image, noise)
    posterior = objective.autoencoder.encode(image).latent_dist
    torch.testing.assert_close(outputs["mean"], posterior.mean)
    torch.testing.assert_close(outputs["log_variance"], posterior.logvar)


def test_images_decoded_from_their_upper_levels_see_the_mean_codeword_below():
    torch.manual_seed(0)
    model = HierarchicalVQ(
        strides=(2, 2, 2), hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=8
    ).eval()
    for level in range(3):
        model.set_usage(level, torch.rand(8))
    objective = AutoencoderObjective(model, ObjectiveConfig(level_dropout=0.5))
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        dropped = objective(image, None, torch.tensor([1, 2, 3]))["reconstruction"]
        whole = objective(image, None)["reconstruction"]
        grids = model.encode_indices(image)
        for row, kept in enumerate((1, 2, 3)):
            expected = model.decode_indices([grid[row : row + 1] for grid in grids[:kept]])
            torch.testing.assert_close(dropped[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dropped[2], whole[2])
    assert (dropped[:2] - whole[:2]).abs().amax((1, 2, 3)).min() > 1e-3

    for quantizer in model.quantizers:
        quantizer.bypassed = True  # codebooks have not begun
    bypassed = objective(image, None, torch.tensor([1, 2, 3]))["reconstruction"]
    bypassed[0].sum().backward()
    assert model.quantize_convs[0].weight.grad.abs().sum() > 0
    assert model.quantize_convs[2].weight.grad is None or not model.quantize_convs[2].weight.grad.any()


def test_kept_levels_are_drawn_by_each_images_own_generator():
    def draw(seeds):
        return losses.draw_kept_levels(3, [torch.Generator().manual_seed(seed) for seed in seeds], 0.4)

    kept = draw(range(4000))
    shares = torch.bincount(kept, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.2, 0.2, 0.6]), rtol=0, atol=0.03)
    assert torch.equal(draw([7, 3]), kept[[7, 3]])
