"""Today's pipelines, in tiny random builds: a codec's autoencoder as their `vae`, and what they work on shown while they run."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from exact_denoisers import exact_answer, flow_level, know
from helpers.autoencoders import build as build_tiny
from PIL import Image
from test_autoencoder_tiny_gn import taef2
from test_swap_in import WIDTH, build_codec, flux_pipeline, t5_text_encoder, t5_tokenizer
from test_todays_families import flux2, qwen, wan22
from torch.nn.functional import avg_pool2d

from latent_codec import LatentCodec
from latent_codec.families.latent_space import CHANNEL_FIRST, pack_positions
from latent_codec.families.pipeline_spaces import PIPELINES
from latent_codec.images.sources import open_source
from latent_codec.pipelines import LatentPreviewCallback
from latent_codec.pipelines.packed_latents import PackedLatents, token_grid
from latent_codec.previews import LatentPreviewer
from latent_codec.previews.fitting import correlation, fit_linear

NO_TEXT = {"text_encoder": None, "tokenizer": None}


@dataclass(frozen=True)
class Tiny:
    """A tiny build of one pipeline.

    Args:
        pipeline: the class.
        autoencoder: builds its `vae`.
        denoiser: class and config.
        call: arguments besides size and steps.
        unpack: the pipeline's own lines from what it gives as "latent" to the grid of latents that it ends with.
        gives_raw_latents: as "latent".
    """

    pipeline: type
    autoencoder: Callable
    denoiser: type
    config: dict
    call: Callable[[], dict]
    unpack: Callable = lambda pipe, latents, height, width: latents
    gives_raw_latents: bool = False
    others: Callable[[], dict] = lambda: NO_TEXT
    scheduler: Callable = diffusers.FlowMatchEulerDiscreteScheduler


def prompt(seed: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def dc():
    return build_tiny("AutoencoderDC")


def hunyuan_image():
    return build_tiny("AutoencoderKLHunyuanImage")


def kl(**scale):
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159} | scale
    return build_codec(use_quant_conv=False, use_post_quant_conv=False, **config).autoencoder


def unpack_flux2(pipe, latents, height, width):
    rows, columns = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
    grid = torch.zeros(len(latents), latents.shape[2], rows, columns)
    return pipe._unpack_latents_with_ids(latents, pipe._prepare_latent_ids(grid))


def normalize_flux2(pipe, latents, height, width):
    norm = pipe.vae.bn
    mean, variance = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
    return (pipe._patchify_latents(latents) - mean) / torch.sqrt(variance + pipe.vae.config.batch_norm_eps)


def unpack_tokens(pipe, latents, height, width):
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).reshape(
        len(latents), -1, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    )


FLUX2 = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "timestep_guidance_channels": 8,
    "axes_dims_rope": (2, 2, 2, 2),
}
TINY = {
    "Flux2": Tiny(
        diffusers.Flux2Pipeline,
        flux2,
        diffusers.Flux2Transformer2DModel,
        FLUX2,
        lambda: {"prompt_embeds": prompt()},
        unpack_flux2,
    ),
    "Flux2Klein": Tiny(
        diffusers.Flux2KleinPipeline,
        flux2,
        diffusers.Flux2Transformer2DModel,
        FLUX2 | {"guidance_embeds": False},
        lambda: {"prompt_embeds": prompt(), "guidance_scale": 1.0},
        normalize_flux2,
        gives_raw_latents=True,
    ),
    "QwenImage": Tiny(
        diffusers.QwenImagePipeline,
        qwen,
        diffusers.QwenImageTransformer2DModel,
        {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {"prompt_embeds": prompt(), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)},
        unpack_tokens,
    ),
    "Wan": Tiny(
        diffusers.WanPipeline,
        wan22,
        diffusers.WanTransformer3DModel,
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": WIDTH,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 16,
        },
        lambda: {"prompt_embeds": prompt(), "guidance_scale": 1.0, "num_frames": 1},
        lambda pipe, latents, height, width: latents[:, :, 0],
        scheduler=partial(
            diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    ),
    "Sana": Tiny(
        diffusers.SanaPipeline,
        dc,
        diffusers.SanaTransformer2DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": WIDTH,
            "sample_size": 8,
        },
        lambda: {
            "prompt_embeds": prompt(),
            "prompt_attention_mask": torch.ones(1, 5),
            "negative_prompt": None,
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
        },
        scheduler=partial(
            diffusers.DPMSolverMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    ),
    "HunyuanImage": Tiny(
        diffusers.HunyuanImagePipeline,
        hunyuan_image,
        diffusers.HunyuanImageTransformer2DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "text_embed_2_dim": WIDTH,
            "rope_axes_dim": (4, 4),
        },
        lambda: {
            "prompt_embeds": prompt(),
            "prompt_embeds_mask": torch.ones(1, 5),
            "prompt_embeds_2": prompt(4),
            "prompt_embeds_mask_2": torch.ones(1, 5),
        },
        others=lambda: {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None},
    ),
    "ZImage": Tiny(
        diffusers.ZImagePipeline,
        kl,
        diffusers.ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": WIDTH,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 16, 16],
        },
        lambda: {"prompt_embeds": [prompt()[0]], "guidance_scale": 0.0},
    ),
    "Chroma": Tiny(
        diffusers.ChromaPipeline,
        kl,
        diffusers.ChromaTransformer2DModel,
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        lambda: {"prompt": "a cat", "max_sequence_length": 8, "guidance_scale": 1.0},
        unpack_tokens,
        others=lambda: {"text_encoder": t5_text_encoder(WIDTH), "tokenizer": t5_tokenizer()},
    ),
    "Lumina2": Tiny(
        diffusers.Lumina2Pipeline,
        kl,
        diffusers.Lumina2Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": WIDTH,
        },
        lambda: {
            "prompt_embeds": prompt(),
            "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
            "guidance_scale": 1.0,
        },
    ),
}
SIZES = {"landscape": (64, 96), "portrait": (96, 64)}


def build_pipeline(build: Tiny):
    """The codec, and the pipeline whose `vae` is its autoencoder."""
    codec = LatentCodec(build.autoencoder(), pipeline=build.pipeline.__name__)
    torch.manual_seed(1)
    denoiser = build.denoiser(**build.config)
    with torch.no_grad():  # some begin with zeros in their last layer
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    pipe = build.pipeline(
        vae=codec.autoencoder, transformer=denoiser, scheduler=build.scheduler(), **build.others()
    )
    return codec, pipe


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    """A tiny build, its codec and its pipeline."""
    build = TINY[request.param]
    return build, *build_pipeline(build)


def draw(build: Tiny, pipe, size=SIZES["landscape"], output_type="latent", **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = build.call() | {"height": size[0], "width": size[1], "num_inference_steps": 2} | options
    result = pipe(generator=torch.Generator().manual_seed(3), output_type=output_type, **settings)
    (drawn,) = result.values()
    return drawn[:, 0] if output_type == "pt" and drawn.ndim == 5 else drawn


def draw_with_previews(build: Tiny, pipe, size=SIZES["landscape"], frames="first", **options):
    """What the pipeline gives, the latents that a previewer got, and the images."""
    shown, images = [], []

    def previewer(latents):
        shown.append(latents)
        return latents[:, :3].tanh()

    with LatentPreviewCallback(
        pipe, previewer, lambda image, step: images.append(image), frames=frames
    ) as preview:
        latents = draw(build, pipe, size, callback_on_step_end=preview, **options)
    return latents, shown, images


def test_a_codec_in_place_of_the_vae_is_saved_and_gives_its_own_decode(tiny, tmp_path):
    build, codec, pipe = tiny
    latents = draw(build, pipe)
    space = codec.latent_space
    rows, columns = (side // space.downsampling_factor for side in SIZES["landscape"])
    grid = space.normalize(latents) if build.gives_raw_latents else space.unpack(latents, (rows, columns))

    drawn = draw(build, pipe, output_type="pt")

    assert drawn.shape == (1, 3, *SIZES["landscape"]) and drawn.std() > 0.01  # else nothing would be compared
    decoded = codec.decode(grid, output_type="pt")
    torch.testing.assert_close(decoded / 2 + 0.5, drawn, rtol=0, atol=1e-5)

    pipe.save_pretrained(tmp_path)
    missing = {name: None for name, part in pipe.components.items() if part is None}
    again = build.pipeline.from_pretrained(tmp_path, **missing)
    assert type(again.vae) is type(codec.autoencoder)
    torch.testing.assert_close(draw(build, again, output_type="pt"), drawn, rtol=0, atol=1e-5)
    opened = LatentCodec.from_pretrained(tmp_path)
    assert (opened.pipeline, opened.latent_space) == (codec.pipeline, codec.latent_space)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_preview_shows_the_grid_that_the_pipeline_decodes(tiny, size):
    build, codec, pipe = tiny
    latents, shown, _ = draw_with_previews(build, pipe, size)
    assert torch.equal(latents, draw(build, pipe, size))
    expected = build.unpack(pipe, latents, *size)
    rows, columns = (side // codec.latent_space.downsampling_factor for side in size)
    assert expected.shape == (1, codec.latent_space.channels, rows, columns)
    # The last step's x_0 is what the pipeline ends with, up to the order of a sum.
    torch.testing.assert_close(shown[-1], expected, rtol=0, atol=1e-5)


def test_video_shows_its_first_frame_or_a_strip():
    build = TINY["Wan"]
    _, pipe = build_pipeline(build)
    for frames in ("first", "strip"):
        latents, shown, images = draw_with_previews(build, pipe, frames=frames, num_frames=9)
        assert latents.shape == (1, 8, 3, 4, 6)
        expected = latents[:, :, 0] if frames == "first" else latents[0].transpose(0, 1)
        torch.testing.assert_close(shown[-1], expected, rtol=0, atol=1e-5)
        assert images[-1].size == ((6, 4) if frames == "first" else (18, 4))


def test_a_denoiser_is_as_before_once_a_callback_is_closed_or_gone():
    _, pipe = build_pipeline(TINY["QwenImage"])
    hooks = pipe.transformer._forward_pre_hooks
    preview = LatentPreviewCallback(pipe, lambda latents: latents, lambda image, step: None)
    assert len(hooks) == 1
    preview.close()
    assert not hooks
    preview = LatentPreviewCallback(pipe, lambda latents: latents[:, :3], lambda image, step: None)
    draw(TINY["QwenImage"], pipe, callback_on_step_end=preview)
    preview.wait()  # its thread has a hold of it
    del preview
    gc.collect()
    assert not hooks


KANDINSKY5 = Tiny(
    diffusers.Kandinsky5T2IPipeline,
    kl,
    diffusers.Kandinsky5Transformer3DModel,
    {
        "in_text_dim": WIDTH,
        "in_text_dim2": WIDTH,
        "time_dim": 8,
        "model_dim": 16,
        "ff_dim": 16,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 2, 2),
    },
    lambda: {
        "prompt_embeds_qwen": prompt(),
        "prompt_embeds_clip": prompt()[:, 0],
        "prompt_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "guidance_scale": 1.0,
    },
    others=lambda: {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None},
)
LTX = Tiny(
    diffusers.LTXPipeline,
    lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
    ),
    diffusers.LTXVideoTransformer3DModel,
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": WIDTH,
    },
    lambda: {"prompt_embeds": prompt(), "prompt_attention_mask": torch.ones(1, 5), "guidance_scale": 1.0},
)
COGVIDEOX = Tiny(
    diffusers.CogVideoXPipeline,
    lambda: diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    ),
    diffusers.CogVideoXTransformer3DModel,
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 1,
        "max_text_seq_length": 5,
        "use_rotary_positional_embeddings": True,
    },
    lambda: {"prompt_embeds": prompt(), "guidance_scale": 1.0},
    scheduler=partial(diffusers.DDIMScheduler, prediction_type="v_prediction", clip_sample=False),
)


def without_space(build: Tiny):
    """A pipeline of video, which has no row in the table of latent spaces."""
    torch.manual_seed(1)
    return build.pipeline(
        vae=build.autoencoder(),
        transformer=build.denoiser(**build.config),
        scheduler=build.scheduler(),
        **build.others(),
    )


def test_channels_that_are_last_are_brought_to_the_front():
    _, pipe = build_pipeline(KANDINSKY5)
    pipe.resolutions = list(SIZES.values())
    latents, shown, _ = draw_with_previews(KANDINSKY5, pipe)
    assert latents.shape == (1, 1, 8, 12, 4)
    torch.testing.assert_close(shown[-1], latents[:, 0].permute(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_frames_before_channels_and_tokens_of_video_are_shown_as_a_strip():
    pipe = without_space(COGVIDEOX)
    latents, shown, _ = draw_with_previews(COGVIDEOX, pipe, frames="strip", num_frames=9)
    assert latents.shape == (1, 3, 4, 8, 12)
    torch.testing.assert_close(shown[-1], latents[0], rtol=0, atol=1e-5)

    pipe = without_space(LTX)
    latents, shown, _ = draw_with_previews(LTX, pipe, frames="strip", num_frames=9)
    frames = latents.shape[1] // 96
    expected = pipe._unpack_latents(latents, frames, 8, 12)[0].transpose(0, 1)
    torch.testing.assert_close(shown[-1], expected, rtol=0, atol=1e-5)


def test_a_reference_of_as_many_tokens_changes_no_grid():
    """Landscape from portrait, where the numbers of tokens tell nothing apart."""
    reference = Image.new("RGB", SIZES["landscape"], (200, 30, 60))
    size = SIZES["landscape"]
    for build, pipeline in (
        (TINY["Flux2"], diffusers.Flux2Pipeline),  # the reference's tokens last
        (TINY["Flux2Klein"], diffusers.Flux2KleinKVPipeline),  # first
    ):
        _, pipe = build_pipeline(build)
        pipe = pipeline(**pipe.components)
        build = replace(build, call=lambda: {"prompt_embeds": prompt()})
        _, shown, _ = draw_with_previews(build, pipe, size, image=reference)
        assert {each.shape for each in shown} == {(1, 16, 8, 12)}

    flux = flux_pipeline(build_codec(shift_factor=0.1))
    kontext = diffusers.FluxKontextPipeline(**flux.components)
    build = replace(
        TINY["Flux2"], call=lambda: {"prompt_embeds": prompt(), "pooled_prompt_embeds": prompt()[:, 0]}
    )
    _, shown, _ = draw_with_previews(
        build, kontext, size, image=reference, _auto_resize=False, max_area=64 * 96
    )
    assert {each.shape for each in shown} == {(1, 4, 8, 12)}


def ids(time: float, rows: int, columns: int, axes: int = 3) -> torch.Tensor:
    axes_of_grid = (torch.arange(length, dtype=torch.float32) for length in (1, rows, columns))
    grid = torch.cartesian_prod(*axes_of_grid) + torch.tensor([time, 0, 0])
    return torch.nn.functional.pad(grid, (0, axes - 3))


def test_a_grid_is_read_from_ids_and_shapes():
    text = torch.zeros(12, 3)
    words = torch.arange(12.0)[:, None].expand(12, 3)
    for told, grid in (
        (ids(0, 3, 4), (1, 3, 4)),
        (ids(0, 3, 4, axes=4)[None], (1, 3, 4)),
        (torch.cat([text, ids(0, 3, 4)]), (1, 3, 4)),  # Krea 2
        (torch.cat([words, ids(0, 3, 4) + 65536]), (1, 3, 4)),  # Ideogram 4
        (torch.cat([ids(0, 3, 4), ids(10, 4, 3)]), (1, 3, 4)),  # FLUX.2
        (torch.cat([ids(10, 4, 3), ids(0, 3, 4)]), (1, 3, 4)),  # FLUX.2 klein KV
        (torch.cat([ids(1, 3, 4), ids(2, 6, 6)]), (1, 3, 4)),  # LongCat-Image-Edit
        (ids(0, 5, 5), None),
        (ids(0, 3, 4)[torch.randperm(12, generator=torch.Generator().manual_seed(0))], None),
        (ids(0, 3, 4)[:, :2], None),
        ([[(1, 3, 4)]], (1, 3, 4)),  # Qwen-Image
        ([(1, 3, 4), (1, 3, 4)], (1, 3, 4)),  # NucleusMoE-Image, of two images
        ([[(1, 3, 4), (1, 4, 3)]] * 2, (1, 3, 4)),  # Qwen-Image-Edit
        ([[(1, 1, 4)] * 3 + [(1, 2, 8)]], (3, 1, 4)),  # Qwen-Image-Layered
        ([(3, 2, 2)], (3, 2, 2)),  # LTX-Video
        ([[(1, 5, 5)]], None),
        ([], None),
        (None, None),
    ):
        assert token_grid(12, told) == grid, told
    assert token_grid(12, [[(1, 4, 3), (1, 3, 4)]], references_first=True) == (1, 3, 4)
    assert PIPELINES["QwenImage21Pipeline"].references_first


def test_layers_and_images_of_edit_pipelines_are_unpacked():
    layers = torch.randn(4, 2, 16, 6, 8)  # of two images
    tokens = torch.cat(
        [diffusers.QwenImagePipeline._pack_latents(each, 2, 16, 6, 8) for each in layers], dim=1
    )
    packing = PackedLatents(PIPELINES["QwenImageLayeredPipeline"], [[(1, 3, 4)] * 4 + [(1, 2, 2)]] * 2)
    unpacked, frames = packing.unpack(tokens)
    assert frames == 4 and torch.equal(unpacked, layers.transpose(0, 1).flatten(0, 1))

    joy = PIPELINES["JoyImageEditPipeline"]
    slots = torch.randn(2, 3, 8, 1, 4, 6)  # the last one is drawn
    assert torch.equal(PackedLatents(joy).unpack(slots)[0], slots[:, -1, :, 0])
    patches = torch.randn(2, 20, 8, 1, 2, 2)  # the first 2 x 3 are
    unpacked, frames = PackedLatents(joy, [[(1, 2, 3), (1, 2, 7)]] * 2).unpack(patches)
    assert frames == 1 and unpacked.shape == (2, 8, 4, 6)
    assert torch.equal(unpacked[:, :, 2:, 4:], patches[:, 5, :, 0])


class ExactFlux2Transformer(diffusers.Flux2Transformer2DModel):
    """`x_0` is packed."""

    def forward(self, hidden_states, timestep, *args, **kwargs):
        self.wait()
        return (exact_answer(hidden_states, flow_level(timestep[0] * 1000), "flow_prediction", self.x_0),)


def test_taef2_previews_flux2s_packed_latents(shared):
    """Published weights: a linear map fitted to TAEF2, whose 32 channels FLUX.2's pipeline packs into 128."""
    codec = LatentCodec(taef2(shared))
    kodak = open_source(shared / "data" / "kodak")
    crops = torch.stack([kodak.read(index).float()[:, 100:292, 100:356] / 127.5 - 1 for index in (1, 5)])
    latents = codec.encode(crops)
    fit = fit_linear(codec, open_source(shared / "data" / "photos" / "photos-000.tar"), num_images=7)
    previewer = LatentPreviewer.linear(fit.weight, fit.bias, space=codec.latent_space)
    build = replace(TINY["Flux2"], config=FLUX2 | {"in_channels": 128})
    _, pipe = build_pipeline(build)

    images = []
    with LatentPreviewCallback(pipe, previewer, lambda image, step: images.append(image)) as preview:
        tokens = pack_positions(latents, CHANNEL_FIRST).flatten(2).mT
        know(pipe.transformer, ExactFlux2Transformer, x_0=tokens, wait=preview.wait)
        draw(build, pipe, (96, 128), prompt_embeds=prompt().expand(2, -1, -1), callback_on_step_end=preview)

    decoded = LatentPreviewer.full(codec)(latents)
    assert correlation(decoded, crops) > 0.95
    downscaled = avg_pool2d(decoded, 8)
    assert [image.size for image in images] == [(64, 24)] * 2  # of two images
    for image in images:  # of the first step too, whose x_0 is known
        shown = torch.from_numpy(np.array(image)).unflatten(1, (2, 32)).permute(1, 3, 0, 2)
        found = [correlation(one, other) for one, other in zip(shown, downscaled, strict=True)]
        assert min(found) >= 0.9, found
