"""Ridge regression in closed form."""

import torch

from latent_codec.regression import ridge_regression


def linear_data() -> tuple[torch.Tensor, ...]:
    """Features, one channel of which is dead, and a linear map's values."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 4) + 2, torch.randn(3, 4), torch.randn(3)
    x[:, 2] = 7
    weight[:, 2] = 0
    return x, x @ weight.T + bias


def test_it_finds_a_linear_map_and_survives_a_dead_channel():
    x, y = linear_data()
    found, offset = ridge_regression([(x, y)])
    torch.testing.assert_close(x @ found.T + offset, y, rtol=0, atol=2e-3)  # what the penalty costs
    torch.testing.assert_close(found[:, 2], torch.zeros(3), rtol=0, atol=1e-6)


def test_weights_count_as_repetitions_and_parts_as_one():
    x, y = linear_data()
    counts = torch.randint(1, 4, (500,))
    noisy = y + torch.randn_like(y)
    parts = [(x[some], noisy[some], counts[some]) for some in (slice(0, 99), slice(99, None))]
    repeated = ridge_regression([(x.repeat_interleave(counts, 0), noisy.repeat_interleave(counts, 0))])
    for one, other in zip(ridge_regression(parts), repeated):
        torch.testing.assert_close(one, other)


def test_half_precision_is_summed_in_double():
    x, y = linear_data()
    half = [(x.half(), y.half())]
    for one, other in zip(ridge_regression(half), ridge_regression([(x.half().double(), y.half().double())])):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
