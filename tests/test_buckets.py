"""Sizes that images are brought to: squares, buckets of aspect ratios, random windows."""

import numpy as np
import pytest
import torch

from latent_codec.errors import SettingError
from latent_codec.images.buckets import Framing, cut


def test_buckets_of_512_are_those_of_kohya():
    """Its make_bucket_resolutions((512, 512), min_size=256, max_size=1024, divisible=64), as (width, height)."""
    widths = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640)]
    widths += [(448, 576), (512, 512), (576, 448), (640, 384), (704, 320), (768, 320)]
    widths += [(832, 256), (896, 256), (960, 256), (1024, 256)]
    assert [(width, height) for height, width in Framing(size=512, step=64).buckets] == widths


@pytest.mark.parametrize("size, step", [(512, 64), (1024, 64), (256, 32), (768, 128), (200, 8)])
def test_buckets_hold_the_area_and_the_step(size, step):
    buckets = Framing(size=size, step=step).buckets
    assert len(buckets) == len(set(buckets)) and {(width, height) for height, width in buckets} == set(
        buckets
    )
    for height, width in buckets:
        assert height % step == width % step == 0 and height * width <= size**2
        assert max((height + step) * width, (width + step) * height) > size**2  # else a larger one would do


@pytest.mark.parametrize(
    "image, resized, window",
    [
        ((600, 900), (427, 640), (21, 0, 384, 640)),  # 1.5 is nearer to 640 / 384 than to 576 / 448
        ((512, 512), (512, 512), (0, 0, 512, 512)),
        ((100, 1000), (256, 2560), (0, 768, 256, 1024)),
    ],
)
def test_image_just_covers_its_bucket(image, resized, window):
    frame = Framing(size=512, step=64).frame(*image)
    assert (frame.resized, frame.window) == (resized, window)


def test_small_images_keep_their_size_without_upscaling():
    buckets, squares = (Framing(size=512, step=step, multiple=8, upscale=False) for step in (64, None))
    assert buckets.frame(200, 300).resized == (192, 288) and buckets.frame(200, 300).size == (192, 256)
    assert squares.frame(200, 300).size == (200, 200)
    assert buckets.frame(40, 40).size == (64, 64)  # not less than a step
    assert buckets.frame(1000, 1000) == Framing(size=512, step=64).frame(1000, 1000)


def test_random_windows_are_in_the_image_and_differ():
    framing = Framing(size=64, step=16)
    frames = [framing.random_frame(90, 120, np.random.default_rng(seed)) for seed in range(200)]
    for frame in frames:
        top, left, height, width = frame.window
        assert (height, width) == framing.frame(90, 120).size
        assert 0 <= top <= frame.resized[0] - height and 0 <= left <= frame.resized[1] - width
        assert height <= frame.resized[0] <= 1.26 * 90 * max(height / 90, width / 120)
    assert len(set(frames)) > 190 and 60 < sum(frame.flipped for frame in frames) < 140


def test_cut_is_the_middle_of_the_resized_image_and_its_mirror_image():
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 64, 128).contiguous()
    framing = Framing(size=32)
    frame = framing.frame(64, 128)
    pixels = cut(ramp, frame)
    # Of 64 columns the middle 32, each the mean of about two of the ramp's values.
    assert pixels.shape == (3, 32, 32) and (pixels[0, 0, 1:-1].diff() == 2).all()
    assert abs(pixels.float().mean().item() - 63.5) < 1
    mirrored = cut(ramp, type(frame)(frame.resized, frame.window, True))
    assert torch.equal(mirrored, pixels.flip(-1))
    assert cut(ramp, Framing().frame(64, 128)).data_ptr() == ramp.data_ptr()  # nothing to do


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 100, "multiple": 8}, "size: expected a multiple of 8, the codec's factor, got 100"),
        ({"size": 64, "step": 12, "multiple": 8}, "bucket_step: expected a multiple of 8"),
        ({"size": 64, "step": 128}, "of at most 64, got 128"),
        ({"step": 64}, "buckets: expected a size of their area"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        Framing(**arguments)
