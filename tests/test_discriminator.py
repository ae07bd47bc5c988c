import pytest
import torch
from torch import nn

from latent_codec.models.discriminator import PatchDiscriminator, min_side


def test_a_logit_of_three_layers_sees_70_pixels():
    torch.manual_seed(0)
    # Group norm would join the whole image; the receptive field is that of the convolutions.
    discriminator = PatchDiscriminator(width=8, num_layers=3)
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):
            discriminator.layers[index] = nn.Identity()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)

    logits = discriminator(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()

    seen = image.grad.abs().sum((0, 1))
    assert (seen.sum(1) > 0).sum() == (seen.sum(0) > 0).sum() == 70


def test_images_of_a_batch_are_judged_alone():
    discriminator = PatchDiscriminator(width=8).train()
    images = torch.randn(4, 3, 32, 32)

    # the batch's size may choose another convolution algorithm: float32 rounding
    torch.testing.assert_close(discriminator(images)[2:3], discriminator(images[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_number_of_channels_and_non_square_images(channels):
    assert PatchDiscriminator(channels, width=8)(torch.zeros(2, channels, 32, 48)).shape == (2, 1, 2, 4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_image_leaves_one_logit_and_a_smaller_one_is_refused(layers):
    side = min_side(layers)
    discriminator = PatchDiscriminator(width=8, num_layers=layers)

    assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{side} px or more a side, got {side}x{side - 1}"):
        discriminator(torch.zeros(1, 3, side, side - 1))


def test_width_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 is not divisible by norm_num_groups 8"):
        PatchDiscriminator(width=10)
