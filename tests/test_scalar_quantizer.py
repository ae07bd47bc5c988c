from dataclasses import asdict

import pytest
import torch

from latent_codec.models.scalar_quantizer import ScalarQuantizer


def column(*values) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, -1, 1)


@pytest.mark.parametrize(
    "dead_zone, levels",
    [
        (1, [-2, -1, -1, 0, 0, 0, 1, 1, 2]),
        (1.5, [-1, -1, 0, 0, 0, 0, 0, 1, 1]),
        (2, [-1, -1, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_levels_of_one_step(dead_zone, levels):
    # in steps: -1.6, -1, -0.6, -0.4, 0, 0.4, 0.6, 1, 1.6
    latents = column(-0.8, -0.5, -0.3, -0.2, 0.0, 0.2, 0.3, 0.5, 0.8)
    assert ScalarQuantizer(steps=(0.5,), dead_zone=dead_zone).encode(latents).flatten().tolist() == levels


@pytest.mark.parametrize("dead_zone", [1, 1.3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_come_back_and_latents_within_half_an_interval(dead_zone, dtype):
    quantizer = ScalarQuantizer(steps=(0.1, 0.37, 3), minimum=-300, maximum=299, dead_zone=dead_zone)
    levels = torch.arange(-300, 300).repeat(3, 1).view(1, 3, 20, 30)
    assert torch.equal(quantizer.encode(quantizer.decode(levels, dtype)), levels)

    steps = torch.tensor(quantizer.steps, dtype=dtype).view(1, 3, 1, 1)
    latents = torch.randn(2, 3, 8, 9, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 20 * steps
    error = (quantizer.decode(quantizer.encode(latents), dtype) - latents).abs() / steps
    assert error.max() <= dead_zone / 2 + 1e-4  # 60 steps in float32 round by 4e-6


def test_steps_belong_to_channels_and_levels_are_clipped():
    quantizer = ScalarQuantizer(steps=(1, 10), minimum=-3, maximum=2)
    levels = quantizer.encode(torch.full((1, 2, 1, 1), 9.0))
    assert levels.flatten().tolist() == [2, 1]
    assert levels.dtype == torch.int64
    assert quantizer.encode(torch.full((1, 2, 1, 1), -99.0)).flatten().tolist() == [-3, -3]
    assert quantizer.num_levels == 6
    free = ScalarQuantizer(steps=(1, 10))
    assert free.num_levels is None
    assert free.encode(torch.full((1, 2, 1, 1), -9000.0)).flatten().tolist() == [-9000, -900]


def test_half_precision_is_quantized_in_float32():
    latents = torch.linspace(-30, 30, 999).view(1, 1, 27, 37)
    quantizer = ScalarQuantizer(steps=(0.013,))
    for dtype in (torch.bfloat16, torch.float16):
        half = latents.to(dtype)
        assert torch.equal(quantizer.encode(half), quantizer.encode(half.float()))


def test_fields_are_a_config():
    quantizer = ScalarQuantizer(steps=[0.5, 2], minimum=-4, maximum=3, dead_zone=1.5)
    assert ScalarQuantizer(**asdict(quantizer)) == quantizer


def test_fitted_steps_reach_over_the_latents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 2, 32, 32, generator=generator) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    quantizer = ScalarQuantizer.from_latents(latents, num_levels=64, coverage=0.99)
    assert (quantizer.minimum, quantizer.maximum) == (-32, 31)
    reach = 31 * torch.tensor(quantizer.steps).view(1, 2, 1, 1)
    shares = (latents.abs() <= reach).float().mean((0, 2, 3))
    torch.testing.assert_close(shares, torch.full((2,), 0.99), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"steps": ()}, "one per channel"),
        ({"steps": (1, 0)}, "above 0"),
        ({"steps": (float("nan"),)}, "above 0"),
        ({"steps": (1,), "minimum": 1}, "a range that holds 0"),
        ({"steps": (1,), "maximum": -1}, "a range that holds 0"),
        ({"steps": (1,), "dead_zone": 0.5}, "dead_zone is 0.5"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ScalarQuantizer(**fields)


def test_values_that_do_not_fit_are_refused():
    quantizer = ScalarQuantizer(steps=(1, 1), minimum=-2, maximum=2)
    with pytest.raises(ValueError, match=r"each step size, \(B, 2, h, w\), got shape \(1, 3, 2, 2\)"):
        quantizer.encode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="NaN"):
        quantizer.encode(torch.full((1, 2, 1, 1), float("nan")))
    with pytest.raises(ValueError, match="from -2 to 2, got 3 to 3"):
        quantizer.decode(torch.full((1, 2, 1, 1), 3))
    with pytest.raises(ValueError, match="expected integers"):
        quantizer.decode(torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="above 0"):
        ScalarQuantizer.from_latents(torch.zeros(1, 2, 4, 4))
