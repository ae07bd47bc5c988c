"""AutoencoderVQ compared with diffusers' VQModel, which must read its folder as its own, and both of our discrete
models inside a LatentCodec."""

import json
import logging

import pytest
import torch
from diffusers import VQModel

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec
from latent_codec.models.initialization import initialize_linear_code
from latent_codec.models.quantizers import nearest_codewords


def tiny(seed: int = 0, levels: int = 2, **config) -> AutoencoderVQ:
    """A small model whose latents spread over its codewords, as a trained one's do."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "mid_block_add_attention": False,
        **config,
    }
    model = AutoencoderVQ(**config)
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(10)
        model.quantize.embedding.weight.normal_()
        model.quantize.project_codebook()
    return model.eval()


def make_image(height: int = 16, width: int = 24, batch: int = 2, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, height, width, generator=generator) * 2 - 1


CONFIGS = {
    "plain": {},
    "narrow codewords": {"vq_embed_dim": 2, "latent_channels": 8},
    "attention": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "mid_block_add_attention": True,
    },
    # Kandinsky's MoVQ: the decoder's norms, always of 32 groups, see the codewords too
    "spatial": {"norm_type": "spatial", "block_out_channels": (32, 32)},
    "unit": {"l2_normalized": True, "gradient": "rotation", "beta": 0.5, "legacy": True},
    "gray": {"in_channels": 1, "out_channels": 1},
    "alpha": {"in_channels": 4, "out_channels": 4},
    "one level": {"levels": 1},
    "no lookup": {"lookup_from_codebook": False},
}


def plain_indices(plain: VQModel, latents: torch.Tensor) -> torch.Tensor:
    return plain.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_diffusers_vqmodel_reads_the_folder_as_its_own(name, tmp_path):
    model = tiny(**CONFIGS[name])
    model.save_pretrained(tmp_path)
    plain, loaded = VQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert type(plain) is VQModel

    image = make_image(channels=model.config.in_channels)
    latents = model.encode(image).latents
    assert torch.equal(latents, plain.encode(image).latents)
    indices = model.encode_indices(image)
    assert indices.dtype == torch.int64
    assert len(indices.unique()) > 3  # else nothing would be compared
    assert torch.equal(indices, plain_indices(plain, latents))
    decoded = model.decode(latents).sample
    # to the same bits, but for latents that are normalized first and so round otherwise
    tolerance = 1e-5 if model.config.l2_normalized else 0
    torch.testing.assert_close(decoded, plain.decode(latents).sample, rtol=0, atol=tolerance)
    # decode adds a codeword's difference from the latent to it, as diffusers does, which rounds
    torch.testing.assert_close(model.decode_indices(indices), decoded, rtol=0, atol=1e-5)
    if model.config.lookup_from_codebook:
        shape = (*indices.shape, model.quantize.dim)
        theirs = plain.decode(indices, force_not_quantize=True, shape=shape).sample
        assert torch.equal(model.decode_indices(indices), theirs)
        for each in (indices, indices.flatten(), indices.mT.contiguous().mT):  # in any shape and layout
            assert torch.equal(model.decode(each, force_not_quantize=True, shape=shape).sample, theirs)
    else:
        theirs = plain.decode(latents, force_not_quantize=True).sample
        assert torch.equal(model.decode(latents, force_not_quantize=True).sample, theirs)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_settings_and_weights_survive_saving(name, tmp_path):
    model = tiny(**CONFIGS[name])
    model.save_pretrained(tmp_path)
    again, loaded = AutoencoderVQ.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    for setting in ("beta", "legacy", "gradient", "l2_normalized"):
        expected = CONFIGS[name].get(setting, getattr(tiny().quantize, setting))
        assert getattr(again.quantize, setting) == again.config[setting] == expected, setting
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderVQ"
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    image = make_image(channels=model.config.in_channels)
    torch.testing.assert_close(again(image).sample, model(image).sample, rtol=0, atol=1e-5)


def test_loading_makes_no_weights_of_its_own_first(tmp_path, caplog):
    """diffusers builds the model on the meta device, where a codebook cannot be drawn either."""
    model = tiny(l2_normalized=True)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = AutoencoderVQ.from_config(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        again = AutoencoderVQ.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert not caplog.records


@torch.no_grad()
def test_forms_that_pipelines_call():
    model, image = tiny(), make_image()
    (latents,) = model.encode(image, return_dict=False)
    assert torch.equal(latents, model.encode(image).latents)
    output = model.decode(latents, generator=torch.Generator().manual_seed(0))
    (sample, commit_loss) = model.decode(latents, return_dict=False, generator=None)
    assert torch.equal(sample, output.sample) and torch.equal(commit_loss, output.commit_loss)
    assert sample.shape == image.shape
    assert torch.equal(model(image).sample, sample)
    (sample, commit_loss) = model(image, return_dict=False)
    assert torch.equal(sample, output.sample) and torch.equal(commit_loss, output.commit_loss)
    assert model.decode(model.encode_indices(image)).sample.shape == image.shape


@torch.no_grad()
def test_latents_are_unquantized_and_quantize_latents_quantizes_them():
    model = tiny()
    latents = model.encode(make_image()).latents
    output = model.quantize_latents(latents)
    assert not torch.equal(output.quantized, latents)
    assert torch.equal(output.indices, model.encode_indices(make_image()))
    vectors = latents.movedim(1, -1).reshape(-1, 4).double()
    distances = (vectors[:, None] - model.quantize.embedding.weight.double()).square().sum(2)
    assert torch.equal(output.indices.flatten(), distances.argmin(1))
    torch.testing.assert_close(output.commitment_loss, (distances.min(1).values.mean() / 4).float())
    assert torch.equal(model.encode_quantized(make_image())[0].quantized, output.quantized)
    assert torch.equal(model.decode_quantized([output.quantized]), model.decode(latents).sample)


@torch.no_grad()
def test_slicing_changes_nothing(monkeypatch):
    model, image = tiny(), make_image(batch=3)
    latents, indices = model.encode(image).latents, model.encode_indices(image)
    sample, commit_loss = model.decode(latents, return_dict=False)
    model.enable_slicing()
    batches = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    # one image or three at once may be summed in another order
    torch.testing.assert_close(model.encode(image).latents, latents, rtol=0, atol=1e-5)
    assert torch.equal(model.encode_indices(image), indices)
    torch.testing.assert_close(model.decode(latents).sample, sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents).commit_loss, commit_loss)
    torch.testing.assert_close(model.decode_indices(indices), sample, rtol=0, atol=1e-5)
    assert set(batches) == {1} and len(batches) == 15
    model.disable_slicing()
    batches.clear()
    model(image)
    assert batches == [3, 3]


def saved_megabytes(model, image) -> tuple[float, dict[str, torch.Tensor]]:
    """What the forward pass keeps for the backward pass, and the gradients."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (output,) = model.encode_quantized(image)
        reconstruction = model.decode_quantized([output.quantized])
        loss = (reconstruction - image).square().mean() + model.quantize.loss(output)
    loss.backward()
    return sum(kept) / 2**20, {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", ["plain", "attention", "unit"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(name):
    model, image = tiny(**CONFIGS[name]).train(), make_image()
    whole, expected = saved_megabytes(model, image)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    kept, found = saved_megabytes(model, image)
    assert kept < 0.5 * whole
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_gradients_reach_every_parameter(gradient):
    model = tiny(gradient=gradient).train()
    _, gradients = saved_megabytes(model, make_image())
    for name, each in gradients.items():
        assert each.isfinite().all() and each.abs().sum() > 0, name


@pytest.mark.parametrize("how", ["opened", "converted"])
@torch.no_grad()
def test_bfloat16(how, tmp_path):
    model, image = tiny(), make_image().bfloat16()
    model.save_pretrained(tmp_path)
    if how == "opened":
        half = AutoencoderVQ.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        # encoder and codebook stay in float32, so that the codes are those of any precision
        assert torch.equal(half.encode_indices(image), model.encode_indices(image.float()))
        assert half.quantize.embedding.weight.dtype == half.encoder.conv_in.weight.dtype == torch.float32
    else:
        half = torch.nn.Module.to(model, torch.bfloat16)
        vectors = half.encode(image).latents.movedim(1, -1).reshape(-1, 4).double()
        nearest = (vectors[:, None] - half.quantize.embedding.weight.double()).square().sum(2).argmin(1)
        assert torch.equal(half.encode_indices(image).flatten(), nearest)
    assert half.decoder.conv_out.weight.dtype == half.dtype == torch.bfloat16
    latents = half.encode(image).latents
    sample = half.decode(latents).sample
    assert latents.dtype == sample.dtype == torch.bfloat16 and sample.isfinite().all()
    by_indices = half.decode_indices(half.quantize.assign(latents))
    torch.testing.assert_close(by_indices, sample, rtol=0, atol=0.05)  # some roundings to 8 bits


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 3, 4, 4), r"expected latents \(B, 4, h, w\), got shape \(2, 3, 4, 4\)"),
        (torch.zeros(4, 4, 4), r"expected latents \(B, 4, h, w\)"),
    ],
)
def test_latents_of_another_shape_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        tiny().decode(latents)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="gradient is 'none'"):
        tiny(gradient="none")


# The linear assignment of a Gumbel VQGAN.


def gumbel(**config) -> AutoencoderVQ:
    model = tiny(assignment="linear", **config)
    with torch.no_grad():
        model.quantize.proj.weight.normal_()
    return model


def linear_indices(model: AutoencoderVQ, latents: torch.Tensor) -> torch.Tensor:
    """argmax of quantize.proj, in float64."""
    weight, bias = (model.state_dict()[f"quantize.proj.{name}"].double() for name in ("weight", "bias"))
    return torch.nn.functional.conv2d(latents.double(), weight, bias).argmax(1)


GUMBEL_CONFIGS = {
    "plain": {},
    "narrow codewords": {"vq_embed_dim": 2, "latent_channels": 8},
    "no lookup": {"lookup_from_codebook": False},
}


@pytest.mark.parametrize("name", GUMBEL_CONFIGS)
@torch.no_grad()
def test_linear_assignment_survives_saving_and_is_used_everywhere(name, tmp_path):
    gumbel(**GUMBEL_CONFIGS[name]).save_pretrained(tmp_path)
    model, loaded = AutoencoderVQ.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert model.config.assignment == "linear"
    image = make_image()
    latents = model.encode(image).latents
    expected = linear_indices(model, latents)
    assert len(expected.unique()) > 3
    assert not torch.equal(
        expected,
        nearest_codewords(latents.movedim(1, -1).flatten(0, 2), model.quantize.embedding.weight).view_as(
            expected
        ),
    )
    output = model.quantize_latents(latents)
    assert torch.equal(output.indices, expected)
    assert torch.equal(model.encode_indices(image), expected)
    assert torch.equal(model.encode_quantized(image)[0].indices, expected)
    decoded = model.decode_indices(expected)
    assert torch.equal(model.decode(latents).sample, decoded)
    assert torch.equal(model(image).sample, decoded)
    assert torch.equal(model.decode_quantized([output.quantized]), decoded)
    torch.testing.assert_close(model.decode(latents).commit_loss, 5e-4 * output.kl)
    assert float(output.kl) > 0.1 and 1 < float(output.perplexity) <= 16


@torch.no_grad()
def test_plain_vqmodel_is_exact_from_linear_indices_only(tmp_path):
    model, image = gumbel(), make_image()
    model.save_pretrained(tmp_path)
    plain, loaded = VQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]
    assert sorted(loaded["unexpected_keys"]) == ["quantize.proj.bias", "quantize.proj.weight"]
    latents, indices = model.encode(image).latents, model.encode_indices(image)
    assert torch.equal(plain.encode(image).latents, latents)
    theirs = plain.decode(indices, force_not_quantize=True, shape=(*indices.shape, 4)).sample
    assert torch.equal(model.decode_indices(indices), theirs)
    assert not torch.equal(plain_indices(plain, latents), indices)
    assert (plain.decode(latents).sample - theirs).abs().max() > 0.01


def test_nearest_assignment_adds_nothing_to_the_weights_and_is_what_older_folders_have(tmp_path):
    model = tiny()
    ignored = ("beta", "legacy", "gradient", "l2_normalized", "assignment", "shift_factor")
    ignored += ("quantizer", "values_per_channel")
    config = {key: value for key, value in model.config.items() if key[0] != "_" and key not in ignored}
    assert model.state_dict().keys() == VQModel(**config).state_dict().keys()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("assignment") == "nearest"
    assert saved.pop("shift_factor") == 0
    assert saved.pop("quantizer") == "vq"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = AutoencoderVQ.from_pretrained(tmp_path)
    assert again.config.assignment == "nearest"
    assert torch.equal(again.encode_indices(make_image()), model.encode_indices(make_image()))


def test_linear_assignment_trains_by_itself():
    """Gradients reach every weight, and an optimizer lowers the image's error through the draws."""
    torch.manual_seed(0)
    model, image = gumbel().train(), make_image()
    model.quantize.temperature = 0.5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    errors = []
    for step in range(40):
        (output,) = model.encode_quantized(image)
        error = (model.decode_quantized([output.quantized]) - image.mean()).square().mean()
        optimizer.zero_grad()
        (error + model.quantize.loss(output)).backward()
        if step == 0:
            assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in model.parameters())
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < 0.2 * sum(errors[:5])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"assignment": "random"}, 'assignment is \'random\'; expected "nearest" or "linear"'),
        ({"assignment": "linear", "l2_normalized": True}, "has no distances that these could change"),
        ({"assignment": "linear", "legacy": True}, "has no distances that these could change"),
        ({"assignment": "linear", "gradient": "rotation"}, "has no distances that these could change"),
    ],
)
def test_assignments_that_do_not_go_together_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderVQ(**config)


def test_a_linear_start_is_refused_since_its_codewords_would_not_be_chosen():
    with pytest.raises(ValueError, match='assignment: expected "nearest" for a linear start'):
        linear = gumbel()
        initialize_linear_code(linear, make_image(), quantizer=linear.quantize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookup", [True, False])
def test_codec_has_the_linear_indices_and_decodes_latents_by_them(dtype, lookup, tmp_path):
    whole = LatentCodec(gumbel(lookup_from_codebook=lookup))
    whole.save_pretrained(tmp_path / "codec")
    codec = LatentCodec.from_pretrained(tmp_path / "codec", dtype=dtype)
    assert codec.is_discrete and codec.codebook_sizes == [16]
    assert codec.space_fingerprint == whole.space_fingerprint
    image = make_image(17, 23)  # padded to 18 x 24
    (indices,) = codec.encode_indices(image)
    assert indices.shape == (2, 9, 12)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 1), mode="replicate")
    assert torch.equal(indices, whole.autoencoder.encode_indices(padded))  # of any precision
    latents = codec.encode(image)
    chosen = linear_indices(codec.autoencoder, latents)
    decoded = codec.decode(latents, size=(17, 23), output_type="pt")
    assert torch.equal(decoded, codec.decode_indices([chosen], size=(17, 23), output_type="pt"))
    if dtype == torch.float32:
        assert torch.equal(chosen, indices)


def test_the_linear_layer_is_in_the_space_fingerprint():
    codec, changed = LatentCodec(gumbel()), LatentCodec(gumbel())
    assert codec.space_fingerprint == changed.space_fingerprint
    with torch.no_grad():
        changed.autoencoder.quantize.proj.bias[0] += 1
    changed.weights_changed()
    assert codec.space_fingerprint != changed.space_fingerprint


# In a LatentCodec.


def hierarchical(**config) -> HierarchicalVQ:
    torch.manual_seed(0)
    model = HierarchicalVQ(
        hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=(16, 8), **config
    )
    with torch.no_grad():
        for conv in model.quantize_convs:
            conv.weight.mul_(20)
        for quantizer in model.quantizers:
            quantizer.embedding.weight.normal_()
    return model.eval()


BUILDERS = {"AutoencoderVQ": tiny, "HierarchicalVQ": hierarchical}


@pytest.mark.parametrize("name", BUILDERS)
def test_codec_of_a_saved_folder_has_the_models_indices_and_images(name, tmp_path):
    LatentCodec(BUILDERS[name]()).save_pretrained(tmp_path / "codec")
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    model = codec.autoencoder
    assert type(model).__name__ == name and codec.is_discrete
    image = make_image(16, 24)
    grids = codec.encode_indices(image)
    expected = model.encode_indices(image)
    expected = expected if name == "HierarchicalVQ" else [expected]
    assert codec.codebook_sizes == ([16, 8] if name == "HierarchicalVQ" else [16])
    assert len(grids) == len(expected) == len(codec.codebook_sizes)
    assert all(torch.equal(*pair) for pair in zip(grids, expected))
    decoded = codec.decode_indices(grids, output_type="pt")
    with torch.no_grad():
        reconstruction = model(image).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, reconstruction, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        codec.decode(codec.encode(image), output_type="pt"), decoded, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("name", "multiple"), [("AutoencoderVQ", 2), ("HierarchicalVQ", 8)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 23), (16, 24), (15, 9)])
def test_codec_pads_odd_sizes_to_the_multiple_and_crops_them_back(name, multiple, height, width):
    codec = LatentCodec(BUILDERS[name]())
    image = make_image(height, width)
    padded = torch.nn.functional.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    grids = codec.encode_indices(image)
    assert all(torch.equal(*pair) for pair in zip(grids, codec.encode_indices(padded)))
    full = codec.decode_indices(grids, output_type="pt")
    assert full.shape[-2:] == padded.shape[-2:]
    cropped = codec.decode_indices(grids, size=(height, width), output_type="pt")
    assert torch.equal(cropped, full[..., :height, :width])
    through_latents = codec.decode(codec.encode(image), size=(height, width), output_type="pt")
    torch.testing.assert_close(through_latents, cropped, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_codec_takes_images_of_different_sizes_one_by_one(name):
    codec = LatentCodec(BUILDERS[name]())
    images = [make_image(16, 24)[0], make_image(9, 13)[0]]
    latents = codec.encode(images)
    sizes = [tuple(each.shape[1:]) for each in images]
    decoded = codec.decode(latents, size=sizes, output_type="pt")
    assert [tuple(each.shape[1:]) for each in decoded] == sizes
    for each, one in zip(images, decoded):
        alone = codec.decode_indices(codec.encode_indices(each), size=tuple(each.shape[1:]), output_type="pt")
        torch.testing.assert_close(one, alone[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="differ in size"):
        codec.encode_indices(images)


SPACE_CHANGES = {
    "AutoencoderVQ": {
        "encoder.conv_in.weight": True,
        "quant_conv.weight": True,
        "quantize.embedding.weight": True,
        "post_quant_conv.weight": False,
        "decoder.conv_out.weight": False,
    },
    "HierarchicalVQ": {
        "encoders.1.downsampling.0.weight": True,
        "quantize_convs.0.weight": True,
        "codebooks.0.embedding.weight": True,
        "codebooks.1.embedding.weight": True,
        "decoders.0.conv_in.weight": True,  # what the bottom level is told of the top
        "upsamplers.0.0.weight": True,  # lies in the latents
        "decoders.1.conv_in.weight": False,
        "usage_0": False,
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in BUILDERS for key in SPACE_CHANGES[name]])
def test_only_what_indices_depend_on_is_in_the_space_fingerprint(name, key):
    codec, changed = (LatentCodec(BUILDERS[name]()) for _ in range(2))
    assert codec.space_fingerprint == changed.space_fingerprint
    with torch.no_grad():
        changed.autoencoder.state_dict()[key].mul_(1.5)
    changed.weights_changed()
    assert changed.fingerprint != codec.fingerprint
    assert (changed.space_fingerprint != codec.space_fingerprint) == SPACE_CHANGES[name][key]
