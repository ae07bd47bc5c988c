"""PriorPipeline over pixels, and over the codes or latents of each kind of autoencoder."""

import json
import math
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from latent_codec import AutoencoderVQ, HierarchicalVQ, ImageClassifier, LatentCodec, PixelCNN, PixelSNAIL
from latent_codec.models.scalar_quantizer import ScalarQuantizer
from latent_codec.pipelines import PriorPipeline, PriorPipelineOutput

NAMES = ["sandal", "boot", "bag"]
CNN = {"hidden_channels": 8, "num_layers": 2, "kernel_size": 3, "sample_size": (4, 4)}
CODES = CNN | {"codebook_size": 11, "num_classes": 3, "most_frequent": (7,)}
LATENTS = {
    "data": "latents",
    "data_channels": 2,
    "latent_steps": (0.3, 0.5),
    "latent_minimum": -4,
    "latent_maximum": 4,
    "num_mixtures": 2,
    "num_classes": 3,
    "most_frequent": (4, 5),
}
PIXELS = {"data": "pixels", "data_channels": 3, "num_classes": 3, "most_frequent": (255, 0, 9)}
SNAIL = {"hidden_channels": 8, "num_blocks": 1, "num_layers": 1, "attention_channels": 8, "num_heads": 2}
BLOCKS = {
    "block_out_channels": (8, 8),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 2,
}
KINDS = ["pixels", "AutoencoderVQ", "VQModel", "HierarchicalVQ", "AutoencoderKL"]


def sharpened(prior):
    """With logits that differ between values, as a trained model's do."""
    with torch.no_grad():
        for output in prior.head.outputs:
            output.weight.mul_(8)
    return prior.eval()


def codec_and_prior(kind, **config):
    """A random autoencoder, or None, and a random prior for it."""
    torch.manual_seed(0)
    if kind == "pixels":
        return None, sharpened(PixelCNN(**CNN | PIXELS | config))
    if kind == "AutoencoderKL":
        vae = AutoencoderKL(**BLOCKS, scaling_factor=0.7, shift_factor=0.1)
        return vae, sharpened(PixelCNN(**CNN | LATENTS | config))
    if kind == "HierarchicalVQ":
        vae = HierarchicalVQ(
            strides=(2,), hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=11
        )
        vae.quantizers[0].embedding.weight.data.normal_()
        return vae, sharpened(PixelCNN(**CODES | config))
    vae = {"AutoencoderVQ": AutoencoderVQ, "VQModel": VQModel}[kind](**BLOCKS, num_vq_embeddings=11)
    vae.quantize.embedding.weight.data.normal_()
    snail = {key: value for key, value in CODES.items() if key not in ("num_layers", "kernel_size")}
    return vae, sharpened(PixelSNAIL(**snail | SNAIL | config))


def classifier(**config) -> ImageClassifier:
    torch.manual_seed(1)
    config = {"in_channels": 3, "num_classes": 3, "block_out_channels": (8,), "norm_num_groups": 4} | config
    model = ImageClassifier(**config)
    model.linear.weight.data.mul_(20)  # sure of itself
    return model


def pipeline(kind, dtype=torch.float64, *, with_classifier=True, **config) -> PriorPipeline:
    vae, prior = codec_and_prior(kind, **config)
    judge = classifier() if with_classifier else None
    pipe = PriorPipeline(prior, vae, judge, NAMES if prior.config.num_classes else None).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second))


def decoded(pipe, indices, output_type="pt"):
    """Indices -> images without the pipeline."""
    if pipe.vae is None:
        return indices.float() / 127.5 - 1
    codec = LatentCodec(pipe.vae)
    if isinstance(pipe.vae, AutoencoderKL):
        quantizer = ScalarQuantizer(steps=LATENTS["latent_steps"], minimum=-4, maximum=4)
        return codec.decode(quantizer.decode(indices - 4), output_type=output_type)
    return codec.decode_indices([indices], output_type=output_type)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_what_the_prior_draws_for_the_labels_decoded(kind, dtype):
    pipe = pipeline(kind, dtype)
    generators = [seeded(seed) for seed in range(6)]
    output = pipe(["bag", 0, "boot"], 2, generator=generators, output_type="pt")
    assert isinstance(output, PriorPipelineOutput)
    assert output.class_labels == [2, 2, 0, 0, 1, 1]
    assert output.probabilities is None

    channels = {"pixels": (3,), "AutoencoderKL": (2,)}.get(kind, ())
    labels = torch.tensor(output.class_labels)
    again = [seeded(seed) for seed in range(6)]
    drawn = pipe.prior.sample((6, *channels, 4, 4), class_labels=labels, generator=again)
    assert same(output.indices, [drawn])
    assert len(drawn.unique(dim=0)) == 6
    side = 4 if kind == "pixels" else 8
    assert output.images.shape == (6, 3, side, side)
    assert output.images.dtype == torch.float32
    assert output.images.abs().max() <= 1
    assert torch.equal(output.images, decoded(pipe, drawn))


@pytest.mark.parametrize("kind", ["pixels", "VQModel"])
def test_output_types_show_the_same_images(kind):
    pipe = pipeline(kind)
    each = {name: pipe(1, 3, generator=seeded(), output_type=name) for name in ("pil", "pt", "np", "indices")}
    images = each["pt"].images
    np.testing.assert_allclose(each["np"].images, (images.permute(0, 2, 3, 1).numpy() + 1) / 2)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in each["pil"].images]))
    torch.testing.assert_close(
        pixels.permute(0, 3, 1, 2).float(), (images + 1) * 127.5, rtol=0, atol=0.5001
    )  # PIL's 8 bits round
    assert all(isinstance(image, Image.Image) for image in each["pil"].images)
    assert same(each["indices"].images, each["pt"].indices)
    images, indices, labels, probabilities = pipe(
        1, 3, generator=seeded(), output_type="pt", return_dict=False
    )
    assert torch.equal(images, images)
    assert same(indices, each["pt"].indices)
    assert (labels, probabilities) == ([1, 1, 1], None)


def test_pixels_become_the_images_that_have_them():
    pipe = pipeline("pixels")
    output = pipe(0, 2, generator=seeded())
    pixels = np.stack([np.asarray(image) for image in output.images])
    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2).long(), output.indices[0])


def test_a_prior_without_classes_draws_without_labels():
    pipe = pipeline("VQModel", with_classifier=False, num_classes=None)
    output = pipe(num_images=3, generator=seeded())
    assert len(output.images) == 3
    assert output.class_labels is None


@pytest.mark.parametrize("kind", ["pixels", "AutoencoderVQ", "AutoencoderKL"])
def test_a_seed_gives_the_same_images_in_batches_of_any_size(kind):
    pipe = pipeline(kind)
    expected = pipe([2, 0], 4, generator=seeded(), output_type="indices").indices[0]
    assert len(expected.unique(dim=0)) == 8
    for batch_size in (1, 3, 8):
        output = pipe([2, 0], 4, generator=seeded(), output_type="indices", batch_size=batch_size)
        assert torch.equal(output.indices[0], expected)
    fewer = pipe(2, 2, generator=seeded(), output_type="indices").indices[0]
    assert torch.equal(fewer, expected[:2])
    other = pipe([2, 0], 4, generator=seeded(6), output_type="indices").indices[0]
    assert not torch.equal(other, expected)
    torch.manual_seed(3)
    first = pipe(2, 2, output_type="indices").indices[0]
    assert not torch.equal(pipe(2, 2, output_type="indices").indices[0], first)
    torch.manual_seed(3)
    assert torch.equal(pipe(2, 2, output_type="indices").indices[0], first)


def test_temperature_and_top_k_reach_the_prior():
    pipe = pipeline("VQModel")
    most_probable = pipe(1, 2, temperature=0.0, generator=seeded(), output_type="indices").indices[0]
    assert torch.equal(most_probable[0], most_probable[1])
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(
            pipe(1, 2, generator=seeded(), output_type="indices", **options).indices[0], most_probable
        )


@pytest.mark.parametrize("height, width, positions", [(16, 4, (8, 2)), (None, 12, (4, 6)), (2, None, (1, 4))])
def test_height_and_width_are_in_pixels(height, width, positions):
    output = pipeline("VQModel")(0, height=height, width=width, output_type="pt")
    assert output.indices[0].shape == (1, *positions)
    assert output.images.shape == (1, 3, *(2 * side for side in positions))


@pytest.mark.parametrize(
    "kind, keep, num_kept",
    [
        ("VQModel", 0.25, 2),
        ("VQModel", 0.3, 3),
        ("VQModel", 0.01, 1),
        ("VQModel", 1.0, 8),
        ("pixels", 1, 1),
        ("AutoencoderKL", 8, 8),
    ],
)
def test_the_most_probable_images_of_each_label_are_kept(kind, keep, num_kept):
    pipe = pipeline(kind)
    drawn = pipe(["bag", "sandal"], 8, generator=seeded(), output_type="pt")
    with torch.no_grad():
        logits = pipe.classifier(drawn.images.double())
    probabilities = [
        math.exp(row[label]) / sum(math.exp(value) for value in row)
        for row, label in zip(logits.tolist(), drawn.class_labels)
    ]
    ranks = [
        sorted(range(first, first + 8), key=lambda place: -probabilities[place])[:num_kept]
        for first in (0, 8)
    ]
    places = [place for rank in ranks for place in rank]
    assert (
        len({round(probability, 6) for probability in probabilities}) == 16
    )  # no ties: an order to be found

    kept = pipe(["bag", "sandal"], 8, generator=seeded(), output_type="pt", keep=keep, batch_size=5)
    assert torch.equal(kept.indices[0], drawn.indices[0][places])
    assert kept.class_labels == [2] * num_kept + [0] * num_kept
    torch.testing.assert_close(
        kept.probabilities, torch.tensor([probabilities[place] for place in places]).double()
    )
    # The decoder of a smaller batch may sum in another order.
    torch.testing.assert_close(kept.images, drawn.images[places], rtol=0, atol=1e-5)
    grids = pipe(
        ["bag", "sandal"], 8, generator=seeded(), output_type="indices", keep=keep, batch_size=5
    ).images
    assert same(grids, kept.indices)


def test_seven_hundredths_of_a_hundred_are_seven():
    pipe = pipeline("VQModel", torch.float32)
    kept = pipe(0, 100, generator=seeded(), keep=0.07, height=2, width=2, output_type="indices")
    assert len(kept.indices[0]) == 7


def transformers_classifier(**config):
    torch.manual_seed(2)
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    shape = {"image_size": 8, "patch_size": 4, "num_labels": 3} | config
    return ViTForImageClassification(ViTConfig(**tiny | shape))


@pytest.mark.parametrize(
    "make",
    [transformers_classifier, lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))],
)
def test_any_model_whose_output_is_or_has_logits_is_a_classifier(make):
    vae, prior = codec_and_prior("VQModel")
    judge = make()
    pipe = PriorPipeline(prior, vae, judge)
    pipe.set_progress_bar_config(disable=True)
    kept = pipe(1, 4, generator=seeded(), keep=2, output_type="pt")
    assert not judge.training
    with torch.no_grad():
        answer = judge(kept.images)
    logits = answer if isinstance(answer, torch.Tensor) else answer.logits
    torch.testing.assert_close(kept.probabilities.float(), logits.softmax(1)[:, 1])
    assert kept.probabilities[0] >= kept.probabilities[1]


@pytest.mark.parametrize("kind", ["pixels", "AutoencoderVQ", "AutoencoderKL"])
def test_the_callback_sees_every_position_and_previews_show_the_commonest_index_elsewhere(kind):
    pipe = pipeline(kind)
    seen = []

    def remember(step, num_steps, grids, done):
        (grid,) = grids
        seen.append((step, num_steps, grid.clone(), done.clone(), pipe.partial_images(grids, done)))

    (indices,) = pipe(
        0, 3, generator=seeded(), batch_size=2, callback=remember, output_type="indices"
    ).indices
    assert [(step, num_steps) for step, num_steps, *_ in seen] == [(step, 32) for step in range(1, 33)]
    commonest = torch.tensor(pipe.prior.config.most_frequent).view(-1, 1, 1)
    for step, _, grid, done, previews in seen:
        final = indices[:2] if step <= 16 else indices[2:]
        assert done.flatten(1).sum(1).tolist() == [(step - 1) % 16 + 1] * len(final)
        everywhere = done[:, None].expand_as(final) if final.ndim == 4 else done
        assert torch.equal(grid[everywhere], final[everywhere])
        if step in (1, 7, 16):
            expected = torch.where(everywhere, final, commonest)
            images = decoded(pipe, expected)
            assert [image.tobytes() for image in previews] == [
                ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes() for image in images
            ]


def test_previews_show_index_0_where_no_commonest_is_known():
    pipe = pipeline("pixels", most_frequent=None)
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    (image,) = pipe.partial_images([torch.full((1, 3, 4, 4), 200)], nothing)
    assert not np.asarray(image).any()


@pytest.mark.parametrize("kind", ["pixels", "AutoencoderVQ", "AutoencoderKL"])
def test_known_indices_stay_and_the_rest_is_drawn(kind):
    pipe = pipeline(kind)
    (source,) = pipe(0, 1, generator=seeded(1), output_type="indices", height=12, width=8).indices
    mask = torch.zeros(source.shape[-2:], dtype=torch.bool)
    mask[:2] = True
    options = {"generator": seeded(), "output_type": "indices", "batch_size": 2}
    (completed,) = pipe([1, 2], 2, known=source[0], known_mask=mask, **options).indices
    assert completed.shape == (4, *source.shape[1:])
    assert torch.equal(completed[..., :2, :], source[..., :2, :].expand_as(completed[..., :2, :]))
    assert len(completed.unique(dim=0)) == 4

    masks = torch.stack([mask, mask, ~mask, torch.ones_like(mask)])
    other = torch.where(mask, source, -5)  # what is not known may hold anything
    known = torch.cat([other, other, source, source])
    options["generator"] = seeded()
    (each,) = pipe([1, 2], 2, known=known, known_mask=masks, **options).indices
    assert torch.equal(each[:2], completed[:2])
    assert torch.equal(each[2, ..., 2:, :], source[0, ..., 2:, :])
    assert torch.equal(each[3], source[0])


def test_a_image_is_completed():
    pipe = pipeline("AutoencoderVQ", torch.float32)
    image = torch.rand(1, 3, 8, 12, generator=seeded()) * 2 - 1
    (codes,) = LatentCodec(pipe.vae).encode_indices(image)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, :3] = True
    output = pipe(0, 2, known=codes, known_mask=mask, generator=seeded(), output_type="pt")
    assert output.images.shape == (2, 3, 8, 12)
    assert torch.equal(output.indices[0][:, :, :3], codes[:, :, :3].expand(2, -1, -1))


@pytest.mark.parametrize("judge", ["ours", "transformers"])
def test_a_folder_records_classes_that_diffusers_finds(judge, tmp_path):
    pipe = pipeline("AutoencoderVQ", torch.float32)
    if judge == "transformers":
        pipe.classifier = transformers_classifier().eval()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prior"] == ["latent_codec.models.pixelsnail", "PixelSNAIL"]
    assert index["vae"] == ["latent_codec.models.autoencoder_vq", "AutoencoderVQ"]
    assert index["class_names"] == NAMES
    assert (
        index["classifier"]
        == {
            "ours": ["latent_codec.models.classifier", "ImageClassifier"],
            "transformers": ["transformers", "ViTForImageClassification"],
        }[judge]
    )


def test_components_are_optional_in_a_folder_too(tmp_path):
    pipeline("pixels", torch.float32, with_classifier=False, num_classes=None).save_pretrained(tmp_path)
    pipe = PriorPipeline.from_pretrained(tmp_path)
    assert (pipe.vae, pipe.classifier, pipe.config.class_names) == (None, None, None)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_images=2).images) == 2


def test_the_progress_bar_counts_positions_of_all_batches(capfd):
    pipe = pipeline("VQModel")
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    pipe(0, 3, batch_size=2, generator=seeded())
    assert "32/32" in capfd.readouterr().err


def test_model_offload_calls_each_component_and_changes_nothing(monkeypatch):
    pipe = pipeline("VQModel", torch.float32)
    expected = pipe(0, 3, keep=2, generator=seeded(), output_type="pt")
    assert set(pipe.model_cpu_offload_seq.split("->")) == set(pipe.components)
    called = []
    before = CpuOffload.pre_forward

    def pre_forward(self, module, *arguments, **options):
        called.append(module)
        return before(self, module, *arguments, **options)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    pipe.enable_model_cpu_offload(device="cpu")
    output = pipe(0, 3, keep=2, generator=seeded(), output_type="pt")
    assert same(output.indices, expected.indices)
    assert torch.equal(output.images, expected.images)
    order = [called.index(component) for component in (pipe.classifier, pipe.prior, pipe.vae)]
    assert order == sorted(order)  # the classifier first looks at a blank image

    pipe.remove_all_hooks()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="use enable_model_cpu_offload"):
        pipe(0)


def test_a_prior_of_another_codec_is_warned_of(caplog):
    vae, _ = codec_and_prior("VQModel")
    own = LatentCodec(vae).space_fingerprint
    _, prior = codec_and_prior("VQModel", space_fingerprint=own)
    PriorPipeline(prior, vae)
    assert not caplog.records
    _, prior = codec_and_prior("VQModel", space_fingerprint="0123456789abcdef")
    PriorPipeline(prior, vae)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "0123456789abcdef" in record.getMessage()
    assert own in record.getMessage()
    caplog.clear()
    PriorPipeline(prior, vae.to(torch.float64))  # converted weights have another fingerprint
    assert not [record for record in caplog.records if record.name.startswith("latent_codec")]


KL = "AutoencoderKL"
MISFITS = {
    "codes": ("VQModel", {"codebook_size": 16}, "codebook_size 16, and vae, a VQModel, has a codebook of 11"),
    "channels": (
        KL,
        {"data_channels": 3, "latent_steps": (1, 1, 1), "most_frequent": None},
        "PixelCNN with data_channels 3, and vae a AutoencoderKL with 2 latent channels",
    ),
    "condition": ("VQModel", {"condition_codebook_size": 5}, "made for a condition, indices (B, h', w')"),
}


@pytest.mark.parametrize("kind, config, told", MISFITS.values(), ids=MISFITS)
def test_priors_that_do_not_fit_their_codec_are_refused(kind, config, told):
    vae, prior = codec_and_prior(kind, **config)
    with pytest.raises(ValueError, match=re.escape(told)):
        PriorPipeline(prior, vae)


@pytest.mark.parametrize(
    "prior_of, vae_of, told",
    [
        ("VQModel", "pixels", "prior is a PixelSNAIL over codes and vae is None"),
        (KL, "pixels", "prior is a PixelCNN over latents and vae is None"),
        ("pixels", "VQModel", "prior is a PixelCNN over pixels and vae a VQModel"),
        ("VQModel", KL, "prior is a PixelSNAIL over codes and vae a AutoencoderKL, which has no codebook"),
        (KL, "VQModel", "prior is a PixelCNN over latents and vae a VQModel, whose images are indices"),
    ],
)
def test_priors_of_other_data_are_refused(prior_of, vae_of, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        PriorPipeline(codec_and_prior(prior_of)[1], codec_and_prior(vae_of)[0])


def test_several_levels_are_for_the_other_pipeline():
    vae = HierarchicalVQ(hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=11)
    with pytest.raises(ValueError, match="HierarchicalVQ of 2 levels; HierarchicalPriorPipeline"):
        PriorPipeline(codec_and_prior("VQModel")[1], vae)


@pytest.mark.parametrize(
    "names, own, told",
    [
        (["a", "b"], None, "2 class_names, 2 of them different: the prior has 3 classes"),
        (["a", "b", "a"], None, "3 class_names, 2 of them different"),
        (["a", "b", "c"], ["a", "c", "b"], "['a', 'b', 'c'] and the classifier's ['a', 'c', 'b']"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(names, own, told):
    vae, prior = codec_and_prior("VQModel")
    with pytest.raises(ValueError, match=re.escape(told)):
        PriorPipeline(prior, vae, classifier(class_names=own), names)


BITS = torch.ones(4, 4, dtype=torch.bool)
GRID = torch.zeros(4, 4, dtype=torch.int64)
CALLS = {
    "none": ({}, "prior has 3 classes; give class_labels, 0 to 2 or their names"),
    "high": ({"class_labels": [0, 3]}, "class_labels are [0, 3]; prior has classes 0 to 2"),
    "negative": ({"class_labels": -1}, "class_labels are [-1]"),
    "empty": ({"class_labels": []}, "class_labels are []"),
    "unknown": ({"class_labels": "sandel"}, "'sandel' is none of the 3 class_names; there are sandal"),
    "keep-0": ({"keep": 0}, "keep is 0; give how many of the 4 images"),
    "keep-5": ({"keep": 5}, "keep is 5"),
    "keep-0.0": ({"keep": 0.0}, "keep is 0.0"),
    "keep-1.5": ({"keep": 1.5}, "keep is 1.5"),
    "keep-nan": ({"keep": math.nan}, "keep is nan"),
    "num": ({"num_images": 0}, "num_images is 0 and batch_size 64; both are at least 1"),
    "batch": ({"batch_size": 0}, "num_images is 4 and batch_size 0"),
    "height": ({"height": 9}, "height x width is 9x8; a position of VQModel has 2x2 pixels"),
    "width": ({"width": 0}, "height x width is 8x0"),
    "generators": (
        {"generator": [seeded()] * 3},
        "expected one generator, or one for each of 4 images, got 3",
    ),
    "type": ({"output_type": "latent"}, "output_type is 'latent'; allowed are pil, pt, np, indices"),
    "temperature": ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
    "mask": ({"known": GRID}, "known and known_mask belong together"),
    "known": ({"known_mask": BITS}, "known and known_mask belong together"),
    "range": (
        {"known": GRID + 11, "known_mask": BITS},
        "known: expected 0 to 10, indices of the prior, a PixelSNAIL; got 11 to 11",
    ),
    "dtype": (
        {"known": GRID.int(), "known_mask": BITS},
        "in torch.int64, got shape (4, 4) in torch.int32",
    ),
    "batch-of-known": (
        {"known": GRID.expand(3, -1, -1), "known_mask": BITS},
        "expected known (h, w) or (1, h, w) or (4, h, w) in torch.int64, got shape (3, 4, 4)",
    ),
    "mask-shape": (
        {"known": GRID, "known_mask": BITS[:3]},
        "expected known_mask (4, 4) or (1, 4, 4) or (4, 4, 4) in torch.bool, got shape (3, 4)",
    ),
    "mask-dtype": ({"known": GRID, "known_mask": GRID}, "in torch.bool, got shape (4, 4) in torch.int64"),
    "known-size": (
        {"known": GRID, "known_mask": BITS, "height": 16},
        "known is 4x4 and an image of 16x8 pixels has 8x4 positions",
    ),
}


@pytest.mark.parametrize("arguments, told", CALLS.values(), ids=CALLS)
def test_arguments_out_of_range_are_refused(arguments, told):
    call = {} if arguments == {} else {"class_labels": 0, "num_images": 4}
    with pytest.raises(ValueError, match=re.escape(told)):
        pipeline("VQModel")(**call | arguments)


@pytest.mark.parametrize(
    "change, arguments, told",
    [
        ({"sample_size": None}, {"class_labels": 0, "height": 8}, "the config of prior has no sample_size"),
        ({"num_classes": None}, {"class_labels": 0}, "class_labels are 0 and prior has no classes"),
        (
            {"num_classes": None},
            {"keep": 1},
            "keep ranks images by the probability of their class label, and prior has",
        ),
    ],
)
def test_what_a_prior_lacks_is_not_asked_of_it(change, arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        pipeline("VQModel", **change)(**arguments)


def broken_classifier() -> ImageClassifier:
    model = classifier()
    model.linear.bias.data[0] = math.nan
    return model


@pytest.mark.parametrize(
    "judge, told",
    [
        (None, "keep ranks images by a classifier, and the pipeline has none"),
        (
            classifier(num_classes=4),
            "the classifier ImageClassifier gave logits of shape (1, 4) for 1 images; the prior has 3",
        ),
        (classifier(in_channels=1), "expected images (B, 1, H, W), got shape (1, 3, 8, 8)"),
        (transformers_classifier(image_size=16), "(8*8) doesn't match model (16*16)"),
        (broken_classifier(), "the classifier ImageClassifier gave NaN or infinity in torch.float32"),
    ],
)
def test_a_classifier_that_does_not_fit_says_so_before_anything_is_drawn(judge, told):
    vae, prior = codec_and_prior("VQModel")
    pipe = PriorPipeline(prior, vae, judge)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    with pytest.raises(ValueError, match=re.escape(told)):
        pipe(0, 4, keep=2, callback=lambda *progress: drawn.append(progress))
    assert not drawn


def test_a_name_needs_names():
    vae, prior = codec_and_prior("VQModel")
    with pytest.raises(ValueError, match="as the pipeline has no class_names, got 'sandal'"):
        PriorPipeline(prior, vae)("sandal")
