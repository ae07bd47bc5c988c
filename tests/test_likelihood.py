"""The likelihood of images under priors: figures against sums by hand, what is refused, and what is noted."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_codec import HierarchicalVQ, LatentCodec, PixelCNN, PixelSNAIL
from latent_codec.evaluation import likelihood as module
from latent_codec.evaluation.likelihood import measure_likelihood
from latent_codec.images.sources import open_source
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.latents.latent_files import save_indices

CNN = {"hidden_channels": 8, "num_layers": 2, "kernel_size": 3}
SNAIL = {"hidden_channels": 8, "num_blocks": 1, "num_layers": 1, "attention_channels": 8, "num_heads": 2}
SIZES = [(16, 16), (16, 16), (16, 16), (9, 13), (24, 16)]


def vq(strides=(4,), sizes=(12,), name="codes") -> LatentCodec:
    """Gray images; its codewords lie among what the encoder gives, so that images use several of them."""
    torch.manual_seed(0)
    model = HierarchicalVQ(
        in_channels=1,
        strides=strides,
        codebook_sizes=sizes,
        hidden_channels=8,
        residual_channels=4,
        embed_dim=4,
    )
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
    for quantizer in model.quantizers:
        quantizer.embedding.weight.data.normal_()
    return LatentCodec(model, name=name)


def kl() -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec(
        AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            latent_channels=2,
            scaling_factor=0.7,
        ),
        name="continuous",
    )


def sharpened(prior):
    """With logits that differ between values, as a trained model's do."""
    with torch.no_grad():
        for output in prior.head.outputs:
            output.weight.mul_(8)
    return prior.eval()


def cnn(**config) -> PixelCNN:
    torch.manual_seed(1)
    return sharpened(PixelCNN(**CNN | config))


def snail(**config) -> PixelSNAIL:
    torch.manual_seed(1)
    return sharpened(PixelSNAIL(**SNAIL | config))


def latents_prior(**config) -> PixelCNN:
    levels = {"latent_steps": (0.3, 0.2), "latent_minimum": -6, "latent_maximum": 6, "num_mixtures": 2}
    return cnn(**{"data": "latents", "data_channels": 2} | levels | config)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Gray images of SIZES, (height, width), in the classes 0 (two) and 1 (three)."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        path = folder / ("boot" if number < 2 else "shoe") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def source(photos):
    return open_source(photos)


def images(source):
    """Each image as a batch of one."""
    return [source.read(number, 1)[None].float() / 127.5 - 1 for number in range(len(source))]


def nats(prior, grid, condition=None, label=None) -> float:
    labels = None if label is None else torch.tensor([label])
    with torch.no_grad():
        return -float(prior.log_prob(grid, condition, labels).sum())


def entropy(values) -> float:
    """Bits, of order 0."""
    counts = Counter(values)
    return -sum(count / len(values) * math.log2(count / len(values)) for count in counts.values())


NUM_PIXELS = sum(height * width for height, width in SIZES)


@pytest.mark.parametrize("make", [cnn, snail])
def test_figures_are_those_of_a_sum_by_hand(make, source):
    codec, prior = vq(), make(codebook_size=12, num_classes=2)
    grids = [codec.encode_indices(image)[0] for image in images(source)]
    total = sum(nats(prior, grid, label=source.label(number)) for number, grid in enumerate(grids))
    codes = [code for grid in grids for code in grid.flatten().tolist()]
    assert len(set(codes)) > 4
    assert len(codes) == 3 * 16 + 3 * 4 + 6 * 4  # 9x13 is padded to 12x16

    progress = []
    found = measure_likelihood([prior], source, codec, on_progress=lambda *each: progress.append(each))
    (level,) = found.levels
    bits = total / math.log(2)
    assert level.bits_per_index == pytest.approx(bits / len(codes), rel=1e-6)
    assert level.perplexity == pytest.approx(2 ** (bits / len(codes)), rel=1e-5)
    assert level.order_0_bits_per_index == pytest.approx(entropy(codes), rel=1e-12)
    assert level.uniform_bits_per_index == math.log2(12)
    assert (level.num_indices, level.num_positions, level.first_grid) == (len(codes), len(codes), (4, 4))
    assert (found.num_images, found.num_dims) == (5, NUM_PIXELS)
    assert found.bits_per_dim == level.bits_per_dim == pytest.approx(bits / NUM_PIXELS, rel=1e-6)
    assert found.order_0_bits_per_dim == pytest.approx(entropy(codes) * len(codes) / NUM_PIXELS)
    assert found.uniform_bits_per_dim == pytest.approx(math.log2(12) * len(codes) / NUM_PIXELS)
    assert (found.kind, found.codec, found.label) == ("codes", "codes", "class")
    assert (found.notes, found.skipped) == ([], [])
    assert progress[-1] == (5, 5)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["levels"][0]["first_grid"] == [4, 4]


@pytest.mark.parametrize("num_codes", [12, 16])
@pytest.mark.parametrize("make", [cnn, snail])
def test_a_head_of_zeros_costs_log2_of_the_codebook(make, num_codes, source):
    prior = make(codebook_size=num_codes)
    for parameter in prior.head.parameters():
        torch.nn.init.zeros_(parameter)
    found = measure_likelihood([prior], source, vq(sizes=(num_codes,)))
    assert found.levels[0].bits_per_index == pytest.approx(math.log2(num_codes), rel=1e-7)
    assert found.label is None
    assert found.bits_per_dim == pytest.approx(found.uniform_bits_per_dim, rel=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_prior_over_pixels_needs_no_codec_and_takes_images_as_they_are(channels, source):
    prior = cnn(data="pixels", data_channels=channels)
    pixels = [source.read(number, channels).long() for number in range(5)]
    bits = sum(nats(prior, each[None]) for each in pixels) / math.log(2)
    found = measure_likelihood([prior], source)
    (level,) = found.levels
    assert (found.kind, found.codec, found.space_fingerprint) == ("pixels", None, None)
    assert found.num_dims == level.num_indices == channels * NUM_PIXELS
    assert level.num_positions == NUM_PIXELS
    assert found.bits_per_dim == level.bits_per_index == pytest.approx(bits / channels / NUM_PIXELS, rel=1e-6)
    each = [
        entropy([v for one in pixels for v in one[channel].flatten().tolist()]) for channel in range(channels)
    ]
    assert level.order_0_bits_per_index == pytest.approx(sum(each) / channels)
    for parameter in prior.head.parameters():
        torch.nn.init.zeros_(parameter)
    assert measure_likelihood([prior], source).bits_per_dim == pytest.approx(8, rel=1e-7)


def test_latents_cost_bits_per_value_next_to_their_own_levels(source):
    codec, prior = kl(), latents_prior()
    levels = [prior.encode_latents(codec.encode(image)) for image in images(source)]
    bits = sum(nats(prior, each) for each in levels) / math.log(2)
    found = measure_likelihood([prior], source, codec)
    (level,) = found.levels
    count = sum(each.numel() for each in levels)
    assert (level.num_indices, level.num_positions, level.num_values) == (count, count // 2, 13)
    assert level.bits_per_index == pytest.approx(bits / count, rel=1e-5)
    each = [
        entropy([v for one in levels for v in one[0, channel].flatten().tolist()]) for channel in range(2)
    ]
    assert level.order_0_bits_per_index == pytest.approx(sum(each) / 2)
    assert each[0] != pytest.approx(each[1])
    assert found.bits_per_dim == pytest.approx(bits / NUM_PIXELS, rel=1e-5)


def hierarchy(told) -> tuple[LatentCodec, list]:
    codec = vq((2, 2, 2), (11, 9, 13), name="levels")
    priors = [snail(codebook_size=11, num_classes=2)]
    for level in (1, 2):
        above = {"condition_codebook_size": (11, 9)[level - 1]} if told == "codes" else {}
        above = above or {"condition_channels": 4 * level}
        priors.append(cnn(codebook_size=(9, 13)[level - 1], num_classes=2 if level == 1 else None, **above))
    return codec, priors


@pytest.mark.parametrize("told", ["codes", "features"])
def test_levels_add_up_each_given_those_above_it(told, source):
    codec, priors = hierarchy(told)
    bits = [0.0, 0.0, 0.0]
    for number, image in enumerate(images(source)):
        grids = codec.encode_indices(image)
        quantized = [codebook.lookup(grid) for codebook, grid in zip(codec.autoencoder.quantizers, grids)]
        for level, prior in enumerate(priors):
            condition = None
            if level:
                features = codec.autoencoder.concatenate(quantized[:level])
                condition = grids[level - 1] if told == "codes" else features
            label = source.label(number) if prior.config.num_classes else None
            bits[level] += nats(prior, grids[level], condition, label) / math.log(2)

    found = measure_likelihood(priors, source, codec)
    assert [level.level for level in found.levels] == [0, 1, 2]
    assert [level.num_values for level in found.levels] == [11, 9, 13]
    for level, expected in zip(found.levels, bits):
        assert level.bits_per_index * level.num_indices == pytest.approx(expected, rel=1e-5)
        assert level.bits_per_dim == pytest.approx(expected / NUM_PIXELS, rel=1e-5)
    assert found.bits_per_dim == pytest.approx(sum(bits) / NUM_PIXELS, rel=1e-5)
    per_level = [level.order_0_bits_per_index * level.num_indices for level in found.levels]
    assert found.order_0_bits_per_dim == pytest.approx(sum(per_level) / NUM_PIXELS)
    assert found.notes == []

    for level, prior in enumerate(priors):  # one alone is known by its condition
        alone = measure_likelihood([prior], source, codec)
        assert alone.levels == [found.levels[level]]
        assert alone.notes == [f"bits per dim are only those of level {level}, of 3 levels"]


def test_latent_files_give_the_figures_of_their_images(source, tmp_path):
    codec, priors = hierarchy("features")
    encoded = open_encoded(encode_source(codec, source, tmp_path / "codes", images_per_file=2))
    expected = measure_likelihood(priors, source, codec)
    found = measure_likelihood(priors, encoded, codec)
    assert found.num_dims == expected.num_dims == NUM_PIXELS
    for level, other in zip(found.levels, expected.levels):
        assert level.order_0_bits_per_index == other.order_0_bits_per_index
        assert level.bits_per_index == pytest.approx(other.bits_per_index, rel=1e-5)

    continuous, prior = kl(), latents_prior()
    encoded = open_encoded(encode_source(continuous, source, tmp_path / "latents"))
    found = measure_likelihood([prior], encoded, continuous)
    expected = measure_likelihood([prior], source, continuous)
    assert found.bits_per_dim == pytest.approx(
        expected.bits_per_dim, rel=1e-4
    )  # levels at an edge may round over


def test_batches_of_any_size_give_the_same(source, monkeypatch):
    codec, priors = hierarchy("features")
    expected = measure_likelihood(priors, source, codec).to_dict()
    for name, size in (("BATCH_POSITIONS", 1), ("BATCH_PIXELS", 1)):
        monkeypatch.setattr(module, name, size)
        found = measure_likelihood(priors, source, codec).to_dict()
        for level, other in zip(found["levels"], expected["levels"]):
            assert level["bits_per_index"] == pytest.approx(other["bits_per_index"], rel=1e-6)
        assert found["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], rel=1e-6)
        assert found["order_0_bits_per_dim"] == expected["order_0_bits_per_dim"]


def test_labels_may_be_attributes(tmp_path):
    codec, prior = vq(), cnn(codebook_size=12, num_classes=2)
    grids = torch.randint(0, 12, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = [{"Smiling": True}, {"Smiling": False}, {"Smiling": 1, "Hat": 5}]
    path = tmp_path / "a.safetensors"
    save_indices(path, [grids], codec=codec, names=["a", "b", "c"], sizes=[(15, 16)] * 3, labels=labels)
    encoded = open_encoded(path)
    total = sum(nats(prior, grids[i : i + 1], label=int(labels[i]["Smiling"])) for i in range(3))
    found = measure_likelihood([prior], encoded, codec, label="Smiling")
    assert found.label == "Smiling"
    assert found.levels[0].bits_per_index == pytest.approx(total / math.log(2) / 48, rel=1e-6)
    assert found.num_dims == 3 * 15 * 16
    with pytest.raises(ValueError, match='label is "Hat", and a has the label'):
        measure_likelihood([prior], encoded, codec, label="Hat")


def test_a_limit_spreads_over_the_images(source):
    prior = cnn(data="pixels")
    found = measure_likelihood([prior], source, limit=2)
    assert found.num_images == 2
    assert found.num_dims == 16 * 16 + 16 * 16  # the images 0 and 2
    with pytest.raises(ValueError, match="limit of 0"):
        measure_likelihood([prior], source, limit=0)


def test_images_that_cannot_be_read_are_listed(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    prior = cnn(data="pixels")
    found = measure_likelihood([prior], open_source(tmp_path))
    assert (found.num_images, found.num_dims) == (1, 64)
    assert len(found.skipped) == 1 and "b.png" in found.skipped[0]
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no image could be read; the first of 2: .*a\.png"):
        measure_likelihood([prior], open_source(tmp_path))


def test_another_codec_of_the_same_form_is_noted(source):
    codec = vq()
    assert (
        measure_likelihood(
            [cnn(codebook_size=12, space_fingerprint=codec.space_fingerprint)], source, codec
        ).notes
        == []
    )
    (note,) = measure_likelihood([cnn(codebook_size=12, space_fingerprint="0" * 16)], source, codec).notes
    assert "0" * 16 in note and codec.space_fingerprint in note


def test_what_does_not_belong_together_is_refused(source, tmp_path):
    codes, continuous, two = vq(), kl(), vq((4, 2), (12, 12), name="two")
    encoded = open_encoded(encode_source(codes, source, tmp_path / "codes"))
    unquantized = open_encoded(encode_source(codes, source, tmp_path / "latents", indices=False))
    three = vq((2, 2, 2), (12, 12, 12), name="three")
    told = cnn(codebook_size=12, condition_codebook_size=12)
    for priors, images, codec, message in [
        ([cnn(codebook_size=16)], source, codes, "knows 16 codewords on level 0, and codes has 12"),
        (
            [cnn(codebook_size=12)],
            source,
            None,
            "expected the codec that the prior, a PixelCNN over codes was",
        ),
        (
            [cnn(codebook_size=12)],
            encoded,
            None,
            "expected the codec that the prior, a PixelCNN over codes was",
        ),
        ([cnn(codebook_size=12)], source, continuous, "does not fit continuous, which has no codebook"),
        ([latents_prior()], source, codes, "does not fit codes, which has 1 codebook"),
        (
            [latents_prior(latent_steps=(0.1,), data_channels=1)],
            source,
            continuous,
            "knows 1 latent channels",
        ),
        (
            [cnn(data="pixels")],
            source,
            codes,
            "expected none for the prior, a PixelCNN over pixels, got 'codes'",
        ),
        ([cnn(data="pixels")], encoded, None, "hold indices of codes, and the prior is over pixels"),
        ([cnn(codebook_size=12)], encoded, two, "hold indices of codes .*not of two"),
        ([cnn(codebook_size=12)], unquantized, codes, "hold latents of codes, and the prior is over codes"),
        (
            [told],
            source,
            codes,
            "made for a condition, indices .*0..11, and codes, whose codebooks have .12.",
        ),
        ([told], source, None, "made for a condition, .* and no codec"),
        ([told], source, three, "level 1 or 2 of three"),
        ([cnn(codebook_size=12)] * 3, source, two, "got 3: two has 2 levels"),
        ([told, cnn(codebook_size=12)], source, two, "for level 0, which takes indices"),
        ([cnn(codebook_size=12)] * 2, source, two, "for level 1, which takes no condition"),
        (
            [cnn(codebook_size=12, num_classes=1)],
            source,
            codes,
            "2.png is of class 1, and the prior has classes 0 to 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            measure_likelihood(priors, images, codec)


def test_damaged_weights_are_no_figure(source):
    prior = cnn(codebook_size=12)
    with torch.no_grad():
        prior.head.outputs[0].bias[3] = math.nan
    with pytest.raises(ValueError, match="level 0 gives nan bits"):
        measure_likelihood([prior], source, vq())
