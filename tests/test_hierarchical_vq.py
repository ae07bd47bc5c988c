import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from latent_codec.models.hierarchical_vq import HierarchicalVQ

LEVELS = {1: (4,), 2: (4, 2), 3: (2, 4, 2)}


def tiny(strides=(4, 2), seed=0, **config) -> HierarchicalVQ:
    """A small model whose latents spread over its codewords, as a trained one's do."""
    torch.manual_seed(seed)
    config = {"hidden_channels": 8, "residual_channels": 4, "embed_dim": 4, "codebook_sizes": 16} | config
    model = HierarchicalVQ(strides=strides, **config)
    with torch.no_grad():
        for conv in (module for module in model.modules() if isinstance(module, torch.nn.Conv2d)):
            torch.nn.init.kaiming_normal_(conv.weight)
        for quantizer in model.quantizers:
            quantizer.embedding.weight.normal_()
            quantizer.project_codebook()
    return model


def make_image(height=32, width=32, batch=2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


PORT_NAMES = {
    "enc_t.blocks.0.": "encoders.0.downsampling.0.",
    "enc_t.blocks.2.": "encoders.0.downsampling.2.",
    "enc_t.blocks.3.": "encoders.0.residual.0.",
    "enc_t.blocks.4.": "encoders.0.residual.1.",
    "enc_b.blocks.0.": "encoders.1.downsampling.0.",
    "enc_b.blocks.2.": "encoders.1.downsampling.2.",
    "enc_b.blocks.4.": "encoders.1.downsampling.4.",
    "enc_b.blocks.5.": "encoders.1.residual.0.",
    "enc_b.blocks.6.": "encoders.1.residual.1.",
    "dec_t.blocks.0.": "decoders.0.conv_in.",
    "dec_t.blocks.1.": "decoders.0.residual.0.",
    "dec_t.blocks.2.": "decoders.0.residual.1.",
    "dec_t.blocks.4.": "decoders.0.upsampling.0.",
    "dec.blocks.0.": "decoders.1.conv_in.",
    "dec.blocks.1.": "decoders.1.residual.0.",
    "dec.blocks.2.": "decoders.1.residual.1.",
    "dec.blocks.4.": "decoders.1.upsampling.0.",
    "dec.blocks.6.": "decoders.1.upsampling.2.",
    "quantize_conv_t.": "quantize_convs.0.",
    "quantize_t.embed": "codebooks.0.embedding.weight",
    "quantize_t.cluster_size": "usage_0",
    "quantize_conv_b.": "quantize_convs.1.",
    "quantize_b.embed": "codebooks.1.embedding.weight",
    "quantize_b.cluster_size": "usage_1",
    "upsample_t.": "upsamplers.0.0.",
    "conv.1.": "conv1.",  # of a residual block
    "conv.3.": "conv2.",
}


def renamed(port: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of rosinality/vq-vae-2-pytorch, with 2 residual blocks, under our names."""
    state = {}
    for key, tensor in port.items():
        if key.endswith(".embed_avg"):  # a moment of the port's training, not of the model
            continue
        name = key
        for theirs, ours in PORT_NAMES.items():
            name = re.sub(rf"(^|(?<=\.)){re.escape(theirs)}", ours, name)
        state[name] = tensor.T if key.endswith(".embed") else tensor
    return state


@pytest.fixture(scope="module")
def golden(shared):
    """The port's checkpoint in our model, and what the port's own code answered in float64."""
    folder = shared / "golden" / "conversion"
    port = torch.load(folder / "rosinality_vqvae2.pt", weights_only=True)
    model = HierarchicalVQ(hidden_channels=64, embed_dim=32, codebook_sizes=256)
    model.load_state_dict(renamed(port))
    return model, load_file(folder / "rosinality_vqvae2.expected.safetensors")


@torch.no_grad()
def test_port_checkpoint_gives_its_own_indices_and_reconstruction(golden):
    model, expected = golden
    top, bottom = model.encode_quantized(expected["input"])
    assert torch.equal(top.indices, expected["indices_top"])
    assert torch.equal(bottom.indices, expected["indices_bottom"])
    # float32 against float64, values up to 0.2: some dozen roundings of 2^-24 each
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(top.quantized.double(), expected["quant_top"], **close)
    torch.testing.assert_close(bottom.quantized.double(), expected["quant_bottom"], **close)
    torch.testing.assert_close(model(expected["input"]).sample.double(), expected["recon"], **close)
    grids = [expected["indices_top"], expected["indices_bottom"]]
    torch.testing.assert_close(model.decode_indices(grids).double(), expected["recon"], **close)


@pytest.mark.parametrize("num_levels", LEVELS)
@torch.no_grad()
def test_shapes_of_levels_latents_and_image(num_levels):
    strides = LEVELS[num_levels]
    model, image = tiny(strides), make_image(32, 48)
    shapes = [(32 // math.prod(strides[:n]), 48 // math.prod(strides[:n])) for n in range(num_levels, 0, -1)]

    assert model.grid_shapes(32, 48) == shapes
    assert model.downsampling_factor == strides[0]
    assert model.multiple == math.prod(strides)
    grids = model.encode_indices(image)
    assert [tuple(grid.shape) for grid in grids] == [(2, *shape) for shape in shapes]
    assert all(grid.dtype == torch.int64 and len(grid.unique()) > 1 for grid in grids)
    latents = model.encode(image).latents
    assert latents.shape == (2, model.latent_channels, *shapes[-1]) == (2, 4 * num_levels, *shapes[-1])
    assert model.decode(latents, generator=torch.Generator()).sample.shape == image.shape
    assert torch.equal(model.decode(latents, return_dict=False)[0], model(image).sample)


@pytest.mark.parametrize("num_levels", LEVELS)
@torch.no_grad()
def test_indices_hold_the_whole_reconstruction(num_levels):
    model, image = tiny(LEVELS[num_levels]), make_image(32, 48)
    quantized = [output.quantized for output in model.encode_quantized(image)]
    image_of_indices = model.decode_indices(model.encode_indices(image))
    # a straight-through estimate z + (e - z) is the codeword e up to a rounding
    torch.testing.assert_close(image_of_indices, model(image).sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(image_of_indices, model.decode_quantized(quantized), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_level_of_stride_8():
    model, image = tiny((8,), codebook_sizes=(5,)), make_image()
    (grid,) = model.encode_indices(image)
    assert grid.shape == (2, 4, 4)
    assert grid.max() < 5
    assert model.decode_indices([grid]).shape == image.shape


@pytest.mark.parametrize("num_levels", LEVELS)
@torch.no_grad()
def test_folder_gives_the_same_model(num_levels, tmp_path):
    sizes = (16, 8, 4)[:num_levels]
    model = tiny(LEVELS[num_levels], codebook_sizes=sizes, latents_mean=[0.5] * 4 * num_levels, beta=0.5)
    model.set_usage(0, torch.arange(16.0))
    model.save_pretrained(tmp_path)
    again = HierarchicalVQ.from_pretrained(tmp_path)

    assert [quantizer.codebook_size for quantizer in again.quantizers] == list(sizes)
    assert all(quantizer.beta == 0.5 for quantizer in again.quantizers)
    assert again.config.latents_mean == model.config.latents_mean
    state, saved = again.state_dict(), model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    assert torch.equal(again(make_image()).sample, model(make_image()).sample)


@torch.no_grad()
def test_missing_levels_are_their_mean_codeword():
    model, image = tiny(LEVELS[3], codebook_sizes=(16, 8, 4)), make_image(32, 64)
    grids = model.encode_indices(image)
    model.set_usage(1, torch.tensor([0, 3, 0, 0, 0, 1, 0, 0]))
    middle, bottom = (quantizer.embedding.weight for quantizer in model.quantizers[1:])
    torch.testing.assert_close(model.mean_codeword(1), 0.75 * middle[1] + 0.25 * middle[5])
    torch.testing.assert_close(model.mean_codeword(2), bottom.mean(0))

    def constant(level):
        height, width = model.grid_shapes(32, 64)[level]
        return model.mean_codeword(level).view(1, -1, 1, 1).repeat(2, 1, height, width)

    top, *_ = (quantizer.lookup(grid) for quantizer, grid in zip(model.quantizers, grids))
    torch.testing.assert_close(
        model.decode_indices(grids[:1]), model.decode_quantized([top, constant(1), constant(2)])
    )
    assert model.decode_indices(grids[:2]).shape == image.shape
    assert not torch.allclose(model.decode_indices(grids[:1]), model.decode_indices(grids[:2]))


@torch.no_grad()
def test_usage_without_counts_is_uniform():
    model = tiny()
    model.usage_0.zero_()  # as in a checkpoint of the port that was never trained
    torch.testing.assert_close(model.mean_codeword(0), model.quantizers[0].embedding.weight.mean(0))


@torch.no_grad()
def test_what_upper_levels_say_changes_what_lower_ones_quantize():
    model, image = tiny(LEVELS[3]), make_image()
    before = model.encode_quantized(image)
    model.quantizers[0].embedding.weight.mul_(-1)
    after = model.encode_quantized(image)
    for level in (1, 2):
        assert not torch.equal(after[level].latents, before[level].latents)
    model.quantizers[2].embedding.weight.mul_(-1)
    last = model.encode_quantized(image)
    assert torch.equal(last[1].latents, after[1].latents)
    assert torch.equal(last[2].latents, after[2].latents)


def gradients(model, image) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs = model.encode_quantized(image)
    reconstruction = model.decode_quantized([output.quantized for output in outputs])
    loss = F.mse_loss(reconstruction, image)
    for quantizer, output in zip(model.quantizers, outputs):
        loss = loss + quantizer.loss(output)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
@pytest.mark.parametrize("num_levels", LEVELS)
def test_gradients_reach_every_parameter(num_levels, gradient):
    found = gradients(tiny(LEVELS[num_levels], gradient=gradient), make_image(32, 48))
    dead = [name for name, gradient in found.items() if gradient is None or not gradient.abs().sum() > 0]
    assert not dead
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_bottom_loss_alone_reaches_the_top_encoder():
    model = tiny()
    model.encode_quantized(make_image())[1].commitment_loss.backward()
    for part in (model.decoders[0], model.quantize_convs[0], model.encoders[0]):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())


def kept_values(model, image) -> int:
    """Values that autograd keeps between the passes, each storage once, without the weights."""
    kept = {}
    weights = {tensor.data_ptr() for tensor in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.decode_quantized([output.quantized for output in model.encode_quantized(image)])
    return sum(tensor.numel() for tensor in kept.values())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient():
    model, image = tiny(), make_image()
    plain, plain_size = gradients(model, image), kept_values(model, image)
    model.enable_gradient_checkpointing()
    checkpointed, checkpointed_size = gradients(model, image), kept_values(model, image)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    assert checkpointed_size < 0.7 * plain_size


@torch.no_grad()
def test_slicing_changes_nothing():
    model, image = tiny(), make_image(batch=3)
    whole = model.encode(image).latents, model.encode_indices(image), model(image).sample
    sizes = []
    model.decoders[-1].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    model.enable_slicing()
    sliced = model.encode(image).latents, model.encode_indices(image), model(image).sample
    assert sizes == [1, 1, 1]
    # convolutions of another batch size may add in another order
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16():
    model, image = tiny(LEVELS[3]), make_image()
    grids = model.encode_indices(image)
    expected = model.decode_indices(grids[:2])
    model.to(torch.bfloat16)
    assert model(image.bfloat16()).sample.dtype == torch.bfloat16
    decoded = model.decode_indices(grids[:2])
    # a bfloat16 keeps 8 bits: some roundings of 2^-9 of the largest value
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@torch.no_grad()
def test_unit_codewords():
    model = tiny(l2_normalized=True)
    for output in model.encode_quantized(make_image()):
        torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones_like(output.indices).float())


@pytest.mark.parametrize("height, width", [(30, 32), (32, 36), (4, 32), (0, 8)])
def test_sides_that_do_not_divide_are_refused(height, width):
    with pytest.raises(ValueError, match=rf"multiples of 8.* got {height} x {width}"):
        tiny().encode(torch.zeros(1, 3, height, width))


def test_images_and_latents_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"expected an image \(B, 3, H, W\), got shape \(1, 1, 32, 32\)"):
        tiny().encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"expected latents \(B, 8, h, w\), got shape \(1, 4, 8, 8\)"):
        tiny().decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="expected codewords of 2 levels, got 1"):
        tiny().decode_quantized([torch.zeros(1, 4, 8, 8)])


@pytest.mark.parametrize(
    "grids, message",
    [
        ([], "expected a list of 1 to 2 index maps, top level first, got 0 index maps"),
        (
            torch.zeros(1, 2, 2, dtype=torch.int64),
            "expected a list of 1 to 2 index maps, top level first, got Tensor",
        ),
        ([(1, 2, 2), (1, 4, 4), (1, 8, 8)], "got 3 index maps"),
        ([(2, 2)], "level 0 (B, h, w) in torch.int64, got shape (2, 2)"),
        ([(1, 0, 2)], "sides are multiples of 8, the pixels of a position on the top grid, got 0 x 16"),
        ([(1, 2, 3), (1, 6, 4)], "level 1 (1, 4, 6) in torch.int64, got shape (1, 6, 4)"),
        ([(1, 2, 3), (2, 4, 6)], "level 1 (1, 4, 6) in torch.int64, got shape (2, 4, 6)"),
        ([(1, 2, 2, torch.int32)], "level 0 (B, h, w) in torch.int64, got shape (1, 2, 2) in torch.int32"),
        (
            [(1, 2, 2, torch.float32)],
            "level 0 (B, h, w) in torch.int64, got shape (1, 2, 2) in torch.float32",
        ),
        (
            [(1, 2, 2), torch.full((1, 4, 4), 16)],
            "level 1: expected 0 to 15, indices of its codebook; got 16 to 16",
        ),
        ([torch.full((1, 2, 2), -1)], "level 0: expected 0 to 15, indices of its codebook; got -1 to -1"),
    ],
)
def test_wrong_grids_are_refused(grids, message):
    def made(grid):
        if isinstance(grid, torch.Tensor):
            return grid
        dtype = grid[-1] if isinstance(grid[-1], torch.dtype) else torch.int64
        return torch.zeros([side for side in grid if isinstance(side, int)], dtype=dtype)

    grids = [made(grid) for grid in grids] if isinstance(grids, list) else grids
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny().decode_indices(grids)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"strides": ()}, "strides are ()"),
        ({"strides": (4, 3)}, "strides are (4, 3); expected one or more powers of two"),
        ({"strides": (4, 1)}, "strides are (4, 1)"),
        ({"codebook_sizes": (8, 8, 8)}, "expected 2 codebook_sizes, one per stride, or one, got (8, 8, 8)"),
        ({"hidden_channels": 7}, "an even number of hidden_channels, got 7"),
    ],
)
def test_wrong_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalVQ(**config)


@pytest.mark.parametrize(
    "level, counts, message",
    [
        (2, [1.0] * 16, "level is 2; levels are 0 (top) to 1"),
        (0, [1.0] * 8, "expected counts of level 0 (16,), got shape (8,)"),
        (0, [0.0] * 16, "counts of level 0 must be finite"),
        (1, [-1.0] + [1.0] * 15, "counts of level 1 must be finite"),
        (1, [math.nan] + [1.0] * 15, "counts of level 1 must be finite"),
    ],
)
def test_wrong_usage_is_refused(level, counts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny().set_usage(level, torch.tensor(counts))
