"""PixelCNN over codes, pixels and latents; what both priors share is tested with both in tests/test_pixelsnail.py."""

import math

import pytest
import torch

from latent_codec.models.pixelcnn import PixelCNN, discretized_logistic


def tiny(data="codes", dtype=torch.float64, **config) -> PixelCNN:
    torch.manual_seed(0)
    config = {"codebook_size": 11, "hidden_channels": 8, "num_layers": 3, "kernel_size": 5} | config
    if data == "pixels":
        config = {"data_channels": 3} | config
    if data == "latents":
        steps = (0.1, 0.2, 0.4, 0.3)
        config = {
            "data_channels": 4,
            "latent_steps": steps,
            "latent_minimum": -5,
            "latent_maximum": 4,
            "num_mixtures": 3,
        } | config
    return PixelCNN(data, **config).to(dtype).eval()


def grid(model, batch=2, height=4, width=5, seed=1) -> torch.Tensor:
    shape = (batch, model.data_channels, height, width) if model.has_channels else (batch, height, width)
    return torch.randint(0, model.num_values, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("data", ["pixels", "latents"])
@torch.no_grad()
def test_channels_of_a_position_see_earlier_channels_alone(data):
    model = tiny(data)
    indices = grid(model, batch=1)
    before = model.logits(indices)[0, :, :, 2, 2]
    for channel in range(model.data_channels):
        changed = indices.clone()
        changed[0, channel, 2, 2] = (changed[0, channel, 2, 2] + model.num_values // 2) % model.num_values
        after = model.logits(changed)[0, :, :, 2, 2]
        differs = (after != before).any(0)
        assert differs.tolist() == [other > channel for other in range(model.data_channels)]


@torch.no_grad()
def test_mixture_is_a_distribution_and_log_prob_reads_it():
    model = tiny("latents")
    indices = grid(model)
    log_probs = model.logits(indices)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(indices.shape, dtype=torch.float64))
    picked = log_probs.gather(1, indices[:, None])[:, 0].sum(1)
    torch.testing.assert_close(model.log_prob(indices), picked)


def test_discretized_logistic_is_the_difference_of_sigmoids():
    values = torch.arange(8)
    mean, log_scale = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64)
    centers = torch.linspace(-1, 1, 8, dtype=torch.float64)
    upper = ((centers + 1 / 7 - mean) / log_scale.exp()).sigmoid()
    lower = ((centers - 1 / 7 - mean) / log_scale.exp()).sigmoid()
    upper[-1], lower[0] = 1, 0
    found = discretized_logistic(values, mean, log_scale, 8)
    torch.testing.assert_close(found, (upper - lower).log())


def test_discretized_logistic_stays_finite_far_from_its_mean():
    means = torch.tensor([-50.0, 50.0], requires_grad=True)
    log_scales = torch.tensor([-9.0, 9.0], requires_grad=True)
    found = torch.stack(
        [discretized_logistic(torch.tensor(v), means, log_scales, 256) for v in (0, 128, 255)]
    )
    found.sum().backward()
    assert found.isfinite().all()
    assert (found <= 0).all()
    assert means.grad.isfinite().all()
    assert log_scales.grad.isfinite().all()


def test_latents_become_indices_and_come_back():
    model = tiny("latents", dtype=torch.float32)
    latents = torch.randn(2, 4, 3, 5) * 0.3
    indices = model.encode_latents(latents)
    assert indices.min() >= 0
    assert indices.max() < model.num_values == 10
    assert torch.equal(indices, model.quantizer.encode(latents) + 5)
    assert torch.equal(model.encode_latents(model.decode_latents(indices)), indices)
    assert model.decode_latents(indices).shape == latents.shape
    with pytest.raises(ValueError, match='expected a PixelCNN over "latents"'):
        tiny("codes").encode_latents(latents)


@pytest.mark.parametrize("data", ["codes", "pixels", "latents"])
def test_training_learns_what_the_data_repeat(data):
    model = tiny(data, dtype=torch.float32, num_layers=1).train()
    indices = grid(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(20):
        loss = -model(indices).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(model.data_channels * math.log(model.num_values), rel=0.5)
    assert losses[-1] < 0.7 * losses[0]


def test_every_parameter_that_can_matter_gets_a_gradient():
    model = tiny("pixels", num_classes=3, condition_channels=2)
    model.log_prob(
        grid(model), torch.randn(2, 2, 2, 5, dtype=torch.float64), torch.tensor([0, 2])
    ).sum().backward()
    dead = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not dead
    silent = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert not silent


@pytest.mark.parametrize(
    "config, words",
    [
        ({"kernel_size": 4}, "kernel_size is 4; expected an odd number"),
        ({"data": "voxels"}, "data is 'voxels'"),
        (
            {"data": "latents", "data_channels": 2, "latent_steps": (1.0,)},
            "latent_steps: expected 2, one per channel",
        ),
        ({"data_channels": 3}, "codes have 1"),
        ({"codebook_size": 1}, "needs 2 or more"),
        ({"condition_channels": 3, "condition_codebook_size": 5}, "give one"),
    ],
)
def test_configs_that_mean_nothing_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        PixelCNN(**{"data": "codes", "hidden_channels": 8, "num_layers": 1} | config)


@pytest.mark.parametrize(
    "shape, words",
    [((2, 4, 5), r"\(B, 3, h, w\)"), ((2, 4, 4, 5), r"\(B, 3, h, w\)"), ((2, 3, 0, 5), "no side 0")],
)
def test_grids_of_another_form_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        tiny("pixels").logits(torch.zeros(shape, dtype=torch.int64))
