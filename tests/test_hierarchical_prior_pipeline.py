"""HierarchicalPriorPipeline over two and three levels, told of the levels above by codes and by features."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.processes import run_forked
from safetensors.torch import load_file
from test_prior_pipeline import (
    BLOCKS,
    CNN,
    KINDS,
    NAMES,
    SNAIL,
    classifier,
    same,
    seeded,
    sharpened,
    transformers_classifier,
)
from test_prior_pipeline import pipeline as one_level_pipeline

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec, PixelCNN, PixelSNAIL
from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipelineOutput

SIZES = {2: (11, 9), 3: (11, 9, 13)}
LEVELS = {2: ["top_prior", "bottom_prior"], 3: ["top_prior", "middle_prior", "bottom_prior"]}
STEPS = {2: 2 * 2 + 4 * 4, 3: 2 * 2 + 4 * 4 + 8 * 8}


def autoencoder(num_levels) -> HierarchicalVQ:
    """Of 16x16 pixels: 2x2 codes at the top, then 4x4, then 8x8."""
    torch.manual_seed(0)
    strides = {2: (4, 2), 3: (2, 2, 2)}[num_levels]
    vae = HierarchicalVQ(
        strides=strides, hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=SIZES[num_levels]
    )
    for level, quantizer in enumerate(vae.quantizers):
        quantizer.embedding.weight.data.normal_()
        vae.set_usage(level, torch.arange(1.0, quantizer.codebook_size + 1))
    return vae


def priors(num_levels, told, **top) -> dict:
    """PixelSNAILs, the bottom one a PixelCNN, for 4x4 codes at the bottom of two levels and 8x8 of three."""
    torch.manual_seed(1)
    sizes = SIZES[num_levels]
    made = {}
    for level, name in enumerate(LEVELS[num_levels]):
        config = {"hidden_channels": 8, "codebook_size": sizes[level], "most_frequent": (level + 3,)}
        if level and told == "codes":
            config["condition_codebook_size"] = sizes[level - 1]
        if level and told == "features":
            config["condition_channels"] = 4 * level
        if level < num_levels - 1:
            config["num_classes"] = 3
        if level == 0:
            config |= {"sample_size": (2, 2)} | top
        kind, own = (PixelSNAIL, SNAIL) if level < num_levels - 1 else (PixelCNN, CNN)
        made[name] = sharpened(kind(**own | config))
    return made


def pipeline(num_levels=2, told="features", dtype=torch.float64, **top) -> HierarchicalPriorPipeline:
    components = priors(num_levels, told, **top)
    names = NAMES if components["top_prior"].config.num_classes else None
    pipe = HierarchicalPriorPipeline(
        autoencoder(num_levels), **components, classifier=classifier(), class_names=names
    ).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def drawn_by_hand(pipe, labels, told, generators, size=(2, 2)) -> list[torch.Tensor]:
    """Level after level, from the contract of conditions."""
    grids = []
    for level, name in enumerate(LEVELS[len(pipe.vae.quantizers)]):
        condition = None
        if level and told == "codes":
            condition = grids[-1]
        elif level:
            codewords = [quantizer.lookup(grid) for quantizer, grid in zip(pipe.vae.quantizers, grids)]
            condition = pipe.vae.concatenate(codewords)
            assert condition.shape[1:] == (4 * level, *grids[-1].shape[1:])
        prior = getattr(pipe, name)
        shape = (len(labels), *(side * 2**level for side in size))
        told_labels = torch.tensor(labels) if prior.config.num_classes else None
        grids.append(prior.sample(shape, condition, told_labels, generator=generators))
    return grids


@pytest.mark.parametrize("told", ["codes", "features"])
@pytest.mark.parametrize("num_levels", [2, 3])
def test_each_level_is_drawn_given_those_above(num_levels, told):
    pipe = pipeline(num_levels, told)
    generators = [seeded(seed) for seed in range(4)]
    output = pipe(["boot", 2], 2, generator=generators, output_type="pt", batch_size=3)
    assert isinstance(output, PriorPipelineOutput)
    assert output.class_labels == [1, 1, 2, 2]
    expected = drawn_by_hand(pipe, output.class_labels, told, [seeded(seed) for seed in range(4)])
    assert same(output.indices, expected)
    assert all(len(grid.unique(dim=0)) == 4 for grid in expected[1:])
    assert output.images.shape == (4, 3, 16, 16)
    # The decoder of a smaller batch may sum in another order.
    images = LatentCodec(pipe.vae).decode_indices(expected, output_type="pt")
    torch.testing.assert_close(output.images, images, rtol=0, atol=1e-6)


def test_a_condition_changes_what_is_drawn_below():
    """So that the test above can fail: the bottom prior does listen."""
    pipe = pipeline(2, "features")
    ones = [torch.full((1, 2, 2), value) for value in (1, 8)]
    drawn = []
    with torch.no_grad():
        for top in ones:
            condition = pipe.vae.quantizers[0].lookup(top)
            drawn.append(pipe.bottom_prior.sample((1, 4, 4), condition, generator=seeded()))
    assert not torch.equal(*drawn)


def test_other_sizes_and_single_precision():
    pipe = pipeline(3, "features", torch.float32)
    output = pipe(0, 2, height=24, width=8, generator=seeded(), output_type="np")
    assert [tuple(grid.shape) for grid in output.indices] == [(2, 3, 1), (2, 6, 2), (2, 12, 4)]
    assert output.images.shape == (2, 24, 8, 3)
    assert output.images.dtype == np.float32


def test_priors_without_classes_draw_without_labels():
    pipe = HierarchicalPriorPipeline(
        autoencoder(2), **priors(2, "codes", num_classes=None), class_names=None, classifier=None
    )
    pipe.set_progress_bar_config(disable=True)
    output = pipe(num_images=2, generator=seeded())
    assert [image.size for image in output.images] == [(16, 16)] * 2
    assert output.class_labels is None


def test_a_seed_gives_the_same_images_in_batches_of_any_size():
    pipe = pipeline(3)
    options = {"output_type": "indices"}
    expected = pipe([0, 1], 3, generator=seeded(), **options).indices
    for batch_size in (1, 4):
        assert same(pipe([0, 1], 3, generator=seeded(), batch_size=batch_size, **options).indices, expected)
    fewer = pipe(0, 2, generator=seeded(), **options).indices
    assert same(fewer, [grid[:2] for grid in expected])


def test_the_most_probable_images_are_kept_on_every_level():
    pipe = pipeline(2)
    drawn = pipe([0, 2], 6, generator=seeded(), output_type="pt")
    with torch.no_grad():
        probabilities = pipe.classifier(drawn.images.double()).softmax(1)
    own = probabilities[torch.arange(12), torch.tensor(drawn.class_labels)]
    places = [int(place) + first for first in (0, 6) for place in own[first : first + 6].topk(2).indices]
    kept = pipe([0, 2], 6, generator=seeded(), output_type="pt", keep=1 / 3, batch_size=5)
    assert same(kept.indices, [grid[places] for grid in drawn.indices])
    assert kept.class_labels == [0, 0, 2, 2]
    torch.testing.assert_close(kept.probabilities, own[places])
    # The decoder of a smaller batch may sum in another order.
    torch.testing.assert_close(kept.images, drawn.images[places], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_levels", [2, 3])
def test_the_callback_sees_levels_begin_one_by_one(num_levels):
    pipe = pipeline(num_levels)
    codec = LatentCodec(pipe.vae)
    seen = []

    def remember(step, num_steps, grids, done):
        copies = [grid.clone() for grid in grids]
        images = pipe.partial_images(grids, done) if step in (2, 7, 13) else None
        seen.append((step, num_steps, copies, done.clone(), images))

    final = pipe(0, 3, generator=seeded(), batch_size=2, callback=remember, output_type="indices").indices
    steps = STEPS[num_levels]
    assert [(step, num_steps) for step, num_steps, *_ in seen] == [
        (step, 2 * steps) for step in range(1, 2 * steps + 1)
    ]
    for step, _, grids, done, images in seen:
        place = (step - 1) % steps  # of a batch
        level = 0 if place < 4 else 1 if place < 20 else 2
        assert len(grids) == level + 1
        batch = slice(0, 2) if step <= steps else slice(2, 3)
        assert same(grids[:-1], [grid[batch] for grid in final[:level]])
        assert done.shape == grids[-1].shape
        assert (done.flatten(1).sum(1) == place - (0, 4, 20)[level] + 1).all()
        assert torch.equal(grids[-1][done], final[level][batch][done])
        if images is not None:
            shown = [*grids[:-1], torch.where(done, grids[-1], level + 3)]
            expected = codec.decode_indices(shown)  # below: the mean codeword
            assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


RELOADER = """
import sys
from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipeline
import json, torch
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    pipeline_class = globals()[json.load(open(folder + "/model_index.json"))["_class_name"]]
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(["bag", 0], 2, keep=1, generator=torch.Generator().manual_seed(5), output_type="pt")
    grids = {f"level{level}": grid for level, grid in enumerate(output.indices)}
    answer = {"images": output.images, "probabilities": output.probabilities} | grids
    save_file({key: value.contiguous() for key, value in answer.items()}, folder + "/answer.safetensors")
"""


def test_a_fresh_process_draws_the_same_images_from_saved_folders(tmp_path):
    """Of both pipelines, in a process that imports no model before their classes."""
    pipes = {kind: one_level_pipeline(kind, torch.float32) for kind in KINDS}
    pipes["transformers"] = one_level_pipeline("VQModel", torch.float32)
    pipes["transformers"].classifier = transformers_classifier().eval()
    pipes |= {"two": pipeline(2, "codes", torch.float32), "three": pipeline(3, "features", torch.float32)}
    for kind, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / kind)
    index = json.loads((tmp_path / "two" / "model_index.json").read_text())
    assert index["middle_prior"] == [None, None]
    assert index["vae"] == ["latent_codec.models.hierarchical_vq", "HierarchicalVQ"]

    run_forked(RELOADER, *(tmp_path / kind for kind in pipes))
    for kind, pipe in pipes.items():
        expected = pipe(["bag", 0], 2, keep=1, generator=seeded(), output_type="pt")
        answer = load_file(tmp_path / kind / "answer.safetensors")
        assert same([answer[f"level{level}"] for level in range(len(expected.indices))], expected.indices)
        # Loaded weights lie elsewhere in memory, so vectorized sums may run in another order.
        torch.testing.assert_close(answer["images"], expected.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(answer["probabilities"], expected.probabilities, rtol=0, atol=1e-4)


def test_every_component_has_its_place_in_model_offload():
    pipe = pipeline(3, "features", torch.float32)
    assert set(pipe.model_cpu_offload_seq.split("->")) == set(pipe.components)
    options = {"keep": 1, "output_type": "indices"}
    expected = pipe(0, 2, generator=seeded(), **options).indices
    pipe.enable_model_cpu_offload(device="cpu")

    def preview(step, num_steps, grids, done):
        if step % 20 == 0:
            pipe.partial_images(grids, done)

    output = pipe(0, 2, generator=seeded(), callback=preview, **options)
    assert same(output.indices, expected)


def test_every_prior_of_another_codec_is_warned_of(caplog):
    vae = autoencoder(2)
    own = LatentCodec(vae).space_fingerprint
    components = priors(2, "codes", space_fingerprint=own)
    HierarchicalPriorPipeline(vae, **components)
    assert not caplog.records
    components["bottom_prior"].register_to_config(space_fingerprint="0123456789abcdef")
    HierarchicalPriorPipeline(vae, **components)
    (record,) = caplog.records
    assert re.search(f"^bottom_prior .*0123456789abcdef.*{own}", record.getMessage())


def replaced(num_levels=2, told="codes", **changes) -> dict:
    """Components, one of them with another config."""
    components = {"vae": autoencoder(num_levels), **priors(num_levels, told)}
    for name, change in changes.items():
        if change is None or isinstance(change, torch.nn.Module):
            components[name] = change
        else:
            kind = type(components[name])
            config = {key: value for key, value in components[name].config.items() if not key.startswith("_")}
            components[name] = kind(**config | change)
    return components


MISFITS = {
    "codebook": (
        {"bottom_prior": {"codebook_size": 16}},
        "bottom_prior is a PixelCNN with codebook_size 16, and level 1 of vae, a HierarchicalVQ, has a codebook of 9",
    ),
    "top-condition": (
        {"top_prior": {"condition_codebook_size": 3}},
        "top_prior is a PixelSNAIL made for a condition, indices (B, h', w'), int64 in 0..2; nothing is above the top",
    ),
    "no-condition": (
        {"bottom_prior": {"condition_codebook_size": None}},
        "bottom_prior is a PixelCNN made without a condition",
    ),
    "condition-codes": (
        {"bottom_prior": {"condition_codebook_size": 12}},
        "condition_codebook_size 12, and level 0 of vae, a HierarchicalVQ, has a codebook of 11",
    ),
    "condition-channels": (
        {"bottom_prior": {"condition_codebook_size": None, "condition_channels": 8}},
        "condition_channels 8, and the levels above it in vae, a HierarchicalVQ, have 4 channels",
    ),
    "middle-channels": (
        {
            "num_levels": 3,
            "told": "features",
            "bottom_prior": {"condition_channels": 4},
        },
        "bottom_prior is a PixelCNN with condition_channels 4, and the levels above it in vae, a HierarchicalVQ, have 8",
    ),
    "data": (
        {"bottom_prior": {"data": "pixels"}},
        "bottom_prior is a PixelCNN over pixels, and vae a HierarchicalVQ, whose images are indices",
    ),
    "classes": ({"bottom_prior": {"num_classes": 4}}, "top_prior has 3, bottom_prior has 4"),
    "missing": (
        {"num_levels": 3, "middle_prior": None},
        "vae is a HierarchicalVQ of 3 levels, and there are 2 priors (top_prior, bottom_prior)",
    ),
    "vae": (
        {"vae": AutoencoderVQ(**BLOCKS, num_vq_embeddings=11)},
        "vae is a AutoencoderVQ; a HierarchicalVQ is needed. PriorPipeline samples codecs of one level",
    ),
}


@pytest.mark.parametrize("changes, told", MISFITS.values(), ids=MISFITS)
def test_components_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        HierarchicalPriorPipeline(**replaced(**changes))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            {"height": 12},
            "height x width is 12x16; a position of HierarchicalVQ has 8x8 pixels: give multiples of 8",
        ),
        ({"class_labels": 3}, "class_labels are [3]; top_prior has classes 0 to 2"),
        ({"keep": 2}, "keep is 2; give how many of the 1 images"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        (
            {"known": torch.zeros(1, 2, 2, dtype=torch.int64)},
            "known: expected None, as HierarchicalPriorPipeline completes no levels",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        pipeline()(**{"class_labels": 0} | arguments)
