"""AutoencoderTinyGN: TAEF2's published answers, AutoencoderTiny's contract, and gradients that theirs lacks."""

import json
import logging

import diffusers
import pytest
import torch
from helpers.processes import run_forked
from safetensors.torch import load_file, save_file

from latent_codec import AutoencoderTinyGN, LatentCodec, LatentSpace

SMALL = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 2),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 5,
}


def tiny(seed: int = 0, **config) -> AutoencoderTinyGN:
    torch.manual_seed(seed)
    model = AutoencoderTinyGN(**{**SMALL, **config})
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # signals that neither vanish nor stay inside the clamp's linear part
            parameter.mul_(2)
    return model.eval()


def make_image(height: int = 16, width: int = 24, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def taef2(shared) -> AutoencoderTinyGN:
    """The published weights: the files count layers, the decoder's clamp included."""
    model = AutoencoderTinyGN()
    for name, shift in (("encoder", 0), ("decoder", 1)):
        weights = torch.load(shared / "checkpoints" / f"taef2_{name}.pth", weights_only=True)
        split = [(*key.split(".", 1), tensor) for key, tensor in weights.items()]
        layers = {f"layers.{int(index) - shift}.{rest}": tensor for index, rest, tensor in split}
        getattr(model, name).load_state_dict(layers)
    return model.eval()


@torch.no_grad()
def test_taef2_gives_the_latents_and_the_image_of_the_original_code(shared):
    model = taef2(shared)
    expected = load_file(shared / "checkpoints" / "taef2.expected.safetensors")
    latents = model.encode(expected["input_01"] * 2 - 1).latents
    reconstruction = model.decode(expected["latents"]).sample / 2 + 0.5
    # computed in another order
    torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=1e-5)
    torch.testing.assert_close(reconstruction, expected["recon_01"], rtol=0, atol=1e-5)


def test_without_norms_it_is_autoencoder_tiny():
    model = tiny(use_midblock_gn=False, latent_channels=4)
    theirs = diffusers.AutoencoderTiny(
        **{key: value for key, value in model.config.items() if key in SMALL}
    ).eval()
    theirs.load_state_dict(model.state_dict())
    image = make_image()
    with torch.no_grad():
        latents = model.encode(image).latents
        assert latents.abs().max() > 0.5
        torch.testing.assert_close(latents, theirs.encode(image).latents, rtol=0, atol=1e-6)
        for scale in (1, 100):  # of which the clamp leaves -3 to 3
            decoded = theirs.decode(scale * latents).sample
            torch.testing.assert_close(model.decode(scale * latents).sample, decoded, rtol=0, atol=1e-5)
    scaled = model.scale_latents(10 * latents)
    assert torch.equal(scaled, theirs.scale_latents(10 * latents))
    assert torch.equal(model.unscale_latents(scaled), theirs.unscale_latents(scaled))
    named = {key for key in theirs.config if not key.startswith("_")} - {
        "act_fn",
        "upsample_fn",
        "upsampling_scaling_factor",
    }
    assert named <= set(model.config)
    for key in named - set(SMALL) - {"block_out_channels"}:
        assert model.config[key] == theirs.config[key], key
    assert tuple(model.config.block_out_channels) == tuple(theirs.config.block_out_channels)


@pytest.mark.parametrize(
    ("widths", "encoder_blocks", "decoder_blocks"),
    [((8, 4, 12), (0, 1, 2), (1, 2, 0)), ((8,), (2,), (1,)), ((4, 4, 4, 4, 4), (1,) * 5, (1,) * 5)],
)
@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_other_widths_levels_and_channels(widths, encoder_blocks, decoder_blocks, channels, tmp_path):
    model = tiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths[::-1],
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
    )
    factor = 2 ** (len(widths) - 1)
    image = make_image(2 * factor, 3 * factor, channels=channels)
    latents = model.encode(image).latents
    assert latents.shape == (2, 5, 2, 3) and LatentCodec(model).latent_space.downsampling_factor == factor
    assert model(image).sample.shape == image.shape
    norms = [key for key in model.state_dict() if ".pool.1.weight" in key]
    assert len(norms) == encoder_blocks[-1] + decoder_blocks[0]
    assert sum(key.startswith("encoder.") for key in norms) == encoder_blocks[-1]
    model.save_pretrained(tmp_path)
    again = AutoencoderTinyGN.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(image).latents, latents, rtol=0, atol=1e-5)


def test_the_norm_spans_a_quarter_of_the_channels_and_the_whole_grid():
    """A block's pool branch by hand: 1x1 convolution to 4 x width, group norm in 4 groups, ReLU, 1x1 back."""
    model = tiny()
    block = model.encoder.layers[-2]
    x = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block.double()
    with torch.no_grad():
        hidden = torch.einsum("dc,bchw->bdhw", block.pool[0].weight[:, :, 0, 0], x)
        groups = hidden.reshape(2, 4, -1)
        mean = groups.mean(2, keepdim=True)
        variance = groups.var(2, correction=0, keepdim=True)
        hidden = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(hidden)
        hidden = hidden * block.pool[1].weight[:, None, None] + block.pool[1].bias[:, None, None]
        y = x + torch.einsum("cd,bdhw->bchw", block.pool[3].weight[:, :, 0, 0], hidden.relu())
        torch.testing.assert_close(block(x), (y + block.conv(y)).relu())


def gradients(model, image) -> dict[str, torch.Tensor]:
    model.zero_grad()
    image = image.clone().requires_grad_()
    (model(image).sample - image.detach()).square().mean().backward()
    return {"image": image.grad} | {name: each.grad.clone() for name, each in model.named_parameters()}


def test_forward_has_gradients_and_checkpointing_keeps_them():
    model, image = tiny().train(), make_image()
    whole = gradients(model, image)
    for name, gradient in whole.items():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, image)
    assert len(calls) == 2  # computed again
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@torch.no_grad()
def test_forms_that_pipelines_call_and_slicing():
    model, image = tiny(), make_image(batch=3)
    (latents,) = model.encode(image, return_dict=False)
    assert torch.equal(latents, model.encode(image).latents)
    (sample,) = model.decode(latents, return_dict=False, generator=torch.Generator())
    assert torch.equal(sample, model.decode(latents).sample)
    assert torch.equal(sample, model(image, return_dict=False)[0])
    batches = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    model.enable_slicing()
    # one image or three at once may be summed in another order
    torch.testing.assert_close(model(image).sample, sample, rtol=0, atol=1e-4)
    assert batches == [1] * 6
    model.disable_slicing()
    model(image)
    assert batches[6:] == [3, 3]


FRESH = """
import sys
import latent_codec
import diffusers
from safetensors.torch import load_file, save_file
folder, image, answer = sys.argv[1:]
absent = ("text_encoder", "tokenizer", "unet", "scheduler")
pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
codec = latent_codec.LatentCodec.from_pretrained(folder)
assert type(pipeline.vae) is type(codec.autoencoder) is latent_codec.AutoencoderTinyGN
assert pipeline.vae_scale_factor == 4
image = load_file(image)["image"]
save_file({"latents": pipeline.vae.encode(image).latents.detach(), "codec": codec.encode(image)}, answer)
"""


@torch.no_grad()
def test_a_pipeline_with_one_inside_reloads_after_import_latent_codec_alone(tmp_path):
    model, image = tiny(), make_image()
    parts = ("text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=model, **dict.fromkeys(parts), requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    save_file({"image": image}, tmp_path / "image.safetensors")
    arguments = [tmp_path / "pipeline", tmp_path / "image.safetensors", tmp_path / "answer.safetensors"]
    run_forked(FRESH, *arguments)
    answer = load_file(arguments[-1])
    for latents in answer.values():
        torch.testing.assert_close(latents, model.encode(image).latents, rtol=0, atol=1e-5)


def test_loading_is_silent_and_complete(tmp_path, caplog):
    model = tiny(scaling_factor=0.5, latent_magnitude=2.0)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        diffusers.utils.logging.enable_propagation()
        again, loaded = AutoencoderTinyGN.from_pretrained(tmp_path, output_loading_info=True)
        diffusers.utils.logging.disable_propagation()
    assert not caplog.records
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    for key in (*SMALL, "scaling_factor", "latent_magnitude", "block_out_channels"):
        assert json.dumps(again.config[key]) == json.dumps(model.config[key]), key


@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 23), (16, 24)])
def test_codec_pads_odd_sizes_and_crops_them_back(height, width):
    codec, image = LatentCodec(tiny()), make_image(height, width)
    latents = codec.encode(image)
    assert latents.shape == (2, 5, -(-height // 4), -(-width // 4))
    padded = torch.nn.functional.pad(image, (0, -width % 4, 0, -height % 4), mode="replicate")
    assert torch.equal(latents, codec.encode(padded))
    decoded = codec.decode(latents, size=(height, width), output_type="pt")
    with torch.no_grad():
        expected = codec.autoencoder.decode(latents).sample.clamp(-1, 1)
    assert torch.equal(decoded, expected[..., :height, :width])


def test_codec_of_a_saved_folder_has_its_space_and_fingerprints(tmp_path):
    codec = LatentCodec(tiny())
    assert codec.latent_space == LatentSpace(5, 4) and not codec.is_discrete
    codec.latent_space = LatentSpace(5, 4, scaling_factor=0.5, shift_factor=0.25)
    codec.save_pretrained(tmp_path / "codec")
    again = LatentCodec.from_pretrained(tmp_path / "codec")
    assert again.latent_space == codec.latent_space
    assert (again.fingerprint, again.space_fingerprint) == (codec.fingerprint, codec.space_fingerprint)
    with torch.no_grad():
        again.autoencoder.decoder.layers[0].weight.mul_(2)
    again.weights_changed()
    assert again.space_fingerprint == codec.space_fingerprint and again.fingerprint != codec.fingerprint
    raw = codec.autoencoder.encode(make_image()).latents.detach()
    torch.testing.assert_close(codec.encode(make_image()), (raw - 0.25) * 0.5)
    with pytest.raises(ValueError, match="its norms take their statistics from the whole image"):
        codec.encode(make_image(), tile=16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(torch.zeros(1, 4, 8, 8)), r"expected an image \(B, 3, H, W\), got"),
        (
            lambda model: model.decode(torch.zeros(1, 20, 2, 2)),
            r"expected latents \(B, 5, h, w\), got shape \(1, 20, 2, 2\)",
        ),
        (lambda model: model.decode(torch.zeros(5, 2, 2)), r"expected latents \(B, 5, h, w\), got"),
        (
            lambda model: tiny(num_encoder_blocks=(1, 1)),
            "have 3, 2, 3, 3 entries; expected one per level in each",
        ),
        (lambda model: tiny(num_decoder_blocks=()), "have 3, 3, 3, 0 entries"),
        (lambda model: tiny(latent_magnitude=0), "latent_magnitude is 0; expected a number above 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_tiling_is_not_offered():
    with pytest.raises(NotImplementedError, match="Tiling"):
        tiny().enable_tiling()
