"""Loads files with a host's own code: `python host_driver.py HOST CHECKOUT`, in an interpreter that has its needs.

A job is a line of JSON on standard input, {"files": [...], "images": a .pt file in [-1, 1], "out": where latents and images go} and gets one line of JSON:
{"error": why it did not load, or null, "missing": keys, "unexpected": keys, "filed_as": InvokeAI's bases}. Stubs stand
for libraries of the host that are not installed and that loading does not need; nothing here is latent-codec.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import re
import sys
import types
from pathlib import Path


class Anything(type):
    """A class of which every attribute is another such class."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(
            name, (), {"__init__": lambda self, *args, **kwargs: None, "__class_getitem__": lambda key: cls}
        )


class Stub(types.ModuleType):
    """A library that is not installed; whatever is asked of it is there, and does nothing."""

    __path__ = ()
    __getattr__ = Anything.__getattr__


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these libraries where nothing else does."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def stub(*names):
    sys.meta_path.append(Stubs(names))


def comfyui(checkout):
    sys.argv = ["main.py", "--cpu"]
    stub("torchaudio")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy.utils
    import torch

    warned = []

    class Keys(logging.Handler):
        def emit(self, record):
            warned.append(record.getMessage())

    logging.getLogger().handlers = [Keys()]
    logging.getLogger().setLevel(logging.DEBUG)
    scales = {
        "taesd": (0.18215, 0.0),
        "taesdxl": (0.13025, 0.0),
        "taesd3": (1.5305, 0.0609),
        "taef1": (0.3611, 0.1159),
    }

    def load(job):
        warned.clear()
        state, metadata = {}, None
        if len(job["files"]) == 2:  # nodes.py: VAELoader.load_taesd
            for file in map(Path, job["files"]):
                name, _, side = file.stem.rpartition("_")
                state |= {
                    f"taesd_{side}.{key}": each
                    for key, each in comfy.utils.load_torch_file(str(file)).items()
                }
            if name == "taef2":
                metadata = {"tae_latent_channels": 128}
            state["vae_scale"], state["vae_shift"] = map(torch.tensor, scales.get(name, (1.0, 0.0)))
        else:
            state = comfy.utils.load_torch_file(job["files"][0])
        vae = comfy.sd.VAE(sd=state, dtype=torch.float32, metadata=metadata)
        vae.throw_exception_if_invalid()
        found = {"missing": _keys("Missing", warned), "unexpected": _keys("Leftover", warned)}
        images = torch.load(job["images"])
        latents = vae.encode(images.movedim(1, -1) / 2 + 0.5)
        decoded = vae.decode(latents).movedim(-1, 1) * 2 - 1
        if latents.ndim == 5:  # of a video of one frame
            latents, decoded = latents[:, :, 0], decoded[:, :, 0]
        return found, {"latents": latents, "images": decoded}

    return load


def _keys(word, lines):
    found = [line for line in lines if line.startswith(f"{word} VAE keys")]
    return sum(len(re.findall(r"'[^']+'", line)) for line in found)


def ldm(checkout):
    import torch

    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = torch.nn.Module
    sys.modules["pytorch_lightning"] = lightning
    stub("taming")
    from ldm.models.autoencoder import AutoencoderKL
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from safetensors.torch import load_file

    def load(job):
        state = load_file(job["files"][0])
        channels = state["decoder.conv_in.weight"].shape[1]
        # as in configs/stable-diffusion/v1-inference.yaml of stable-diffusion
        network = {
            "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        }  # fmt: skip
        model = AutoencoderKL(network, {"target": "torch.nn.Identity"}, channels).eval()
        images = torch.load(job["images"])
        if job.get("without_quant_convs"):  # the encoder and the decoder of SD3's autoencoder
            model.quant_conv = model.post_quant_conv = torch.nn.Identity()
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            moments = model.quant_conv(model.encoder(images))
            latents = DiagonalGaussianDistribution(moments).mode()
            decoded = model.decoder(model.post_quant_conv(latents))
        return {"missing": 0, "unexpected": 0}, {"latents": latents, "images": decoded}

    return load


def a1111(checkout):
    import torch

    modules = types.ModuleType("modules")
    modules.__path__ = [str(Path(checkout) / "modules")]
    modules.devices = types.SimpleNamespace(device=torch.device("cpu"))
    modules.paths_internal = modules.shared = None
    sys.modules["modules"] = modules
    from modules import sd_vae_taesd

    def load(job):
        encoder = sd_vae_taesd.TAESDEncoder(job["files"][0]).encoder
        decoder = sd_vae_taesd.TAESDDecoder(job["files"][1]).decoder
        with torch.no_grad():  # modules/sd_samplers_common.py: images in [0, 1]
            latents = encoder(torch.load(job["images"]) / 2 + 0.5)
            decoded = decoder(latents) * 2 - 1
        return {"missing": 0, "unexpected": 0}, {"latents": latents, "images": decoded}

    return load


def invokeai(checkout):
    missing = "gguf picklescan onnxruntime blake3 semver peft compel dynamicprompts cv2 huggingface_hub.utils safetensors.numpy"
    stub(*(name for name in missing.split() if "." not in name and importlib.util.find_spec(name) is None))
    import torch
    from invokeai.backend.flux.modules.autoencoder import AutoEncoder, AutoEncoderParams
    from invokeai.backend.model_manager.configs import vae
    from invokeai.backend.model_manager.model_on_disk import ModelOnDisk
    from safetensors.torch import load_file

    kinds = [each for name, each in vars(vae).items() if name.startswith("VAE_") and name.endswith("_Config")]

    def load(job):
        path = Path(job["files"][0])
        bases = []
        for kind in kinds:
            fields = {
                "key": "key", "hash": "hash", "path": str(path), "file_size": 1, "name": path.name,
                "source": str(path), "source_type": "path",
            }  # fmt: skip
            try:
                bases.append(kind.from_model_on_disk(ModelOnDisk(path), fields).base.value)
            except vae.NotAMatchError:
                continue
        outputs = None
        if bases == ["flux"]:  # load/model_loaders/flux.py: FluxVAELoader
            parameters = AutoEncoderParams(
                resolution=256, in_channels=3, ch=128, out_ch=3, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=16,
                scale_factor=0.3611, shift_factor=0.1159,
            )  # fmt: skip
            model = AutoEncoder(parameters).eval()
            model.load_state_dict(load_file(path), assign=True)
            with torch.no_grad():
                latents = model.encode(torch.load(job["images"]), sample=False)
                outputs = {"latents": latents / 0.3611 + 0.1159, "images": model.decode(latents)}
        return {"missing": 0, "unexpected": 0, "filed_as": bases}, outputs

    return load


HOSTS = {"comfyui": comfyui, "comfyui_later": comfyui, "ldm": ldm, "a1111": a1111, "invokeai": invokeai}


def main(host, checkout):
    sys.path.insert(0, checkout)
    load = HOSTS[host](checkout)
    import torch

    for line in sys.stdin:
        job = json.loads(line)
        answer = {"error": None, "missing": 0, "unexpected": 0, "filed_as": []}
        try:
            found, outputs = load(job)
            answer |= found
            if outputs is not None:
                torch.save(outputs, job["out"])
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"[:300]
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
