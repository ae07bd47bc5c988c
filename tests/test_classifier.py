import re
import sys

import pytest
import torch
from torch.nn import functional as F

import latent_codec
from latent_codec.models.classifier import ImageClassifier


def tiny(**config) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        **{"in_channels": 3, "num_classes": 4, "block_out_channels": (8, 16), "norm_num_groups": 4} | config
    )


def make_images(*shape, seed=1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(28, 28), (17, 33), (5, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_of_image_gets_a_logit_per_class(size, dtype):
    logits = tiny().to(dtype)(make_images(2, 3, *size).to(dtype))
    assert logits.shape == (2, 4)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_the_widths_halve_the_grid_between_them():
    model = tiny(block_out_channels=(8, 16, 24), layers_per_block=2)
    shapes = [
        tuple(model.blocks[:end](model.conv_in(make_images(1, 3, 13, 8))).shape[1:]) for end in (2, 5, 8)
    ]
    assert shapes == [(8, 13, 8), (16, 7, 4), (24, 4, 2)]
    assert len(model.blocks) == 8


def test_it_learns_to_tell_dark_from_light():
    model = tiny(num_classes=2).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    labels = torch.arange(16) % 2
    images = (make_images(16, 3, 8, 8) * 0.5 + (labels[:, None, None, None] - 0.5)).requires_grad_()
    for step in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
            assert images.grad.abs().sum() > 0
        optimizer.step()
    model.eval()
    assert torch.equal(model(images).argmax(1), labels)


def test_dropout_is_for_training_and_a_image_does_not_depend_on_its_batch():
    model, images = tiny(dropout=0.5), make_images(3, 3, 8, 8)
    assert not torch.equal(model.train()(images), model(images))
    logits = model.eval()(images)
    assert torch.equal(logits, model(images))
    # Convolutions of other batch sizes may sum in another order.
    torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=0, atol=1e-5)


def test_a_folder_brings_back_logits_and_class_names(tmp_path):
    model = tiny(class_names=["cat", "dog", "hen", "pig"], sample_size=(28, 20)).eval()
    model.save_pretrained(tmp_path)
    again = ImageClassifier.from_pretrained(tmp_path)
    assert list(again.config.class_names) == ["cat", "dog", "hen", "pig"]
    assert list(again.config.sample_size) == [28, 20]
    # Loaded weights lie elsewhere in memory, so vectorized sums may run in another order.
    torch.testing.assert_close(
        again(make_images(1, 3, 9, 9)), model(make_images(1, 3, 9, 9)), rtol=0, atol=1e-5
    )


def test_diffusers_finds_the_class():
    assert latent_codec.ImageClassifier is ImageClassifier
    assert hasattr(sys.modules["latent_codec.models.classifier"], "ModelMixin")


@pytest.mark.parametrize(
    "images, told",
    [
        (torch.zeros(2, 1, 8, 8), "expected images (B, 3, H, W), got shape (2, 1, 8, 8)"),
        (torch.zeros(3, 8, 8), "expected images (B, 3, H, W), got shape (3, 8, 8)"),
        (torch.zeros(2, 3, 0, 8), "shape (2, 3, 0, 8)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "expected images as a floating-point tensor, got uint8"),
    ],
)
def test_other_input_is_refused(images, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        tiny()(images)


@pytest.mark.parametrize(
    "config, told",
    [
        ({"num_classes": 1}, "num_classes is 1; a classifier tells 2 or more apart"),
        ({"class_names": ["cat"]}, "expected 4 class_names, one per class, got 1"),
        ({"block_out_channels": (8, 10)}, "multiples of norm_num_groups, 4, got (8, 10)"),
        (
            {"block_out_channels": ()},
            "block_out_channels: expected one or more multiples of norm_num_groups, 4, got ()",
        ),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        tiny(**config)
