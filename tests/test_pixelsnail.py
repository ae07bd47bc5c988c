"""What every prior promises, tested with PixelCNN over each kind of data and with PixelSNAIL."""

import math

import pytest
import torch

from latent_codec.models.autoregressive import IncrementalSampler, draw, filter_logits
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.pixelsnail import PixelSNAIL

SIZES = [(6, 6), (8, 5)]
LATENTS = {
    "data": "latents",
    "data_channels": 2,
    "latent_steps": (0.1, 0.2),
    "latent_minimum": -4,
    "latent_maximum": 4,
    "num_mixtures": 3,
}
CODES = {"data": "codes", "codebook_size": 11}
PIXELS = {"data": "pixels", "data_channels": 3}
ATTENTION = {"codebook_size": 11, "num_blocks": 1, "num_layers": 1, "attention_channels": 8, "num_heads": 2}
PRIORS = {
    "codes": (PixelCNN, CODES),
    "codes-wide": (PixelCNN, CODES | {"kernel_size": 5}),
    "codes-class": (PixelCNN, CODES | {"num_classes": 3}),
    "codes-features": (PixelCNN, CODES | {"condition_channels": 2}),
    "codes-conditional": (PixelCNN, CODES | {"num_classes": 3, "condition_codebook_size": 5}),
    "pixels": (PixelCNN, PIXELS),
    "pixels-class": (PixelCNN, PIXELS | {"num_classes": 3}),
    "latents": (PixelCNN, LATENTS),
    "latents-conditional": (PixelCNN, LATENTS | {"num_classes": 3, "condition_channels": 2}),
    "snail": (PixelSNAIL, ATTENTION),
    "snail-class": (PixelSNAIL, ATTENTION | {"num_classes": 3}),
    "snail-features": (PixelSNAIL, ATTENTION | {"condition_channels": 2}),
    "snail-conditional": (
        PixelSNAIL,
        ATTENTION
        | {
            "num_blocks": 2,
            "attention_channels": 6,
            "num_heads": 3,
            "num_classes": 3,
            "condition_codebook_size": 5,
        },
    ),
}
WITH_EVERY_PART = ["codes-conditional", "pixels-class", "latents-conditional", "snail-conditional"]


def tiny(name, dtype=torch.float64, **config):
    torch.manual_seed(0)
    kind, own = PRIORS[name]
    model = kind(**{"hidden_channels": 8, "kernel_size": 3, "num_layers": 2} | own | config).to(dtype).eval()
    with torch.no_grad():  # logits that differ between values, as a trained model's do
        for output in model.head.outputs:
            output.weight.mul_(8)
    return model


def inputs(model, batch=2, height=6, width=6, seed=1) -> tuple:
    """Indices, condition and labels that fit `model`; the condition has half the rows and 1 column."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.data_channels, height, width) if model.has_channels else (batch, height, width)
    indices = torch.randint(0, model.num_values, shape, generator=generator)
    condition, labels = None, None
    sides = (height // 2 if height % 2 == 0 else 1, 1)
    if model.config.condition_codebook_size:
        condition = torch.randint(0, 5, (batch, *sides), generator=generator)
    if model.config.condition_channels:
        condition = torch.randn(batch, 2, *sides, generator=generator).to(model.dtype)
    if model.config.num_classes:
        labels = torch.randint(0, 3, (batch,), generator=generator)
    return indices, condition, labels


@torch.no_grad()
def cached_logits(model, indices, condition, labels) -> torch.Tensor:
    """`logits` by way of the caches, position after position."""
    values = indices if model.has_channels else indices[:, None]
    batch, channels, height, width = values.shape
    sampler = IncrementalSampler(
        model, batch, height, width, model._context(batch, height, width, condition, labels)
    )
    logits = []
    for place in values.flatten(2).unbind(2):
        sampler.advance()
        logits.append(torch.stack([sampler.logits(place, channel) for channel in range(channels)], 2))
        sampler.append(place)
    stacked = torch.stack(logits, -1).view(batch, -1, channels, height, width)
    return stacked if model.has_channels else stacked[:, :, 0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_every_position_depends_on_all_of_the_past_and_none_of_the_future(name, size):
    # as deep as the convolutions alone need to reach 7 rows up; attention reaches as far in one block
    depth = {} if PRIORS[name][0] is PixelSNAIL else {"num_layers": 4 if name == "codes-wide" else 7}
    model = tiny(name, **depth)
    indices, condition, labels = inputs(model, 1, *size)
    num_positions = size[0] * size[1]
    # all perturbed grids as one batch: grid q differs from the original in position q alone
    flat = indices.repeat(num_positions, *[1] * (indices.ndim - 1)).flatten(-2)
    every = torch.arange(num_positions)
    flat[every, ..., every] = (flat[every, ..., every] + model.num_values // 2) % model.num_values

    def logits(grids):
        around = [
            each if each is None else each.expand(num_positions, *each.shape[1:])
            for each in (condition, labels)
        ]
        found = model.logits(grids, *around)
        return (found if model.has_channels else found[:, :, None]).flatten(3)

    before = logits(indices.expand(num_positions, *indices.shape[1:]))  # as large a batch: the same roundings
    after = logits(flat.unflatten(-1, size))
    differs = (after != before).any(1)  # q, channel, p: a channel at p noticed the change at q
    past, future = every[:, None] < every, every[:, None] > every
    assert differs.transpose(1, 2)[past].all()
    assert not differs.transpose(1, 2)[future].any()
    assert not differs[every, 0, every].any()  # later channels of a position see its earlier ones


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_caches_give_the_whole_grids_logits(name, dtype, tolerance):
    model = tiny(name, dtype)
    for size in SIZES if dtype == torch.float32 else [*SIZES, (2, 9), (5, 1), (1, 1)]:
        arguments = inputs(model, 3, *size)
        whole, cached = model.logits(*arguments), cached_logits(model, *arguments)
        assert whole.dtype == cached.dtype == dtype
        assert (whole - cached).abs().max() <= tolerance * max(1, whole.abs().max()), size

        steps = cached.log_softmax(1).gather(1, arguments[0][:, None])[:, 0].flatten(1)
        log_prob = model.log_prob(*arguments)
        assert log_prob.shape == (3, *size)
        torch.testing.assert_close(steps.sum(1), log_prob.flatten(1).sum(1), rtol=1e-5, atol=0)


@torch.no_grad()
def naive_sample(model, indices, condition, labels, seed, known_mask=None, **options) -> torch.Tensor:
    """Whole-grid logits for every single index: the slow way that `sample` must agree with."""
    values = indices if model.has_channels else indices[:, None]
    values = torch.zeros_like(values) if known_mask is None else values * known_mask[:, None]
    batch, channels, height, width = values.shape
    generator = torch.Generator().manual_seed(seed)
    for i in range(height):
        uniforms = 1 - torch.rand(width, channels, batch, dtype=torch.float64, generator=generator)
        for j in range(width):
            for channel in range(channels):
                logits = model.logits(values if model.has_channels else values[:, 0], condition, labels)
                logits = logits[..., i, j] if not model.has_channels else logits[:, :, channel, i, j]
                drawn = draw(filter_logits(logits, *options.values()), uniforms[j, channel][:, None])
                free = torch.ones(batch, dtype=torch.bool) if known_mask is None else ~known_mask[:, i, j]
                values[free, channel, i, j] = drawn[free]
    return values if model.has_channels else values[:, 0]


PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None}
FILTERED = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}


@pytest.mark.parametrize("masked, options", [(False, FILTERED), (True, PLAIN)])
@pytest.mark.parametrize("name", PRIORS)
def test_samples_are_those_of_whole_grid_logits(name, masked, options):
    model = tiny(name)
    indices, condition, labels = inputs(model, 2, 4, 3)
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(5)) < 0.4 if masked else None
    known = {"known": indices, "known_mask": mask} if masked else {}
    arguments = {"generator": torch.Generator().manual_seed(3), **options, **known}
    found = model.sample(indices.shape, condition, labels, **arguments)

    assert torch.equal(found, naive_sample(model, indices, condition, labels, 3, mask, **options))
    if masked:
        at = mask[:, None].expand_as(found) if model.has_channels else mask
        assert torch.equal(found[at], indices[at])


@pytest.mark.parametrize("name", WITH_EVERY_PART)
def test_completion_of_ones_own_sample_is_the_sample(name):
    model = tiny(name)
    indices, condition, labels = inputs(model, 2, 4, 5)

    def sample(**options):
        return model.sample(
            indices.shape, condition, labels, generator=torch.Generator().manual_seed(7), **options
        )

    first = sample()
    assert first.unique().numel() > 2
    assert torch.equal(sample(), first)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2:] = mask[3] = True
    assert torch.equal(sample(known=first, known_mask=mask), first)
    elsewhere = model.sample(indices.shape, condition, labels, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(elsewhere, first)


def test_known_codes_after_a_hole_leave_the_hole_alone():
    model = tiny("snail")
    one, other = (inputs(model, 1, 5, 5, seed)[0] for seed in (1, 2))
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[3:] = True

    def complete(known):
        return model.sample(
            (1, 5, 5), known=known, known_mask=mask, generator=torch.Generator().manual_seed(0)
        )

    assert torch.equal(complete(one)[:, :3], complete(other)[:, :3])
    assert torch.equal(complete(one)[:, 3:], one[:, 3:])


def test_a_generator_per_grid_makes_grids_independent_of_their_batch():
    model = tiny("codes")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = model.sample((3, 4, 5), generator=generators)
    alone = [model.sample((1, 4, 5), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)]
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_samples_follow_the_probabilities():
    model = tiny("codes")
    with torch.no_grad():
        expected = model.logits(torch.zeros(1, 1, 1, dtype=torch.int64)).softmax(1).flatten()
    drawn = model.sample((20000, 1, 1), generator=torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount(minlength=11) / 20000
    # three standard deviations of a share of 20000 draws, at most
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=3 * 0.5 / math.sqrt(20000))


def test_filters_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]).log()
    kept = {
        "all": filter_logits(logits, 1.0, None, None).isfinite(),
        "greedy": filter_logits(logits, 0.0, None, None).isfinite(),
        "top_k": filter_logits(logits, 1.0, 2, None).isfinite(),
        "many": filter_logits(logits, 1.0, 4, 1.0).isfinite(),
        "top_p": filter_logits(logits, 1.0, None, 0.65).isfinite(),
    }
    assert kept["all"].all()
    assert kept["many"].all()
    assert kept["greedy"].tolist() == [[False, True, False, False], [True, False, False, False]]
    assert kept["top_k"].sum(1).tolist() == [2, 2]
    assert kept["top_k"][0].tolist() == [False, True, False, True]
    assert kept["top_p"].tolist() == [[False, True, False, True], [True, False, False, False]]
    torch.testing.assert_close(filter_logits(logits, 0.5, None, None), 2 * logits)
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    uniforms = torch.tensor([2**-53, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert [draw(probabilities, uniform.view(1, 1)).item() for uniform in uniforms] == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("name", ["codes", "pixels", "snail"])
def test_callback_sees_the_grid_grow(name):
    model = tiny(name)
    indices, condition, labels = inputs(model, 2, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = True
    seen = []

    def callback(grid, done):
        assert not grid.is_inference()
        assert not torch.is_grad_enabled()
        values = grid if model.has_channels else grid[:, None]
        assert not values.masked_select(~done[:, None]).any()
        seen.append((grid.clone(), done.clone()))

    final = model.sample(indices.shape, condition, labels, known=indices, known_mask=mask, callback=callback)
    assert len(seen) == 12
    assert torch.equal(seen[-1][0], final)
    for place, (grid, done) in enumerate(seen):
        expected = (torch.arange(12).view(1, 3, 4) <= place) | mask
        assert torch.equal(done, expected)
        at = done[:, None].expand_as(final) if model.has_channels else done
        assert torch.equal(grid[at], final[at])


@pytest.mark.parametrize("name", WITH_EVERY_PART)
@torch.no_grad()
def test_folder_gives_the_same_model(name, tmp_path):
    model = tiny(name, torch.float32)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    arguments = inputs(model)
    assert torch.equal(again.logits(*arguments), model.logits(*arguments))


def test_modules_hold_what_diffusers_asks_for():
    import sys

    for kind in (PixelCNN, PixelSNAIL):
        assert hasattr(sys.modules[kind.__module__], "ModelMixin")


@torch.no_grad()
def test_condition_and_labels_matter_and_any_dividing_size_goes():
    model = tiny("snail-conditional")
    indices = inputs(model, 2, 6, 8)[0]
    labels = torch.tensor([0, 1])
    top = torch.zeros(2, 3, 4, dtype=torch.int64)
    base = model.logits(indices, top, labels)
    assert not torch.equal(model.logits(indices, top + 1, labels), base)
    assert not torch.equal(model.logits(indices, top, labels + 1), base)
    for sides in [(1, 1), (6, 8), (2, 8), (6, 1)]:
        assert model.logits(indices, torch.ones(2, *sides, dtype=torch.int64), labels).shape == (2, 11, 6, 8)


def test_dropout_acts_in_training_alone_and_never_while_sampling():
    for name in ("codes", "snail"):
        model = tiny(name, dropout=0.5)
        indices = inputs(model)[0]
        assert torch.equal(model.log_prob(indices), model.log_prob(indices))
        samples = [model.sample((1, 4, 4), generator=torch.Generator().manual_seed(0))]
        model.train()
        assert not torch.equal(model.log_prob(indices), model.log_prob(indices))
        samples.append(model.sample((1, 4, 4), generator=torch.Generator().manual_seed(0)))
        assert torch.equal(*samples)
        assert model.training


@pytest.mark.parametrize("name", ["codes-conditional", "snail-conditional"])
def test_a_training_step_waits_for_no_device(name):
    model = tiny(name)
    model.check_ranges(*inputs(model))  # on the CPU, as training does
    there = [None if each is None else each.to("meta") for each in inputs(model)]
    with torch.device("meta"):  # whose tensors have no values to wait for
        (-model.to("meta")(*there).mean()).backward()
    with pytest.raises(RuntimeError, match="meta"):
        model.log_prob(*there)


@pytest.mark.parametrize("name", ["codes-conditional", "snail-conditional", "latents-conditional"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(name).train()
        calls = []
        if checkpointing:
            model.enable_gradient_checkpointing()
            inner = model._gradient_checkpointing_func
            model._gradient_checkpointing_func = lambda *each, inner=inner, calls=calls: (
                calls.append(1) or inner(*each)
            )
        (-model(*inputs(model)).mean()).backward()
        assert len(calls) == (len(model.layers) if checkpointing else 0)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@pytest.mark.parametrize("name", WITH_EVERY_PART)
def test_autocast_keeps_logits_in_float32(name):
    model = tiny(name, torch.float32)
    arguments = inputs(model)
    plain = model.log_prob(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(*arguments).dtype == torch.float32
        log_prob = model.log_prob(*arguments)
        log_prob.mean().backward()
        sample = model.sample(
            *[arguments[0].shape, *arguments[1:]], generator=torch.Generator().manual_seed(0)
        )
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(
        log_prob, plain, rtol=0.1, atol=0.1
    )  # bfloat16 rounds by 2^-8, several layers deep
    again = model.sample(*[arguments[0].shape, *arguments[1:]], generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample, again)


@pytest.mark.parametrize("name", WITH_EVERY_PART)
def test_half_precision_models_run(name):
    model = tiny(name, torch.bfloat16)
    arguments = inputs(model)
    assert model.logits(*arguments).dtype == torch.float32
    sample = model.sample(*[arguments[0].shape, *arguments[1:]])
    assert sample.max() < model.num_values


def test_bad_input_is_named():
    model = tiny("snail-conditional")
    indices, condition, labels = inputs(model, 2, 6, 6)
    cases = [
        (
            (indices, condition, torch.tensor([0, 3])),
            "class_labels: expected 0 to 2, classes of this .* got 0 to 3",
        ),
        ((indices, condition, torch.tensor([-1, 0])), "expected 0 to 2.* got -1 to 0"),
        ((indices, condition, torch.tensor([0])), r"class_labels \(2,\) .* got shape \(1,\)"),
        ((indices, condition, torch.tensor([0.0, 1.0])), "in torch.int64, got .* in torch.float32"),
        ((indices, condition, None), "has 3 classes; give class_labels"),
        ((indices, None, labels), r"made for a condition, indices .* in 0..4"),
        ((indices + 9, condition, labels), "indices: expected 0 to 10.* to 19"),
        ((indices - 11, condition, labels), "indices: .* got -11"),
        ((indices.float(), condition, labels), "float32; expected torch.int64"),
        ((indices[0], condition, labels), r"expected \(B, h, w\)"),
        ((indices, torch.zeros(2, 4, 6, dtype=torch.int64), labels), "sides divide the grid's, 6x6, got 4x6"),
        ((indices, torch.zeros(2, 12, 12, dtype=torch.int64), labels), "6x6, got 12x12"),
        ((indices, condition + 5, labels), "condition's indices: expected 0 to 4.* got 5"),
        ((indices, condition[:1], labels), r"the condition \(2, h', w'\)"),
        ((indices, condition.float(), labels), "in torch.int64, got .* in torch.float32"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            model.logits(*arguments)
        if not words.startswith(("indices", "float32;")) and arguments[0] is indices:
            with pytest.raises(ValueError, match=words):
                model.sample(indices.shape, *arguments[1:])
    plain = tiny("snail")
    with pytest.raises(ValueError, match="no classes; leave class_labels out"):
        plain.logits(indices, None, labels)
    with pytest.raises(ValueError, match="takes no condition"):
        plain.logits(indices, condition)
    other = tiny("latents-conditional")
    indices, _, labels = inputs(other)
    with pytest.raises(
        ValueError, match=r"expected the condition \(2, 2, h', w'\), got shape \(2, 3, 3, 3\)"
    ):
        other.logits(indices, torch.zeros(2, 3, 3, 3), labels)


def test_sampling_options_that_mean_nothing_are_refused():
    model = tiny("codes")
    known = inputs(model, 2, 4, 4)[0]
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    cases = [
        ({"temperature": -1.0}, "temperature: expected .* got -1"),
        ({"temperature": math.nan}, "temperature: expected .* got nan"),
        ({"top_k": 0}, "top_k: expected .* got 0"),
        ({"top_p": 0.0}, "top_p: expected .* got 0"),
        ({"top_p": 1.5}, "top_p: expected .* got 1.5"),
        ({"generator": [torch.Generator()] * 3}, "expected one generator, or one per grid, 2, got 3"),
        ({"known": known}, "belong together"),
        (
            {"known": known[:1], "known_mask": mask},
            r"known \(2, 4, 4\) in torch.int64, got shape \(1, 4, 4\)",
        ),
        ({"known": known, "known_mask": mask.float()}, "in torch.bool, got"),
        ({"known": known, "known_mask": mask[:, :2]}, r"known_mask .* got shape \(2, 2, 4\)"),
        ({"known": known + 11, "known_mask": mask}, "indices: expected 0 to"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            model.sample((2, 4, 4), **options)
    for shape in [(4, 4), (2, 0, 4), (2, 1, 4, 4)]:
        with pytest.raises(ValueError, match=r"expected \(B, h, w\)"):
            model.sample(shape)


def test_indices_outside_the_range_are_fine_where_nothing_is_known():
    model = tiny("codes")
    known = torch.full((1, 3, 3), -1)
    known[0, 1, 1] = 4
    sample = model.sample((1, 3, 3), known=known, known_mask=known[0] >= 0)
    assert sample[0, 1, 1] == 4
    assert sample.min() >= 0
