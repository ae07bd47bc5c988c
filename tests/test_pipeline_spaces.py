"""Latents against the pipelines' own code, as installed: every row of families/pipeline_spaces.py, in tiny random builds.

Pipelines are built with a real tiny autoencoder and nothing else. What they encode with is called or, where it is a few
statements of `__call__`, executed; decoding executes the statements of `__call__` after the denoising loop. Noise is
off: posteriors give their mode, and schedulers add nothing.
"""

import ast
import inspect
import sys
import textwrap
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines import kolors  # diffusers itself offers it only next to sentencepiece
from helpers.autoencoders import build as build_tiny
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.families.pipeline_spaces import PIPELINES, ROWS

# Every entry differs from its neutral value, so that one which is ignored shows.
SCALE_AND_SHIFT = {"scaling_factor": 0.7, "shift_factor": 0.3}


def statistics(channels: int) -> dict[str, list[float]]:
    return {
        "latents_mean": [0.1 * i - 0.25 for i in range(channels)],
        "latents_std": [1.2 + 0.1 * i for i in range(channels)],
    }


def blocks(*widths: int) -> dict:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1,
    }


def vq(**changes):
    autoencoder = diffusers.VQModel(**changes, latent_channels=4, num_vq_embeddings=32, scaling_factor=0.7)
    torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    return autoencoder


def flux2():
    autoencoder = diffusers.AutoencoderKLFlux2(**blocks(8, 8, 8, 16), latent_channels=4, norm_num_groups=4)
    autoencoder.register_to_config(batch_norm_eps=0.01)  # published: 1e-4, which differs from 1e-5 too little
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.05, 0.5)
    return autoencoder


SIDES = [f"{side}_{{}}" for side in ("encoder", "decoder")]
TINY = {side.format("block_out_channels"): (8,) * 4 for side in SIDES}
DC = {side.format(key): value for side in SIDES for key, value in (
    ("block_out_channels", (8, 8, 8)), ("layers_per_block", (1, 1, 1)), ("qkv_multiscales", ((), (), ())),
    ("block_types", ("ResBlock",) * 3),
)}  # fmt: skip

BUILDERS = {
    "AutoencoderKL": lambda: diffusers.AutoencoderKL(
        **blocks(8, 8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        force_upcast=False,
        **SCALE_AND_SHIFT,
        **statistics(4),
    ),
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(**TINY, **SCALE_AND_SHIFT),
    "AutoencoderDC": lambda: diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.7, **DC
    ),
    "AutoencoderKLHunyuanImage": lambda: build_tiny(
        "AutoencoderKLHunyuanImage",
        latent_channels=8,
        block_out_channels=(32, 32, 32, 32),
        spatial_compression_ratio=8,
        scaling_factor=0.7,
    ),
    "AutoencoderKLHunyuanImageRefiner": lambda: build_tiny(
        "AutoencoderKLHunyuanImageRefiner", scaling_factor=0.7
    ),
    "movq": lambda: vq(**blocks(32, 32, 32, 32), norm_type="spatial"),
    "VQModel": lambda: vq(**blocks(8, 8, 8), norm_num_groups=4),
    "PaellaVQModel": lambda: build_tiny("PaellaVQModel", scale_factor=0.4),
    "AutoencoderKLFlux2": flux2,
    "AutoencoderKLQwenImage": lambda: build_tiny("AutoencoderKLQwenImage", z_dim=4, **statistics(4)),
    "AutoencoderKLQwenImage21": lambda: build_tiny("AutoencoderKLQwenImage21", z_dim=8, **statistics(8)),
    "AutoencoderKLWan": lambda: build_tiny("AutoencoderKLWan 2.2", **statistics(8)),
}


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 4), np.uint8)


class Built(NamedTuple):
    codec: LatentCodec
    images: torch.Tensor
    latents: torch.Tensor
    decoded: np.ndarray


@cache
@torch.no_grad()
def built(title: str) -> Built:
    """A codec of the autoencoder that a row's pipelines are made for, in their space, and what it makes of images."""
    (row,) = (row for row in ROWS if row.title == title)
    torch.manual_seed(0)
    name = "movq" if title.startswith("Kandinsky") and "VQModel" in row.autoencoders else row.autoencoders[0]
    codec = LatentCodec(BUILDERS[name](), pipeline=row.pipelines[0])
    images = torch.from_numpy(PIXELS)[..., : codec.channels].permute(0, 3, 1, 2) / 127.5 - 1
    latents = codec.encode(images)
    return Built(codec, images, latents, codec.decode(latents, output_type="np"))


class Noiseless(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler that mixes no noise in."""

    init_noise_sigma = 1.0

    def scale_noise(self, sample, *_):
        return sample

    add_noise = scale_noise


class Stub(SimpleNamespace):
    """A component that only has what its pipeline asks of it when it is built."""


ABSENT = {  # what pipelines ask of components when they are built
    "processor": Stub(
        apply_chat_template=lambda *_, **__: [[0]], tokenizer=SimpleNamespace(encode=lambda _: [0])
    ),
    "text_processor": Stub(image_processor=None),
    "safety_checker": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
    "transformer": None,
}


def build(name: str, autoencoder):
    """The pipeline, with its autoencoder alone."""
    kind = getattr(kolors if name.startswith("Kolors") else diffusers, name)
    parameters = inspect.signature(kind).parameters
    given = {
        key: ABSENT.get(key)
        for key, each in parameters.items()
        if each.default is each.empty or key in ABSENT
    }
    (place,) = {"vae", "movq", "vqgan", "vqvae"} & set(parameters)
    scheduler = Noiseless()
    scheduler.register_to_config(sigma_data=diffusers.SCMScheduler().config.sigma_data)
    if name.startswith("JoyImage"):
        given["transformer"] = Stub(config=SimpleNamespace(patch_size=(1, 1, 1)))
    if name == "Flux2KleinKVPipeline":
        given["transformer"] = Stub(transformer_blocks=(), single_transformer_blocks=())
    if name == "Cosmos2TextToImagePipeline":  # it builds one where it is given none
        given["safety_checker"] = Stub()
    pipeline = kind(**given | {place: autoencoder, "scheduler": scheduler})
    if name == "Cosmos2TextToImagePipeline":
        pipeline.register_modules(safety_checker=None)
    return pipeline


def holds(node: ast.AST, method: str) -> bool:
    """Whether a method of this name is called in it: of the autoencoder for encode and decode."""
    places = ("vae", "movq", "vqgan", "vqvae", "scheduler")
    return any(
        isinstance(each, ast.Call)
        and isinstance(each.func, ast.Attribute)
        and each.func.attr == method
        and isinstance(each.func.value, ast.Attribute)
        and each.func.value.attr in places
        for each in ast.walk(node)
    )


def statements(pipeline, method: str) -> list[ast.stmt]:
    """The innermost loop-free block of `__call__` that holds a call of `method`."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(pipeline).__call__)))
    body = ast.parse(source).body[0].body
    nested = ast.With if method == "decode" else (ast.With, ast.If, ast.For)
    while True:
        holder = next(each for each in body if holds(each, method))
        if not isinstance(holder, nested):
            return body
        body = next(
            block
            for block in (holder.body, getattr(holder, "orelse", []))
            if any(holds(each, method) for each in block)
        )


def execute(pipeline, body: list[ast.stmt], given: dict):
    """Run statements of `__call__` as a function of the names in `given`, with the globals of its module."""
    function = ast.parse(f"def own_lines({', '.join(given)}): pass").body[0]
    function.body = body
    module = ast.fix_missing_locations(ast.Module([function], []))
    names = dict(vars(sys.modules[type(pipeline).__module__]))
    exec(compile(module, type(pipeline).__module__, "exec"), names)
    return names["own_lines"](**given)


def decoded(pipeline, given: dict) -> np.ndarray:
    """What the statements after the denoising loop make of latents: images (B, H, W, C) in [0, 1]."""
    if hasattr(pipeline, "decode_prediction"):  # Marigold
        return pipeline.decode_prediction(given["latents"]).permute(0, 2, 3, 1).numpy()
    body = statements(pipeline, "decode")
    first = 1 + max(index for index, each in enumerate(body) if holds(each, "step"))
    output = execute(pipeline, body[first:], given)
    images = output[0] if isinstance(output, tuple) else output
    images = np.concatenate(images) if isinstance(images, list) else images  # of each image its layers
    return images[:, 0] if images.ndim == 5 else images


def encoded(pipeline, method: str | None, given: dict):
    """What the method or, where it is None, the statements of `__call__` around `encode` make of images."""
    if method is not None:
        function = getattr(pipeline, method)
        parameters = inspect.signature(function).parameters
        return function(
            **{
                key: given[key]
                for key, each in parameters.items()
                if key in given or each.default is each.empty
            }
        )
    body = statements(pipeline, "encode")
    first = next(index for index, each in enumerate(body) if holds(each, "encode"))
    (name,) = (target.id for target in body[first].targets)
    last = first
    while last < len(body) and ast.unparse(getattr(body[last], "targets", [ast.Constant(0)])[0]) == name:
        last += 1
    return execute(
        pipeline,
        [*body[first:last], ast.Return(ast.Name(name, ast.Load()))],
        {"self": pipeline} | given,
    )


@pytest.fixture
def noise_off(monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


COMMON = {
    "batch_size": 2, "num_images_per_prompt": 1, "height": 32, "width": 64, "device": "cpu", "dtype": torch.float32,
    "generator": None,
}  # fmt: skip

METHODS = dict.fromkeys([
    "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusion3InpaintPipeline",
    "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline", "ChromaImg2ImgPipeline",
    "ChromaInpaintPipeline", "LongCatImageEditPipeline", "HunyuanImageRefinerPipeline", "Flux2Pipeline",
    "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline", "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditInpaintPipeline", "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline", "QwenImage21Pipeline",
], "_encode_vae_image") | dict.fromkeys([
    "StableDiffusionImg2ImgPipeline", "StableDiffusionDepth2ImgPipeline", "LatentConsistencyModelImg2ImgPipeline",
    "MarigoldDepthPipeline", "Kandinsky5I2IPipeline", "StableDiffusionXLImg2ImgPipeline", "KolorsImg2ImgPipeline",
    "StableDiffusion3Img2ImgPipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "SanaSprintImg2ImgPipeline",
    "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "ChronoEditPipeline", "JoyImageEditPipeline",
], "prepare_latents") | dict.fromkeys([
    "DreamLitePipeline", "DreamLiteMobilePipeline", "BriaFibo2Pipeline",
], "prepare_image_latents") | {
    "BriaFiboEditPipeline": "prepare_reference_latents", "OmniGenPipeline": "encode_input_images",
} | dict.fromkeys([
    "CogView4ControlPipeline", "FluxControlPipeline", "GlmImagePipeline", "SanaControlNetPipeline",
    "KandinskyImg2ImgPipeline", "KandinskyV22Img2ImgPipeline", "Kandinsky3Img2ImgPipeline",
])  # fmt: skip
"""By pipelines with encoding code, of every row that has any: its method; None: statements of `__call__`."""

WITHOUT_ENCODING = {
    "Stable Diffusion x4 upscaler", "Latent diffusion, text to image", "DiT", "PixArt", "HunyuanDiT", "Lumina 1",
    "AuraFlow", "CogView3 Plus", "Ovis-Image", "Bria 3", "Lumina 2", "HiDream", "PRX", "HunyuanImage 2.1",
    "Latent diffusion, super-resolution", "Stable Cascade", "ERNIE-Image", "Ideogram 4", "Krea 2", "NucleusMoE-Image",
    "Cosmos 2 text to image",
}  # fmt: skip
"""Rows whose pipelines only make images of noise, so that nothing but decoding is there to compare with."""


def grid(name: str, output, space) -> torch.Tensor:
    """What a pipeline's encoding code returned -> latents, as a grid or as LatentSpace.pack has them."""
    second = name in ("WanImageToVideoPipeline", "ChronoEditPipeline", "JoyImageEditPipeline")
    latents = output[second] if isinstance(output, (tuple, list)) else output
    if name == "Kandinsky5I2IPipeline":  # noise, latents and a mask; channels last, after one frame
        latents = latents[:, 0, :, :, space.channels : 2 * space.channels].permute(0, 3, 1, 2)
    if name == "JoyImageEditPipeline":  # (B, 1, C, 1, h, w)
        latents = latents[:, 0]
    if name in ("WanImageToVideoPipeline", "ChronoEditPipeline"):  # a mask, then latents
        latents = latents[:, -space.channels :]
    return latents if space.repeated or latents.ndim < 5 else latents[:, :, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_latents_are_those_that_the_pipeline_encodes(name, noise_off):
    row = PIPELINES[name]
    codec, images, latents, _ = built(row.title)
    autoencoder = codec.autoencoder
    pil = [Image.fromarray(each[..., :3]) for each in PIXELS]
    image = images.unsqueeze(2) if row.frame_axis and name != "ChronoEditPipeline" else images
    given = COMMON | {
        "image": image,
        "control_image": images,
        "condition_image": images,
        "input_pixel_values": [images],
        "video": image,
        "num_channels_latents": latents.shape[1],
        "timestep": torch.tensor(0.0),
        "latents": None,
        "ensemble_size": 1,
        "num_frames": 1,
        "video_length": 1,
        "vae_shift_factor": 0,
        "num_inference_steps": 1,
    }
    if name in ("WanImageToVideoPipeline", "ChronoEditPipeline"):
        given |= {"image": images[:1], "batch_size": 1}
    if name in ("Kandinsky5I2IPipeline", "JoyImageEditPipeline"):
        given["image"] = pil
    if name == "BriaFiboEditPipeline":
        given["image"] = pil[0]
    if name == "BriaFibo2Pipeline":
        given |= {"image": [images], "batch_size": 1}
    if name == "GlmImagePipeline":
        given |= {key: torch.tensor(autoencoder.config[key]).view(1, -1, 1, 1) for key in statistics(4)}

    found = grid(name, encoded(build(name, autoencoder), METHODS[name], given), codec.latent_space)

    if name in row.encodes:  # what it reads here is not what it reads in decoding
        space = replace(row, reads=row.encodes[name]).latent_space(latents.shape[1], 8, autoencoder.config)
        assert not torch.allclose(found, latents, atol=1e-2)
        latents = space.normalize(codec.latent_space.denormalize(latents))
    expected = latents[: len(found)]
    if found.shape != expected.shape:
        expected = codec.latent_space.pack(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


NOT_DECODED = {
    "MarigoldDepthPipeline": "makes depths of the image",
    "MarigoldNormalsPipeline": "makes normals of the image",
    "StableCascadeCombinedPipeline": "calls StableCascadeDecoderPipeline",
    "WanAnimatePipeline": "drops the first frame",
}
DECODED = [name for row in ROWS for name in row.pipelines if name not in NOT_DECODED]


@torch.no_grad()
@pytest.mark.parametrize("name", DECODED)
def test_images_are_those_that_the_pipeline_decodes(name):
    row = PIPELINES[name]
    codec, _, latents, expected = built(row.title)
    space, pipeline = codec.latent_space, build(name, codec.autoencoder)
    rows, columns = latents.shape[2:]
    packed = space.pack(latents)
    if row.channel_axis == 4:  # channels last
        packed = packed.permute(0, 2, 3, 1).unsqueeze(1)
    if name == "QwenImageLayeredPipeline":  # it drops the first layer, which is the image as a whole
        packed = packed.repeat(1, 2, 1)
    if name == "JoyImageEditPipeline":  # of several images it decodes the last
        packed = packed.unsqueeze(1)
    if name == "JoyImageEditPlusPipeline":  # patches of 1x1x1
        packed = latents.flatten(2).mT[..., None, None, None]
    given = COMMON | {
        "self": pipeline,
        "latents": packed,
        "denoised": packed,
        "latent_model_input": packed,
        "output_type": "np",
        "return_dict": False,
        "prompt_embeds": torch.zeros(1),
        "use_resolution_binning": False,
        "num_channels_latents": latents.shape[1],
        "padding_mask_crop": None,
        "guidance_scale": 1.0,
        "calculated_height": 32,
        "calculated_width": 64,
        "grid_h": rows,
        "grid_w": columns,
        "do_patching": False,
        "num_reference_images": 0,
        "vae_dtype": torch.float32,
        "enable_temporal_reasoning": False,
        "enable_denormalization": True,
        "patch_size": 2,
        "layers": 1,
        "kv_cache": {},
        "kv_caches": {},
        "clean_reference_backup": packed.clone(),
        "target_mask": torch.ones(packed.shape[:2], dtype=torch.bool),
        "shape_list": [[(1, rows, columns)]] * 2,
    }
    if name.startswith("Flux2"):
        given["latent_ids"] = given["latent_image_ids"] = pipeline._prepare_latent_ids(latents)

    found = decoded(pipeline, given)

    if name in row.decodes:  # what it reads here is not what it reads in encoding
        own = replace(row, reads=row.decodes[name]).latent_space(
            latents.shape[1], 8, codec.autoencoder.config
        )
        expected = codec.decode(space.normalize(own.denormalize(latents)), output_type="np")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_every_row_is_compared():
    titles = {row.title for row in ROWS}
    assert {PIPELINES[name].title for name in DECODED} == titles
    assert {PIPELINES[name].title for name in METHODS} == titles - WITHOUT_ENCODING
