"""A codec's autoencoder in real diffusers pipelines, with small random denoisers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.codec_folders import ASSETS, DEFAULT

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
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        **config,
    )


def sd_pipeline(codec, tokenizer=None):
    return diffusers.StableDiffusionPipeline(
        vae=codec.autoencoder,
        unet=build_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=WIDTH,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=99,
            )
        ),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(codec):
    unet = build_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=codec.autoencoder,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def sd3_pipeline(codec):
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=codec.space.channels,
        out_channels=codec.space.channels,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=WIDTH,
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
        in_channels=codec.space.channels * 4,
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
    """One picture of 32x32 from fixed prompt embeddings and seed."""
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
    # The pipeline moves the picture to [0, 1], which rounds.
    torch.testing.assert_close(decoded / 2 + 0.5, expected, rtol=0, atol=1e-6)


def test_codec_encodes_pictures_as_the_img2img_pipeline_does():
    codec = build_codec(scaling_factor=1.5305, shift_factor=0.0609)
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**sd3_pipeline(codec).components)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # At t = 0 a flow has no noise yet, so that what the pipeline prepares is the encoded picture itself.
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
    # Loaded weights lie elsewhere in memory, so vectorised sums may run in another order.
    torch.testing.assert_close(draw(again), before, rtol=0, atol=1e-5)
    assert LatentCodec.from_pretrained(tmp_path / "pipeline").fingerprint == codec.fingerprint


def build_vq_codec():
    torch.manual_seed(0)
    autoencoder = AutoencoderVQ(
        block_out_channels=(WIDTH,) * 4,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        num_vq_embeddings=32,
        scaling_factor=0.5,
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
    # The pipeline moves the picture to [0, 1], and its latents through a difference, which both round.
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
    picture = pipeline(**arguments, **generators, strength=0.5).images
    assert picture.shape == (1, 3, 32, 32) and picture.isfinite().all()
    # What it encodes is the codec's latents, before any noise.
    pipeline.scheduler.add_noise = lambda latents, noise, timestep: latents
    encoded = pipeline.prepare_latents(
        image, torch.tensor([1]), 1, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(encoded, codec.encode(image))


RELOADER = """
import sys
import latent_codec
heavy = [name for name in ("torch", "diffusers", "transformers", "numpy") if name in sys.modules]
assert not heavy, heavy
import inspect
inspect.stack()  # asks every module for its file
assert "torch" not in sys.modules, "reading a module's metadata loaded it"
import diffusers, torch
from safetensors.torch import save_file
folder, answer = sys.argv[1:]
pipeline = getattr(diffusers, "StableDiffusionPipeline").from_pretrained(folder)
from latent_codec.models.autoencoder_vq import AutoencoderVQ
import latent_codec.models.hierarchical_vq as hierarchical_vq
assert type(pipeline.vae) is AutoencoderVQ is latent_codec.AutoencoderVQ
assert hierarchical_vq.HierarchicalVQ is latent_codec.HierarchicalVQ
assert latent_codec.models.hierarchical_vq is hierarchical_vq is sys.modules[hierarchical_vq.__name__]
pipeline.set_progress_bar_config(disable=True)
images = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt",
    height=32, width=32).images
save_file({"images": images.contiguous()}, answer)
"""


def run_alone(code, *arguments):
    """Run Python `code` in a process of its own, on this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_pipeline_with_a_discrete_codec_reloads_after_import_latent_codec_alone(tmp_path):
    pipeline = sd_pipeline(build_vq_codec(), letter_tokenizer(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    size = {"height": 32, "width": 32}
    expected = pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt", **size).images
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["latent_codec.models.autoencoder_vq", "AutoencoderVQ"]

    run_alone(RELOADER, tmp_path / "pipeline", tmp_path / "answer.safetensors")
    images = load_file(tmp_path / "answer.safetensors")["images"]
    # Loaded weights lie elsewhere in memory, so vectorised sums may run in another order.
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert LatentCodec.from_pretrained(tmp_path / "pipeline").is_discrete


@pytest.mark.parametrize(
    "code",
    [
        "import transformers; transformers.CLIPTextModel; from latent_codec import LatentCodec",
        "import torch, diffusers; diffusers.VQModel; from latent_codec.models.autoencoder_vq import AutoencoderVQ",
        "from latent_codec.models.hierarchical_vq import *; HierarchicalVQ",
        "from latent_codec import models; models.autoencoder_vq.AutoencoderVQ; import latent_codec.cli.train",
        "import sys; module = sys.modules['latent_codec.models.autoencoder_vq']; assert not hasattr(module, 'no');"
        "assert hasattr(module, 'ModelMixin')",
        "from concurrent.futures import ThreadPoolExecutor as P; m = latent_codec.models.autoencoder_vq;"
        "assert len(set(P(8).map(lambda n: m.AutoencoderVQ, range(8)))) == 1",
    ],
)
def test_deferred_modules_import_in_any_order(code):
    run_alone(f"import latent_codec; {code}")


LOADER = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latent_codec":
            raise ImportError("latent_codec is not to be had here")
sys.meta_path.insert(0, Block())
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
folder, tensors, answer = sys.argv[1:]
vae = AutoencoderKL.from_pretrained(folder)
images = load_file(tensors)["images"]
with torch.no_grad():
    mode = vae.encode(images).latent_dist.mode().contiguous()
    save_file({"mode": mode, "decoded": vae.decode(mode).sample.contiguous()}, answer)
assert "latent_codec" not in sys.modules
"""


@pytest.mark.parametrize("which", ["saved", "shipped"])
def test_plain_diffusers_loads_the_folder_where_our_package_is_not_importable(which, tmp_path):
    if which == "shipped":
        folder = ASSETS / DEFAULT
        codec = LatentCodec.from_pretrained()
    else:
        folder = tmp_path / "codec"
        build_codec(scaling_factor=0.3).save_pretrained(folder)
        codec = LatentCodec.from_pretrained(folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"images": images}, tmp_path / "images.safetensors")
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            LOADER,
            folder,
            tmp_path / "images.safetensors",
            tmp_path / "answer.safetensors",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = load_file(tmp_path / "answer.safetensors")

    latents = codec.encode(images)
    assert torch.equal(latents, codec.space.normalize(answer["mode"]))
    with torch.no_grad():
        assert torch.equal(codec.autoencoder.decode(answer["mode"]).sample, answer["decoded"])
    # Through our own decode the latents are scaled and unscaled, which rounds.
    decoded = codec.decode(latents, output_type="pt")
    torch.testing.assert_close(decoded, answer["decoded"].clamp(-1, 1), rtol=0, atol=2e-5)


def test_config_holds_nothing_that_diffusers_does_not_know(tmp_path):
    build_codec().save_pretrained(tmp_path)
    config, unused = diffusers.AutoencoderKL.load_config(Path(tmp_path), return_unused_kwargs=True)
    assert config["_class_name"] == "AutoencoderKL"
    assert not unused
    assert set(config) - {"_class_name", "_diffusers_version"} <= set(diffusers.AutoencoderKL().config)
