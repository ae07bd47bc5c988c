"""A codec's autoencoder in real diffusers pipelines, with small random denoisers."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from exact_denoisers import (
    ExactFluxTransformer,
    ExactSD3Transformer,
    ExactUnconditionalUNet,
    ExactUNet,
    discrete_level,
    exact_answer,
    know,
)
from helpers.processes import run_forked, run_fresh
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.components.codec_folders import ASSETS, DEFAULT

WIDTH = 8
"""Of every layer."""


def build_codec(latent_channels=4, **config):
    torch.manual_seed(0)
    return LatentCodec(
        diffusers.AutoencoderKL(
            block_out_channels=(WIDTH,) * 4,
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=latent_channels,
            **config,
        )
    )


def build_unet(**config):
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(WIDTH, WIDTH),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        **{"cross_attention_dim": WIDTH, **config},
    )


def clip_text_encoder(kind=CLIPTextModel):
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=99,
        projection_dim=WIDTH,
    )
    return kind(config)


def sd_pipeline(codec, tokenizer=None):
    return diffusers.StableDiffusionPipeline(
        vae=codec.autoencoder,
        unet=build_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=clip_text_encoder(),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
}


def sdxl_pipeline(codec):
    return diffusers.StableDiffusionXLPipeline(
        vae=codec.autoencoder,
        unet=build_unet(**SDXL_UNET),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def sd3_pipeline(codec, text_width=WIDTH):
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=codec.latent_space.channels,
        out_channels=codec.latent_space.channels,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        caption_projection_dim=8,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=codec.autoencoder,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )


def flux_pipeline(codec):
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=codec.latent_space.channels * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        vae=codec.autoencoder,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )


def generate(pipeline, output_type, *, pooled=False):
    """One image of 32x32 from fixed prompt embeddings and seed."""
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    return pipeline(
        prompt_embeds=prompt,
        **({"pooled_prompt_embeds": prompt[:, 0]} if pooled else {}),
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type=output_type,
    ).images


# SD reads the scale alone; SDXL reads mean and std too; SD3 and FLUX read scale and shift.
@pytest.mark.parametrize(
    ("build_pipeline", "config", "pooled"),
    [
        (sd_pipeline, {"scaling_factor": 0.18215}, False),
        (sdxl_pipeline, {"scaling_factor": 0.13025}, True),
        (
            sdxl_pipeline,
            {
                "scaling_factor": 0.5,
                "latents_mean": [-1.6, 1.2, 0.1, 0.3],
                "latents_std": [8.4, 5.4, 6.0, 7.0],
            },
            True,
        ),
        (sd3_pipeline, {"scaling_factor": 1.5305, "shift_factor": 0.0609}, True),
        (flux_pipeline, {"scaling_factor": 0.3611, "shift_factor": 0.1159}, True),
    ],
)
def test_codec_decodes_latents_as_the_pipeline_itself_does(build_pipeline, config, pooled):
    codec = build_codec(**config)
    pipeline = build_pipeline(codec)
    latents = generate(pipeline, "latent", pooled=pooled)
    if build_pipeline is flux_pipeline:
        latents = pipeline._unpack_latents(latents, 32, 32, pipeline.vae_scale_factor)
    expected = generate(pipeline, "pt", pooled=pooled)
    assert expected.std() > 0.01  # else nothing would be compared

    decoded = codec.decode(latents, output_type="pt")
    # The pipeline moves the image to [0, 1], which rounds.
    torch.testing.assert_close(decoded / 2 + 0.5, expected, rtol=0, atol=1e-5)  # weights laid out otherwise


def test_codec_encodes_images_as_the_img2img_pipeline_does():
    codec = build_codec(scaling_factor=1.5305, shift_factor=0.0609)
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**sd3_pipeline(codec).components)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # At t = 0 a flow has no noise yet, so that what the pipeline prepares is the encoded image itself.
    scheduler, start = pipeline.scheduler, torch.zeros(1)
    scheduler.sigmas, scheduler.timesteps = start, start
    latents = pipeline.prepare_latents(
        image, start, 1, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(5)
    )
    sampled = codec.encode(image, sample=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sampled, latents)


def letter_tokenizer(folder):
    """A CLIP tokenizer that knows the alphabet."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def test_stable_diffusion_runs_saves_and_reloads_with_a_codec_inside(tmp_path):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        size = {"height": 32, "width": 32}
        return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt", **size).images

    codec = build_codec()
    pipeline = sd_pipeline(codec, letter_tokenizer(tmp_path))
    before = draw(pipeline)
    assert before.shape == (1, 3, 32, 32)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.vae) is diffusers.AutoencoderKL
    # Loaded weights lie elsewhere in memory, so vectorized sums may run in another order.
    torch.testing.assert_close(draw(again), before, rtol=0, atol=1e-5)
    assert LatentCodec.from_pretrained(tmp_path / "pipeline").fingerprint == codec.fingerprint


def build_vq_codec(**config):
    torch.manual_seed(0)
    autoencoder = AutoencoderVQ(
        block_out_channels=(WIDTH,) * 4,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        num_vq_embeddings=32,
        scaling_factor=0.5,
        **config,
    )
    torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    return LatentCodec(autoencoder)


def test_a_discrete_codec_is_the_vae_of_stable_diffusion():
    codec = build_vq_codec()
    pipeline = sd_pipeline(codec)
    latents = generate(pipeline, "latent")
    expected = generate(pipeline, "pt")
    assert expected.shape == (1, 3, 32, 32) and expected.std() > 0.01
    decoded = codec.decode(latents, output_type="pt")
    # The pipeline moves the image to [0, 1], and its latents through a difference, which both round.
    torch.testing.assert_close(decoded / 2 + 0.5, expected, rtol=0, atol=1e-5)


def test_a_discrete_codec_is_the_vae_of_img2img():
    codec = build_vq_codec()
    components = sd_pipeline(codec).components
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    arguments = {
        "image": image,
        "prompt_embeds": torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2)),
        "guidance_scale": 1.0,
        "num_inference_steps": 50,
    }
    generators = {"generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    make_image = pipeline(**arguments, **generators, strength=0.5).images
    assert make_image.shape == (1, 3, 32, 32) and make_image.isfinite().all()
    # What it encodes is the codec's latents, before any noise.
    pipeline.scheduler.add_noise = lambda latents, noise, timestep: latents
    encoded = pipeline.prepare_latents(
        image, torch.tensor([1]), 1, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(encoded, codec.encode(image))


def build_sixteen_channel_codec():
    return build_codec(
        16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def build_tiny_codec(latent_channels=4):
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    with torch.no_grad():  # untrained, it shows hardly anything
        autoencoder.decoder.layers[-1].weight.mul_(10)
    return LatentCodec(autoencoder)


def ldm_pipeline(codec):
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=codec.latent_space.channels,
        out_channels=codec.latent_space.channels,
        block_out_channels=(WIDTH, WIDTH),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return diffusers.LDMPipeline(
        vqvae=codec.autoencoder, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False)
    )


CODECS = {
    "KL, 4 channels": lambda: build_codec(scaling_factor=0.18215),
    "KL, shift": lambda: build_codec(scaling_factor=0.3611, shift_factor=0.1159),
    "KL, mean and std": lambda: build_codec(
        scaling_factor=0.5, latents_mean=[-1.6, 1.2, 0.1, 0.3], latents_std=[8.4, 5.4, 6.0, 7.0]
    ),
    "KL, 16 channels": lambda: build_codec(16, scaling_factor=0.3),
    "KL, 16 channels, shift": build_sixteen_channel_codec,
    "VQ": build_vq_codec,
    "VQ, shift": lambda: build_vq_codec(shift_factor=0.3),
    "tiny": build_tiny_codec,
    "tiny, 16 channels": lambda: build_tiny_codec(16),
    "default": LatentCodec.from_pretrained,
    "default-vq": lambda: LatentCodec.from_pretrained("default-vq"),
}


def make_image():
    """A smooth one, 32x32, (1, 3, 32, 32)."""
    ramp = torch.linspace(-0.8, 0.8, 32)
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.outer(ramp, ramp)])[None]


def ask_exactly(pipeline, x_0):
    """Give a pipeline a denoiser that knows x_0, and the schedule that it knows."""
    if isinstance(pipeline, (diffusers.StableDiffusion3Pipeline, diffusers.FluxPipeline)):
        flux = isinstance(pipeline, diffusers.FluxPipeline)
        known = pipeline._pack_latents(x_0, *x_0.shape) if flux else x_0
        know(pipeline.transformer, ExactFluxTransformer if flux else ExactSD3Transformer, x_0=known)
        return pipeline
    is_sdxl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    channels = x_0.shape[1]
    if channels != pipeline.unet.config.in_channels:
        config = SDXL_UNET if is_sdxl else {}
        pipeline.register_modules(unet=build_unet(in_channels=channels, out_channels=channels, **config))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if is_sdxl:
        pipeline.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **schedule)
    else:
        pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False, **schedule)
    if isinstance(pipeline, diffusers.LDMPipeline):
        know(pipeline.unet, ExactUnconditionalUNet, x_0=x_0)
    else:
        know(
            pipeline.unet,
            ExactUNet,
            answer=lambda noisy, number, t: exact_answer(noisy, discrete_level(t), "epsilon", x_0),
        )
    return pipeline


@pytest.mark.parametrize(
    ("build_pipeline", "kinds"),
    [
        (sd_pipeline, ["KL, 4 channels", "KL, 16 channels", "VQ", "tiny", "default", "default-vq"]),
        (sdxl_pipeline, ["KL, 4 channels", "KL, 16 channels", "KL, mean and std", "VQ", "tiny", "default"]),
        (sd3_pipeline, ["KL, shift", "KL, 16 channels, shift", "VQ, shift", "tiny", "tiny, 16 channels"]),
        (
            flux_pipeline,
            ["KL, shift", "KL, 16 channels, shift", "VQ", "VQ, shift", "tiny", "tiny, 16 channels"],
        ),
        (ldm_pipeline, ["KL, 4 channels", "KL, 16 channels", "VQ", "tiny"]),
    ],
)
def test_a_denoiser_that_knows_the_latents_gives_the_codecs_own_reconstruction(build_pipeline, kinds):
    for kind in kinds:
        codec = CODECS[kind]()
        latents = codec.encode(make_image())
        expected = codec.decode(latents, output_type="pt") / 2 + 0.5
        assert expected.std() > 0.01, kind
        pipeline = ask_exactly(build_pipeline(codec), latents)
        if build_pipeline is ldm_pipeline:
            pipeline.set_progress_bar_config(disable=True)
            drawn = pipeline(num_inference_steps=2, output_type="np").images
            drawn = torch.as_tensor(drawn).permute(0, 3, 1, 2)
        else:
            drawn = generate(pipeline, "pt", pooled=build_pipeline is not sd_pipeline)
        # At first the latents are the small difference of noise and its prediction, which float32 rounds.
        torch.testing.assert_close(
            drawn, expected, rtol=0, atol=1e-3, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
        if kind == "default":
            assert (drawn - (make_image() / 2 + 0.5)).abs().mean() < 0.05


def without_noise(codec):
    """Narrow the posterior of an AutoencoderKL to its mean: img2img pipelines draw from it."""
    if isinstance(codec.autoencoder, diffusers.AutoencoderKL):
        last = codec.autoencoder.quant_conv or codec.autoencoder.encoder.conv_out
        with torch.no_grad():
            last.weight[codec.latent_space.channels :] = 0
            last.bias[codec.latent_space.channels :] = -30
        codec.weights_changed()
    return codec


@pytest.mark.parametrize("kind", ["KL, 4 channels", "VQ", "tiny"])
def test_inpainting_keeps_what_is_known_as_the_codec_reconstructs_it(kind):
    codec = without_noise(CODECS[kind]())
    latents = codec.encode(make_image())
    other = latents.flip(3)
    components = ask_exactly(sd_pipeline(codec), other).components
    pipeline = diffusers.StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    drawn = pipeline(
        image=(make_image() + 1) / 2,
        mask_image=mask,
        prompt_embeds=torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2)),
        guidance_scale=1.0,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        height=32,
        width=32,
    ).images
    joined = torch.cat([latents[..., :2], other[..., 2:]], dim=3)
    torch.testing.assert_close(drawn, codec.decode(joined, output_type="pt") / 2 + 0.5, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["KL, 4 channels", "KL, 16 channels", "VQ", "tiny"])
def test_img2img_that_adds_no_noise_gives_the_codecs_own_reconstruction(kind):
    codec = without_noise(CODECS[kind]())
    latents, encoded = codec.encode(make_image()), []
    pipeline = ask_exactly(sd_pipeline(codec), latents)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.add_noise = lambda clean, noise, timestep: encoded.append(clean) or clean
    drawn = pipeline(
        image=(make_image() + 1) / 2,
        prompt_embeds=torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2)),
        guidance_scale=1.0,
        num_inference_steps=50,
        strength=0.02,  # one step
        output_type="pt",
    ).images
    torch.testing.assert_close(encoded[0], latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn, codec.decode(latents, output_type="pt") / 2 + 0.5, rtol=0, atol=1e-3)


def test_sdxl_and_flux_encode_images_as_the_codec_does():
    for kind in ("KL, mean and std", "VQ", "tiny"):
        codec = without_noise(CODECS[kind]())
        components = sdxl_pipeline(codec).components
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**components, add_watermarker=False)
        latents = pipeline.prepare_latents(
            make_image(), None, 1, 1, torch.float32, torch.device("cpu"), add_noise=False
        )
        torch.testing.assert_close(latents, codec.encode(make_image()), rtol=1e-5, atol=1e-5)
    for kind in ("KL, 16 channels, shift", "VQ, shift", "tiny, 16 channels"):
        codec = without_noise(CODECS[kind]())
        pipeline = diffusers.FluxImg2ImgPipeline(**flux_pipeline(codec).components)
        latents = pipeline._encode_vae_image(make_image(), generator=None)
        torch.testing.assert_close(latents, codec.encode(make_image()), rtol=1e-5, atol=1e-5)


LIGHT = """
import sys
import latent_codec
import latent_codec.pipelines
heavy = [name for name in ("torch", "diffusers", "transformers", "numpy") if name in sys.modules]
assert not heavy, heavy
import inspect
inspect.stack()  # asks every module for its file
assert "torch" not in sys.modules, "reading a module's metadata loaded it"
"""
RELOADER = """
import json, sys
import latent_codec
import diffusers, torch
from pathlib import Path
from safetensors.torch import save_file
folder, answer = map(Path, sys.argv[1:])
images = {}
for name, options in json.loads((folder / "options.json").read_text()).items():
    kind = json.loads((folder / name / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(folder / name)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(generator=torch.Generator().manual_seed(3), **options).images
    images[name] = torch.as_tensor(drawn).contiguous()
    if name == "sd-vq":
        from latent_codec.models.autoencoder_vq import AutoencoderVQ
        assert type(pipeline.vae) is AutoencoderVQ is latent_codec.AutoencoderVQ
import latent_codec.models.hierarchical_vq as hierarchical_vq
assert hierarchical_vq.HierarchicalVQ is latent_codec.HierarchicalVQ
assert latent_codec.models.hierarchical_vq is hierarchical_vq is sys.modules[hierarchical_vq.__name__]
save_file(images, answer)
"""


def with_components(pipeline, **components):
    """Made anew, because pipelines read some sizes of their components when they are made."""
    return type(pipeline)(**{**pipeline.components, **components})


def t5_text_encoder(width):
    config = T5Config(d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=99)
    return T5EncoderModel(config).eval()  # which has dropout


def t5_tokenizer():
    """A T5 tokenizer that knows the alphabet."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((each, -3.0) for each in letters),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def pipelines_that_read(folder):
    """Pipelines with text encoders of their own, and what they are called with; by name."""
    clip = letter_tokenizer(folder)
    sdxl = sdxl_pipeline(build_codec(latents_mean=[-1.6, 1.2, 0.1, 0.3], latents_std=[8.4, 5.4, 6.0, 7.0]))
    sdxl = with_components(
        sdxl,
        unet=build_unet(cross_attention_dim=2 * WIDTH, **SDXL_UNET),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection),
        tokenizer=clip,
        tokenizer_2=clip,
    )
    sd3 = with_components(
        sd3_pipeline(build_sixteen_channel_codec(), text_width=2 * WIDTH),
        text_encoder=clip_text_encoder(CLIPTextModelWithProjection),
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection),
        text_encoder_3=t5_text_encoder(2 * WIDTH),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5_tokenizer(),
    )
    flux, flux_vq = (
        with_components(
            flux_pipeline(codec),
            text_encoder=clip_text_encoder(),
            text_encoder_2=t5_text_encoder(WIDTH),
            tokenizer=clip,
            tokenizer_2=t5_tokenizer(),
        )
        for codec in (build_sixteen_channel_codec(), build_vq_codec(shift_factor=0.3))
    )
    options = {"num_inference_steps": 2}
    reading = {"prompt": "a cat", "height": 32, "width": 32, "output_type": "pt", **options}
    return {
        "sd-vq": (sd_pipeline(build_vq_codec(), clip), reading),
        "sd-tiny": (sd_pipeline(build_tiny_codec(), clip), reading),
        "sdxl": (sdxl, reading),
        "sd3": (sd3, {**reading, "max_sequence_length": 8}),
        "flux": (flux, {**reading, "max_sequence_length": 8}),
        "flux-vq": (flux_vq, {**reading, "max_sequence_length": 8}),
        "ldm": (ldm_pipeline(build_vq_codec()), {"output_type": "np", **options}),
    }


def test_the_package_and_its_modules_metadata_need_no_library():
    run_fresh(LIGHT)


def test_pipelines_reload_after_import_latent_codec_alone(tmp_path):
    expected, options = {}, {}
    for name, (pipeline, options[name]) in pipelines_that_read(tmp_path).items():
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(generator=torch.Generator().manual_seed(3), **options[name]).images
        expected[name] = torch.as_tensor(drawn)
        assert expected[name].std() > 0.01  # else nothing would be compared
        pipeline.save_pretrained(tmp_path / name)
    (tmp_path / "options.json").write_text(json.dumps(options))
    index = json.loads((tmp_path / "sd-vq" / "model_index.json").read_text())
    assert index["vae"] == ["latent_codec.models.autoencoder_vq", "AutoencoderVQ"]

    run_forked(RELOADER, tmp_path, tmp_path / "answer.safetensors")
    images = load_file(tmp_path / "answer.safetensors")
    assert images.keys() == expected.keys()
    for name, drawn in expected.items():
        # Loaded weights lie elsewhere in memory, so vectorized sums may run in another order.
        assert torch.allclose(images[name], drawn, rtol=0, atol=1e-5), name
    assert LatentCodec.from_pretrained(tmp_path / "sd-vq").is_discrete
    assert LatentCodec.from_pretrained(tmp_path / "sd3").latent_space.shift_factor == 0.0609
    assert LatentCodec.from_pretrained(tmp_path / "flux-vq").latent_space.shift_factor == 0.3


@pytest.mark.parametrize(
    "code",
    [
        "import transformers; transformers.CLIPTextModel; from latent_codec import LatentCodec",
        "import torch, diffusers; diffusers.VQModel; from latent_codec.models.autoencoder_vq import AutoencoderVQ",
        "from latent_codec.models.hierarchical_vq import *; HierarchicalVQ",
        "import sys; module = sys.modules['latent_codec.models.autoencoder_vq']; assert not hasattr(module, 'no');"
        "assert hasattr(module, 'ModelMixin')",
        "from concurrent.futures import ThreadPoolExecutor as P; m = latent_codec.models.autoencoder_vq;"
        "assert len(set(P(8).map(lambda n: m.AutoencoderVQ, range(8)))) == 1",
    ],
)
def test_deferred_modules_import_in_any_order(code):
    """tests/test_latent_preview_callback.py has them import their libraries."""
    run_forked(f"import latent_codec; {code}")


LOADER = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latent_codec":
            raise ImportError("latent_codec is not to be had here")
sys.meta_path.insert(0, Block())
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
*folders, tensors, answer = sys.argv[1:]
images, results = load_file(tensors)["images"], {}
for number, folder in enumerate(folders):
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode().contiguous()
        results |= {f"mode {number}": mode, f"decoded {number}": vae.decode(mode).sample.contiguous()}
save_file(results, answer)
assert "latent_codec" not in sys.modules
"""


def test_plain_diffusers_loads_folders_where_our_package_is_not_importable(tmp_path):
    build_codec(scaling_factor=0.3).save_pretrained(tmp_path / "codec")
    folders = [tmp_path / "codec", ASSETS / DEFAULT]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"images": images}, tmp_path / "images.safetensors")
    files = [tmp_path / "images.safetensors", tmp_path / "answer.safetensors"]
    run_forked(LOADER, *folders, *files, cwd=tmp_path)
    answer = load_file(tmp_path / "answer.safetensors")

    for number, folder in enumerate(folders):
        codec = LatentCodec.from_pretrained(folder)
        mode, expected = answer[f"mode {number}"], answer[f"decoded {number}"]
        with torch.no_grad():
            assert torch.equal(codec.autoencoder.encode(images).latent_dist.mode(), mode), folder
            assert torch.equal(codec.autoencoder.decode(mode).sample, expected), folder
        # Our own calls lay the weights out for speed, and scale and unscale latents: both round.
        latents = codec.encode(images)
        torch.testing.assert_close(latents, codec.latent_space.normalize(mode), rtol=0, atol=2e-5)
        decoded = codec.decode(latents, output_type="pt")
        torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=0, atol=2e-5)


def test_config_holds_nothing_that_diffusers_does_not_know(tmp_path):
    build_codec().save_pretrained(tmp_path)
    config, unused = diffusers.AutoencoderKL.load_config(Path(tmp_path), return_unused_kwargs=True)
    assert config["_class_name"] == "AutoencoderKL"
    assert not unused
    assert set(config) - {"_class_name", "_diffusers_version"} <= set(diffusers.AutoencoderKL().config)
