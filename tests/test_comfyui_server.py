"""The nodes in a real ComfyUI: a server on loopback, workflows through its HTTP API, previews from its WebSocket.

COMFYUI_PATH names a checkout of ComfyUI, COMFYUI_PYTHON an interpreter that has what it needs (default: this one).
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.autoencoders import build
from helpers.comfyui import ComfyUI, Listener, copy_nodes
from PIL import Image
from safetensors.torch import load_file

from latent_codec import LatentCodec, bitstream
from latent_codec.cli import main
from latent_codec.images.sample_photograph import sample_photograph
from latent_codec.images.tensors import to_pil
from latent_codec.previews import LatentPreviewer

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_PATH does not name a checkout of ComfyUI")

RANDOM = {
    "hierarchical": "HierarchicalVQ",
    "f4": "AutoencoderKL",
    "qwen": "AutoencoderKLQwenImage",
    "layered": "AutoencoderKLQwenImage, layered",
    "flux2": "AutoencoderKLFlux2",
}
"""Codecs of random weights in models/latent_codecs."""
TEMPORAL = {"temporal_size": 64, "temporal_overlap": 8}
"""What tiled nodes take for video."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models"):
        (base / name).mkdir()
    assert main(["comfyui", "install", str(base)]) == 0
    copy_nodes(base)
    for name, kind in RANDOM.items():
        LatentCodec(build(kind), name=name).save_pretrained(base / "models/latent_codecs" / name)
    server = ComfyUI(Path(CHECKOUT), os.environ.get("COMFYUI_PYTHON", sys.executable), base)
    yield server
    server.close()


@pytest.fixture(scope="module")
def image(server) -> Image.Image:
    """A small photograph, in the input folder as image.png, and with alpha as alpha.png."""
    photo = Image.open(sample_photograph()).convert("RGB").resize((96, 64), Image.Resampling.LANCZOS)
    photo.save(server.base / "input/image.png")
    with_alpha = photo.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    with_alpha.save(server.base / "input/alpha.png")
    return photo


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def round_trip(codec: str, *, image: str = "image.png", tiles: dict | None = None, **settings) -> dict:
    """LoadImage -> VAE Encode -> VAE Decode -> SaveImage, with or without tiles."""
    tiled = "Tiled" if tiles else ""
    return {
        "image": node("LoadImage", image=image),
        "codec": node("LatentCodecLoad", codec=codec, **settings),
        "encode": node(f"VAEEncode{tiled}", pixels=["image", 0], vae=["codec", 0], **(tiles or {})),
        "decode": node(f"VAEDecode{tiled}", samples=["encode", 0], vae=["codec", 0], **(tiles or {})),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="round-trip"),
    }


def saved(server: ComfyUI, outputs: dict, name: str = "save") -> list[np.ndarray]:
    return [np.array(Image.open(server.path(file))) for file in outputs[name]["images"]]


def assert_alike(found: np.ndarray, expected: Image.Image) -> None:
    """Within 1/255: ComfyUI rounds images down to 8 bits, this project to the nearest."""
    expected = np.array(expected.convert("RGB") if found.shape[-1] == 3 else expected)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("codec", ["default", "default-vq", *(name for name in RANDOM if name != "layered")])
def test_a_round_trip_is_that_of_latent_codec(server, image, codec):
    listed = codec if codec.startswith("default") else f"latent_codecs/{codec}"
    (found,) = saved(server, server.run(round_trip(listed)))

    path = codec if listed == codec else server.base / "models" / listed
    (expected,) = LatentCodec.from_pretrained(path).roundtrip(image)
    assert_alike(found, expected)


def test_models_are_listed_by_folder(server):
    found = server.get("/object_info/LatentCodecLoad")["LatentCodecLoad"]["input"]["required"]["codec"][0]
    assert found == [
        "default",
        "default-vq",
        "garments",
        *(f"latent_codecs/{name}" for name in sorted(RANDOM)),
    ]


def test_half_precision_is_close(server, image):
    (found,) = saved(server, server.run(round_trip("latent_codecs/f4", dtype="bfloat16")))
    (expected,) = LatentCodec.from_pretrained(server.base / "models/latent_codecs/f4").roundtrip(image)
    assert 0 < np.abs(found.astype(int) - np.array(expected)).max() < 16


def test_a_saved_vae_is_the_codecs_weights(server):
    workflow = {
        "codec": node("LatentCodecLoad", codec="default"),
        "save": node("VAESave", vae=["codec", 0], filename_prefix="vae/saved"),
    }
    server.run(workflow)
    (path,) = (server.base / "output/vae").glob("saved*.safetensors")
    found, expected = load_file(path), LatentCodec.from_pretrained("default").autoencoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_taef2_opens_from_one_of_its_two_files(server, image, shared):
    path = shared / "checkpoints/taef2_encoder.pth"
    (found,) = saved(server, server.run(round_trip("default", path=str(path))))
    assert_alike(found, LatentCodec.from_pretrained(path).roundtrip(image)[0])


@pytest.mark.parametrize("codec", ["default", "default-vq", "latent_codecs/qwen", "latent_codecs/flux2"])
def test_tiles_give_what_the_whole_image_gives(server, image, codec):
    outputs = server.run(round_trip(codec, tiles={"tile_size": 64, "overlap": 16, **TEMPORAL}))
    path = codec if codec.startswith("default") else server.base / "models" / codec
    (expected,) = LatentCodec.from_pretrained(path).roundtrip(image)
    assert_alike(saved(server, outputs)[0], expected)


def test_alpha_goes_through_a_codec_of_four_channels(server, image):
    workflow = {
        "image": node("LoadImage", image="alpha.png"),
        "join": node("JoinImageWithAlpha", image=["image", 0], alpha=["image", 1]),
        "codec": node("LatentCodecLoad", codec="latent_codecs/layered"),
        "encode": node("LatentCodecEncodeWithAlpha", pixels=["join", 0], vae=["codec", 0]),
        "decode": node("VAEDecode", samples=["encode", 0], vae=["codec", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="alpha"),
    }
    (found,) = saved(server, server.run(workflow))
    codec = LatentCodec.from_pretrained(server.base / "models/latent_codecs/layered")
    assert_alike(found, codec.roundtrip(Image.open(server.base / "input/alpha.png"))[0])


def test_sides_are_cropped_to_their_middle_as_comfyui_does(server, image):
    image.crop((0, 0, 91, 61)).save(server.base / "input/odd.png")
    (found,) = saved(server, server.run(round_trip("latent_codecs/f4", image="odd.png")))
    codec = LatentCodec.from_pretrained(server.base / "models/latent_codecs/f4")
    assert_alike(found, codec.roundtrip(image.crop((1, 0, 89, 60)))[0])


@pytest.mark.parametrize(
    "codec, settings",
    [("default", {"quality": 40, "max_bytes": 0}), ("default-vq", {"quality": -1, "max_bytes": 0})],
)
def test_compressed_files_are_saved_and_loaded(server, image, codec, settings):
    workflow = {
        "image": node("LoadImage", image="image.png"),
        "codec": node("LatentCodecLoad", codec=codec),
        "compress": node(
            "LatentCodecSaveCompressed",
            images=["image", 0],
            vae=["codec", 0],
            filename_prefix="small/x",
            **settings,
        ),
        "save": node("SaveImage", images=["compress", 0], filename_prefix="decoded"),
        "report": node("PreviewAny", source=["compress", 1]),
    }
    outputs = server.run(workflow)
    (file,) = outputs["compress"]["files"]
    path, opened = server.path(file), LatentCodec.from_pretrained(codec)
    data = path.read_bytes()
    assert outputs["report"]["text"] == [
        f"{path.name}: {len(data):,} bytes, {8 * len(data) / (96 * 64):.3f} bits per pixel"
    ]
    assert data == bitstream.compress(
        opened, image, quality=settings["quality"] if settings["quality"] >= 0 else None
    )
    expected = bitstream.decompress(opened, data)
    assert_alike(saved(server, outputs)[0], expected)

    outputs = server.run(
        {
            "codec": node("LatentCodecLoad", codec=codec),
            "file": node(
                "LatentCodecLoadCompressed",
                file=f"{file['subfolder']}/{file['filename']} [output]",
                vae=["codec", 0],
                partial=False,
            ),
            "decode": node("VAEDecode", samples=["file", 1], vae=["codec", 0]),
            "image": node("SaveImage", images=["file", 0], filename_prefix="loaded"),
            "latent": node("SaveImage", images=["decode", 0], filename_prefix="loaded-latent"),
        }
    )
    for name in ("image", "latent"):
        assert_alike(saved(server, outputs, name)[0], expected)


def sampling(steps: int, **preview) -> dict:
    """KSampler with the tiny model, with a preview where `preview` says which."""
    workflow = {
        "model": node("TinyModel"),
        "codec": node("LatentCodecLoad", codec="default"),
        "empty": node("EmptyLatentImage", width=128, height=64, batch_size=2),
        "sample": node(
            "KSampler",
            model=["preview" if preview else "model", 0],
            seed=3,
            steps=steps,
            cfg=2.0,
            sampler_name="euler_ancestral",
            scheduler="normal",
            positive=["model", 1],
            negative=["model", 1],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="sampled"),
    }
    if preview:
        workflow["preview"] = node("LatentCodecPreview", model=["model", 0], vae=["codec", 0], **preview)
    return workflow


@pytest.fixture(scope="module")
def sampled(server) -> torch.Tensor:
    """Without a preview."""
    return latents_of(server, server.run(sampling(4)))


def latents_of(server: ComfyUI, outputs: dict) -> torch.Tensor:
    (file,) = outputs["save"]["latents"]
    return load_file(server.path(file))["latent_tensor"]


@pytest.mark.parametrize("kind, every, number", [("linear", 1, 4), ("full", 3, 2), ("auto", 1, 4)])
def test_previews_arrive_and_change_nothing(server, sampled, kind, every, number):
    listener = Listener(server)
    prompt = server.queue(sampling(4, kind=kind, every=every), listener.client)
    previews = [each for each in listener.until_end(prompt) if isinstance(each, Image.Image)]
    listener.close()

    found = latents_of(server, server.result(prompt)["outputs"])
    assert torch.equal(found, sampled)
    assert len(previews) == number  # ComfyUI's own, of Stable Diffusion's colors, are not sent as well

    codec = LatentCodec.from_pretrained("default")
    previewer = LatentPreviewer.from_codec(codec, kind=None if kind == "auto" else kind)
    (last,) = previewer(codec.latent_space.normalize(sampled[:1]))
    expected = to_pil(last).resize(
        previews[-1].size, Image.Resampling.BILINEAR
    )  # as ComfyUI enlarges previews
    difference = np.array(previews[-1], int) - np.array(expected, int)
    assert np.abs(difference).mean() < 6  # of JPEG


def test_a_linear_preview_is_comfyuis_own_with_the_codecs_factors(server):
    workflow = {
        "codec": node("LatentCodecLoad", codec="default"),
        "compare": node("LinearPreviews", vae=["codec", 0]),
        "report": node("PreviewAny", source=["compare", 0]),
    }
    (difference,) = server.run(workflow)["report"]["text"]
    assert int(difference) <= 1  # both round down to 8 bits


def test_a_preview_is_fitted_and_used(server, image, sampled):
    workflow = sampling(4, kind="auto", every=4, preview=["fit", 0])
    workflow["image"] = node("LoadImage", image="image.png")
    workflow["fit"] = node("LatentCodecFitPreview", vae=["codec", 0], images=["image", 0])
    workflow["report"] = node("PreviewAny", source=["fit", 1])
    listener = Listener(server)
    prompt = server.queue(workflow, listener.client)
    assert any(isinstance(each, Image.Image) for each in listener.until_end(prompt))
    listener.close()
    outputs = server.result(prompt)["outputs"]
    assert torch.equal(latents_of(server, outputs), sampled)
    assert outputs["report"]["text"][0].startswith("default-f8c4: linear preview fitted to 1 images in")


def test_codecs_are_compared_in_a_grid(server, image):
    workflow = {
        "image": node("LoadImage", image="image.png"),
        "batch": node("RepeatImageBatch", image=["image", 0], amount=2),
        "first": node("LatentCodecLoad", codec="default"),
        "second": node("LatentCodecLoad", codec="latent_codecs/hierarchical"),
        "compare": node(
            "LatentCodecCompare",
            images=["batch", 0],
            vae_1=["first", 0],
            vae_2=["second", 0],
            differences=True,
        ),
        "save": node("SaveImage", images=["compare", 0], filename_prefix="grid"),
        "report": node("PreviewAny", source=["compare", 1]),
    }
    outputs = server.run(workflow)
    (grid,) = saved(server, outputs)
    assert grid.shape[0] > 4 * 64 and grid.shape[1] >= 3 * 96
    first, second = outputs["report"]["text"][0].splitlines()
    assert re.fullmatch(r"default-f8c4: PSNR \d\d\.\d\d dB, 4 channels at 1/8", first) and second.startswith(
        "hierarchical: PSNR "
    )


def test_a_prior_draws_what_the_command_line_draws(server, tmp_path):
    workflow = {
        "prior": node(
            "LatentCodecPriorSampler",
            pipeline="fashion-mnist",
            label="bag, 7",
            num_images=2,
            seed=5,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            keep=1.0,
        ),
        "save": node("SaveImage", images=["prior", 0], filename_prefix="prior"),
        "labels": node("PreviewAny", source=["prior", 1]),
    }
    listener = Listener(server)
    prompt = server.queue(workflow, listener.client)
    assert any(isinstance(each, Image.Image) for each in listener.until_end(prompt))
    listener.close()
    outputs = server.result(prompt)["outputs"]
    assert outputs["labels"]["text"] == ["bag\nbag\nsneaker\nsneaker"]

    out = tmp_path / "grid.png"
    assert main(["sample", "--label", "bag", "sneaker", "--num", "2", "--seed", "5", "--out", str(out)]) == 0
    grid = np.array(Image.open(out).convert("RGB"))
    for place, found in enumerate(saved(server, outputs)):
        row, column = divmod(place, 2)
        enlarged = found.repeat(4, 0).repeat(4, 1)
        expected = grid[row * 116 : row * 116 + 112, column * 116 : column * 116 + 112]
        assert np.abs(enlarged.astype(int) - expected.astype(int)).max() <= 1


def test_errors_are_one_line(server, image):
    compress = {
        "image": node("LoadImage", image="image.png"),
        "codec": node("LatentCodecLoad", codec="default-vq"),
        "compress": node(
            "LatentCodecSaveCompressed",
            images=["image", 0],
            vae=["codec", 0],
            filename_prefix="x",
            quality=3,
            max_bytes=0,
        ),
    }
    assert server.error(compress) == (
        "quality: expected none for default-vq-f8, whose indices are stored without loss, got 3"
    )
    for codec, path, said in (
        ("default", "/nowhere", "/nowhere does not exist"),
        (
            "latent_codecs/hierarchical",
            "",
            "tiles of hierarchical are not supported (no tiles were written for it)",
        ),
    ):
        message = server.error(
            round_trip(codec, path=path, tiles={"tile_size": 64, "overlap": 16, **TEMPORAL})
        )
        assert said in message and "\n" not in message
    workflow = sampling(1, kind="linear", every=1)
    workflow["codec"]["inputs"]["codec"] = "latent_codecs/qwen"
    assert "expected a codec of 4 latent channels, as the model has, got qwen with 16" in server.error(
        workflow
    )


def test_work_ends_where_it_is_interrupted(server):
    workflow = {
        "codec": node("LatentCodecLoad", codec="default"),
        "empty": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "decode": node(
            "VAEDecodeTiled", samples=["empty", 0], vae=["codec", 0], tile_size=64, overlap=0, **TEMPORAL
        ),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="never"),
    }
    listener = Listener(server)
    prompt = server.queue(workflow, listener.client)
    while True:
        match listener.message():
            case ("progress", {"node": "decode"}):
                break
    server.post("/interrupt", {})
    kind, _ = listener.until_end(prompt)[-1]
    listener.close()
    assert kind == "execution_interrupted"
