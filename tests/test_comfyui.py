"""The node pack without a ComfyUI: what its nodes declare, the example workflows, the network in its VAE, install and uninstall."""

import inspect
import json
import re
import sys

import pytest
import torch
from helpers import ROOT
from helpers.autoencoders import CONFIGS, build
from helpers.processes import run_fresh

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.comfyui.comparison import compare_vaes
from latent_codec.comfyui.images import PixelSource, to_images, to_pixels
from latent_codec.comfyui.installing import CONTENT, NAME
from latent_codec.comfyui.network import CodecNetwork, latents_of, samples_of
from latent_codec.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from latent_codec.comfyui.preview_nodes import PreviewWithCodec
from latent_codec.families import LatentSpace
from latent_codec.previews import LatentPreviewer

EXAMPLES = sorted((ROOT / "examples/comfyui").glob("*.json"))
HOSTS = {
    "LoadImage": (["image"], 2),
    "SaveImage": (["images", "filename_prefix"], 0),
    "PreviewImage": (["images"], 0),
    "PreviewAny": (["source"], 0),
    "VAEEncode": (["pixels", "vae"], 1),
    "VAEDecode": (["samples", "vae"], 1),
    "VAEEncodeTiled": (["pixels", "vae", "tile_size", "overlap", "temporal_size", "temporal_overlap"], 1),
    "VAEDecodeTiled": (["samples", "vae", "tile_size", "overlap", "temporal_size", "temporal_overlap"], 1),
    "JoinImageWithAlpha": (["image", "alpha"], 1),
    "CheckpointLoaderSimple": (["ckpt_name"], 3),
    "CLIPTextEncode": (["text", "clip"], 1),
    "EmptyLatentImage": (["width", "height", "batch_size"], 1),
    "KSampler": (
        [
            "model",
            "seed",
            "steps",
            "cfg",
            "sampler_name",
            "scheduler",
            "positive",
            "negative",
            "latent_image",
            "denoise",
        ],
        1,
    ),
}
"""ComfyUI's own nodes in the examples: inputs and number of outputs, as 0.3.64 has them."""


def codec_of(kind: str) -> LatentCodec:
    return LatentCodec(build(kind), name=kind)


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_declares_what_its_function_takes(name):
    node = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    declared = {
        key: spec for group in ("required", "optional") for key, spec in inputs.get(group, {}).items()
    }
    function = inspect.signature(getattr(node, node.FUNCTION)).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in function.values())
    assert takes_any or declared.keys() == function.keys() - {"self"}
    for key, (kind, options) in declared.items():
        assert 15 < len(options["tooltip"]) < 250 and options["tooltip"].endswith("."), key
        assert kind or key == "file"  # of which there are none outside of ComfyUI
        assert isinstance(kind, list) or re.fullmatch("[A-Z_]+", kind)
        if "default" in options and key in function:
            assert function[key].default in (options["default"], inspect.Parameter.empty)
    assert len(node.RETURN_TYPES) == len(node.OUTPUT_TOOLTIPS)
    assert len(node.DESCRIPTION) > 60 and node.CATEGORY == "latent codec"
    assert NODE_DISPLAY_NAME_MAPPINGS[name] == node.TITLE


def test_comfyui_starts_without_waiting_for_torch():
    run_fresh(
        "import sys\nimport latent_codec.comfyui.nodes as nodes\n"
        "[each.INPUT_TYPES() for each in nodes.NODE_CLASS_MAPPINGS.values()]\n"
        "assert not {'torch', 'diffusers'} & sys.modules.keys()",
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_workflow_fits_the_nodes(path):
    workflow = json.loads(path.read_text())
    for node in workflow.values():
        kind = node["class_type"]
        ours = NODE_CLASS_MAPPINGS.get(kind)
        if ours is None:
            assert node["inputs"].keys() == set(HOSTS[kind][0])
        else:
            types = ours.INPUT_TYPES()
            known = types["required"] | types.get("optional", {})
            assert types["required"].keys() <= node["inputs"].keys() <= known.keys()
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source, output = value
                made_by = workflow[source]["class_type"]
                if made_by in NODE_CLASS_MAPPINGS and ours is not None:
                    assert NODE_CLASS_MAPPINGS[made_by].RETURN_TYPES[output] in (known[key][0], "*")
                elif made_by in HOSTS:
                    assert output < HOSTS[made_by][1]
            elif ours is not None and isinstance(known[key][0], list) and key != "file":
                assert value in known[key][0]
        assert node["_meta"]["title"]


def test_every_node_is_in_an_example():
    used = {node["class_type"] for path in EXAMPLES for node in json.loads(path.read_text()).values()}
    assert used >= NODE_CLASS_MAPPINGS.keys()


def test_nodes_pass_raw_latents_with_frames_where_models_have_them():
    latents = torch.randn(2, 4, 3, 5)
    plain = LatentSpace(4, 8, scaling_factor=0.18215, shift_factor=0.5)
    torch.testing.assert_close(samples_of(latents, plain), latents / 0.18215 + 0.5)
    video = LatentSpace(4, 8, mean=(0.5,) * 4, std=(2.0,) * 4, frame_axis=True)
    torch.testing.assert_close(samples_of(latents, video), (latents * 2 + 0.5).unsqueeze(2))
    packed = LatentSpace(4, 16, mean=(0.5,) * 4, std=(2.0,) * 4, packed="channel, row, column")
    assert samples_of(latents, packed) is latents
    for space in (plain, video, packed):
        torch.testing.assert_close(latents_of(samples_of(latents, space), space), latents)
    with pytest.raises(ValueError, match="expected latents of one frame, got 3 frames"):
        latents_of(torch.zeros(1, 4, 3, 2, 2), video)


@pytest.mark.parametrize(
    "kind", ["AutoencoderKL", "HierarchicalVQ", "AutoencoderKLQwenImage, layered", "AutoencoderDC"]
)
def test_the_network_of_the_vae_decodes_what_the_codec_decodes(kind):
    codec = codec_of(kind)
    begun = []
    network = CodecNetwork(codec, on_progress=lambda done, total: begun.append((done, total)))
    images = torch.rand(2, codec.channels, 32, 32) * 2 - 1
    samples = network.encode(images)
    encoding, begun[:] = list(begun), []
    found = network.decode(samples)
    torch.testing.assert_close(found, codec.decode(codec.encode(images), output_type="pt"), atol=1e-4, rtol=0)
    for counts in (encoding, begun):
        assert [done for done, _ in counts] == list(range(1, len(counts) + 1)) and counts[-1][0] <= counts[0][
            1
        ]
    assert network.values_to_decode(*samples.shape[-2:]) > found[0].numel()
    assert network.values_to_encode(32, 32) > images[0].numel()


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_is_estimated_for_every_class(kind):
    network = CodecNetwork(codec_of(kind))
    small = network.values_to_encode(64, 64), network.values_to_decode(8, 8)
    assert small[0] > 64 * 64 and small[1] > 8 * 8 * network.codec.latent_space.downsampling_factor**2
    assert (network.values_to_encode(64, 128), network.values_to_decode(16, 8)) == (
        2 * small[0],
        2 * small[1],
    )


def test_gray_codecs_give_color_and_work_stops_where_it_is_told_to():
    codec = LatentCodec.from_pretrained("garments")
    assert codec.channels == 1
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    network = CodecNetwork(codec)
    found = network.decode(network.encode(images))
    assert found.shape == images.shape and torch.equal(found[:, 0], found[:, 2])

    def stop():
        raise InterruptedError

    network.check = stop
    with pytest.raises(InterruptedError):
        network.encode(images)
    assert not any(each._forward_pre_hooks for each in codec.autoencoder.modules())


def test_images_of_nodes_are_those_of_the_project():
    pixels = torch.rand(2, 8, 9, 3)
    torch.testing.assert_close(to_pixels(to_images(pixels)), pixels)
    assert to_pixels(torch.full((1, 1, 4, 4), -1.0)).shape == (1, 4, 4, 3)
    source = PixelSource(pixels)
    assert len(source) == 2
    torch.testing.assert_close(source.image(1), to_images(pixels)[1], atol=1 / 255, rtol=0)


class HalfSize:
    """A VAE as ComfyUI has them, whose images lack two columns and rows."""

    first_stage_model = torch.nn.Identity()
    latent_channels = 3

    def encode(self, pixels):
        return pixels[:, 1:-1, 1:-1].movedim(-1, 1)

    def decode(self, samples):
        return samples.movedim(1, -1)

    def spacial_compression_decode(self):
        return 1


def test_any_vae_can_be_compared():
    grid, report = compare_vaes(torch.rand(2, 32, 40, 3), [HalfSize()], differences=True)
    assert grid.shape[0] == 1 and grid.shape[1] > 4 * 32 and grid.shape[2] > 2 * 40
    assert report == "VAE 1: PSNR inf dB, 3 channels at 1/1"


def test_the_preview_in_a_codecs_folder_is_found(tmp_path):
    codec = LatentCodec.from_pretrained("default")
    again, before = LatentPreviewer.from_codec(codec), LatentPreviewer.from_pretrained("default")
    latents = torch.randn(1, 4, 4, 4)
    assert again.kind == before.kind == "linear" and torch.equal(again(latents), before(latents))
    with pytest.raises(ValueError, match='kind: expected "full", its own decoder, as it has no folder'):
        LatentPreviewer.from_codec(codec_of("AutoencoderKL"))
    assert PreviewWithCodec.INPUT_TYPES()["required"]["kind"][0][1:] == ["linear", "tiny", "full"]


@pytest.fixture
def host(tmp_path):
    """The files that tell a ComfyUI."""
    folder = tmp_path / "ComfyUI"
    for name in ("custom_nodes", "comfy"):
        (folder / name).mkdir(parents=True)
    for name in ("nodes.py", "comfy/sd.py"):
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    return folder


def test_install_and_uninstall(host, capsys):
    file = host / "custom_nodes" / NAME
    for path in (host, host, host.parent):  # again, and as the portable version is laid out
        assert main(["comfyui", "install", str(path)]) == 0
        assert file.read_text() == CONTENT and len(CONTENT.splitlines()) == 2
    assert "the nodes of latent-codec for ComfyUI 0.3.64; restart it" in capsys.readouterr().out
    assert main(["comfyui", "uninstall", str(host), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(file), "version": "0.3.64"}
    assert not file.exists() and not list((host / "custom_nodes").iterdir())

    assert main(["comfyui", "uninstall", str(host)]) == 2
    assert "there is nothing to uninstall" in capsys.readouterr().err


def test_what_is_installed_imports(host):
    main(["comfyui", "install", str(host)])
    code = f"import runpy\nfound = runpy.run_path({str(host / 'custom_nodes' / NAME)!r})\nassert len(found['NODE_CLASS_MAPPINGS']) >= 8"
    run_fresh(code)


def test_another_environment_is_named(host, capsys):
    (host / "venv").mkdir()
    assert main(["comfyui", "install", str(host)]) == 0
    assert f"ComfyUI seems to run in {host / 'venv'}, and this is {sys.prefix}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_other_folders_and_changed_files_are_refused(verb, host, tmp_path, capsys):
    (tmp_path / "other/custom_nodes").mkdir(parents=True)
    for path, said in (
        (tmp_path / "other", "is no ComfyUI: expected its nodes.py"),
        (tmp_path / "x", "no such file or folder"),
    ):
        assert main(["comfyui", verb, str(path)]) == 2
        assert said in capsys.readouterr().err
    file = host / "custom_nodes" / NAME
    file.write_text(CONTENT + "print()\n")
    assert main(["comfyui", verb, str(host)]) == 2
    assert "was changed since it was installed" in capsys.readouterr().err and file.exists()
