"""Every row of conversion/hosts.py, and the audit's verdicts, against the hosts' own code.

COMFYUI_PATH (0.3.64), COMFYUI_LATER_PATH (0.33.0), LDM_PATH (CompVis/latent-diffusion, the network behind A1111), A1111_PATH and INVOKEAI_PATH name checkouts, and
COMFYUI_PYTHON and so on interpreters that have what they need (default: this one).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from latent_codec import AutoencoderTinyGN, LatentCodec
from latent_codec.components.weight_files import WEIGHTS
from latent_codec.conversion.hosts import A1111, COMFYUI, COMFYUI_LATER, HOSTS, INVOKEAI, ROWS, row_for
from latent_codec.converting import convert
from latent_codec.evaluation.host_audit import audit_hosts
from latent_codec.torch_settings import on_meta

DRIVER = Path(__file__).parent / "helpers" / "host_driver.py"
SIDE = 64
NEITHER = {"use_quant_conv": False, "use_post_quant_conv": False}
SD3_SPACE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, **NEITHER}
FLUX_SPACE = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **NEITHER}


def kl(widths=(128, 256, 512, 512), layers=2, **config):
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    return diffusers.AutoencoderKL(
        **types | {"block_out_channels": widths, "layers_per_block": layers, **config}
    )


def flux2():
    widths = (32, 64)
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKLFlux2(block_out_channels=widths, layers_per_block=1, **types)


NARROW = {"widths": (32, 64, 128, 128), "layers": 1, "norm_num_groups": 8}
WAN_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
BUILDERS = {
    "SD": lambda: kl(),
    "SDXL": lambda: kl(scaling_factor=0.13025, sample_size=1024),
    "SD3": lambda: kl(**SD3_SPACE),
    "FLUX": lambda: kl(**FLUX_SPACE),
    "8 channels": lambda: kl(latent_channels=8),
    "32 channels": lambda: kl(latent_channels=32),
    "64 channels": lambda: kl(latent_channels=64),
    "narrow": lambda: kl(**NARROW),
    "narrow, 32 groups": lambda: kl(widths=(64, 128, 256, 256), layers=1),
    "narrow, FLUX's layout": lambda: kl(widths=(36, 72, 144, 144), layers=1, norm_num_groups=9, **FLUX_SPACE),
    "16 groups": lambda: kl(norm_num_groups=16),
    "no middle attention": lambda: kl(mid_block_add_attention=False),
    "no quant convs": lambda: kl(**NEITHER),
    "one quant conv": lambda: kl(use_quant_conv=False),
    "three levels": lambda: kl(widths=(128, 256, 512), scaling_factor=0.08333),
    "gray": lambda: kl(in_channels=1, out_channels=1),
    "VQ": lambda: diffusers.VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=16),
    "TAESD": lambda: diffusers.AutoencoderTiny(),
    "TAESD, 16 channels": lambda: diffusers.AutoencoderTiny(latent_channels=16),
    "TAESD, narrow": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4
    ),
    "Paella": lambda: PaellaVQModel(),
    "FLUX.2": flux2,
    "FLUX.2 of FLUX.2": lambda: diffusers.AutoencoderKLFlux2(),
    "TAEF2": lambda: AutoencoderTinyGN(latent_channels=32, use_midblock_gn=True),
    "Wan, small": lambda: diffusers.AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    ),
    "Qwen-Image, small": lambda: diffusers.AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    ),
    "Wan": lambda: diffusers.AutoencoderKLWan(),
    "Wan 2.2": lambda: diffusers.AutoencoderKLWan(**WAN_2_2),
    "Qwen-Image": lambda: diffusers.AutoencoderKLQwenImage(),
    "HunyuanImage": lambda: diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(128, 256, 512, 512, 1024, 1024),
        layers_per_block=2,
        spatial_compression_ratio=32,
        sample_size=384,
        downsample_match_channel=True,
        upsample_match_channel=True,
    ),
}
CASES = {
    "comfyui": (
        *(
            "SD",
            "SD3",
            "FLUX",
            "8 channels",
            "32 channels",
            "64 channels",
            "narrow",
            "narrow, 32 groups",
            "16 groups",
        ),
        *(
            "narrow, FLUX's layout",
            "no middle attention",
            "no quant convs",
            "one quant conv",
            "three levels",
            "gray",
        ),
        *("VQ", "TAESD", "TAESD, 16 channels", "TAESD, narrow", "Paella"),
        *("Wan", "Wan 2.2", "Qwen-Image", "HunyuanImage"),
    ),
    "comfyui_later": ("32 channels", "FLUX.2 of FLUX.2", "TAEF2"),
    "ldm": (
        "SD",
        "SD3",
        "8 channels",
        "narrow",
        "narrow, 32 groups",
        "16 groups",
        "no middle attention",
        "no quant convs",
    ),
    "a1111": ("TAESD", "TAESD, 16 channels"),
    "invokeai": (
        *(
            "SD",
            "SDXL",
            "SD3",
            "FLUX",
            "narrow, FLUX's layout",
            "narrow",
            "8 channels",
            "no middle attention",
            "VQ",
        ),
        *("TAESD", "TAESD, 16 channels", "FLUX.2", "Wan, small", "Qwen-Image, small"),
    ),
}
FAMILIES = {4: "sd1", 16: "sd3"}
VERSIONS = {
    "comfyui": COMFYUI,
    "comfyui_later": COMFYUI_LATER,
    "ldm": A1111,
    "a1111": A1111,
    "invokeai": INVOKEAI,
}


def audited_as(host):
    return {"ldm": "a1111", "comfyui_later": "comfyui"}.get(host, host)


@pytest.fixture(scope="module", params=CASES)
def host(request, tmp_path_factory):
    """A host's answers, by case: to the codec's own folder, and to what `convert` wrote for it."""
    name = request.param
    checkout = os.environ.get(f"{name.upper()}_PATH")
    if not checkout:
        pytest.skip(f"{name.upper()}_PATH does not name a checkout of {name}")
    folder = tmp_path_factory.mktemp(name)
    torch.save(images(), folder / "images.pt")
    command = [os.environ.get(f"{name.upper()}_PYTHON", sys.executable), str(DRIVER), name, checkout]
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder
        ) as driver,
    ):
        found = {}
        for case in CASES[name]:
            with tempfile.TemporaryDirectory(dir=folder) as place:  # they are large
                found[case] = answers_to(driver, name, case, Path(place), folder / "images.pt")
        driver.stdin.close()
    return name, found


def answers_to(driver, name, case, place, image_file):
    """What the driver of a host says to one case."""

    def ask(files, **job):
        out = place / "outputs.pt"
        out.unlink(missing_ok=True)
        job |= {"files": [str(file) for file in files], "images": str(image_file), "out": str(out)}
        driver.stdin.write(json.dumps(job) + "\n")
        driver.stdin.flush()
        for line in driver.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                return answer | {"outputs": torch.load(out) if out.is_file() else None}
        raise AssertionError((image_file.parent / "stderr").read_text()[-2000:])

    torch.manual_seed(0)
    codec = LatentCodec(BUILDERS[case](), name=case)
    codec.save_pretrained(place / "codec")
    config, channels = codec.autoencoder.config, codec.latent_space.raw_channels
    row = row_for(audited_as(name), type(codec.autoencoder).__name__, config, channels)
    audit = next(each for each in audit_hosts(codec) if each.host.lower() == audited_as(name))
    found = {"row": row, "audit": audit, "codec": outputs(codec, row)}
    is_file = name != "invokeai" or case == "Qwen-Image, small"
    if name != "a1111":
        found["folder"] = ask([place / "codec" / WEIGHTS if is_file else place / "codec"])
    tiny = row is not None and row.format == "taesd"
    try:
        family = FAMILIES.get(channels) if tiny else None
        written = convert(place / "codec", place / "out", host=audited_as(name), family=family).written
    except ValueError as error:
        return found | {"refused": str(error)}
    if written == [place / "out"] and is_file:
        written = [place / "out" / WEIGHTS]
    found["export"] = ask(written, without_quant_convs=channels == 16)
    return found


def images():
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def outputs(codec, row):
    """Raw latents, as hosts have them, and the image."""
    if codec.channels != 3 or row is None:
        return None
    codec.autoencoder.requires_grad_(False)
    with torch.no_grad():
        latents = codec.encode(images())
        decoded = codec.decode(latents, output_type="pt", size=(SIDE, SIDE))
    return {"latents": latents, "images": decoded, "space": codec.latent_space}


def differences(answer, expected, host, tiny):
    """The largest ones of raw latents, in units of the largest of these, and of images in [-1, 1]."""
    latents, decoded = (answer["outputs"][key].detach() for key in ("latents", "images"))
    wanted = expected["latents"]
    if (
        wanted.shape[1] == 32 and host == "comfyui_later" and latents.shape[1] == 128
    ):  # TAEF2's, which it packs
        wanted = torch.pixel_unshuffle(wanted, 2)
    elif host == "comfyui" and tiny:  # which scales back what is scaled
        scaling_factor, shift_factor = (0.18215, 0.0) if wanted.shape[1] == 4 else (1.5305, 0.0609)
        wanted = wanted / scaling_factor + shift_factor
    elif not tiny and latents.shape[1] != 128:  # FLUX.2's are normalized
        wanted = expected["space"].denormalize(wanted)
    if latents.shape != wanted.shape:
        return float("inf"), float("inf")
    images = (decoded.clamp(-1, 1) - expected["images"].clamp(-1, 1)).abs().max()
    return float((latents - wanted).abs().max() / wanted.abs().max().clamp_min(1)), float(images)


def is_right(answer, expected, host, tiny):
    """Whether a host loaded all of it, and computes the same, up to float32."""
    if answer["error"] or answer["missing"]:
        return False
    if answer["outputs"] is None or expected is None:
        return True
    answer["differences"] = differences(answer, expected, host, tiny)
    return max(answer["differences"]) <= 1e-4


def test_the_audit_says_what_the_host_does_with_a_codecs_own_folder(host):
    name, cases = host
    wrong = []
    for case, found in cases.items():
        if "folder" not in found:
            continue
        answer, audit = found["folder"], found["audit"]
        if name == "invokeai":
            loads = (
                bool(found["row"] and set(answer["filed_as"]) & set(found["row"].filed_as))
                and found["row"].takes_folder
            )
        else:
            loads = is_right(answer, found["codec"], name, False)
        if name == "comfyui_later":  # the audit speaks of the other one
            assert loads == found["row"].takes_folder, case
            loads = False
        print(case, audit.verdict, loads, {key: each for key, each in answer.items() if key != "outputs"})
        if loads != (audit.verdict != "no"):
            wrong.append((case, audit.verdict, audit.reasons))
    assert not wrong, wrong


def test_what_is_written_for_a_host_loads_there(host):
    name, cases = host
    wrong, loaded = [], []
    for case, found in cases.items():
        row = found["row"]
        if "export" not in found or row.version is not VERSIONS[name]:
            continue
        answer = found["export"]
        tiny = row.format == "taesd"
        right = is_right(answer, found["codec"], name, tiny)
        if name == "invokeai":
            right = right and bool(set(answer["filed_as"]) & set(row.filed_as))
        print(case, right, {key: value for key, value in answer.items() if key != "outputs"})
        loaded.append(case)
        if not right:
            wrong.append(case)
    assert not wrong, wrong
    assert loaded


def test_what_is_refused_does_not_load(host):
    name, cases = host
    for case, found in cases.items():
        if "refused" in found and name != "invokeai":
            assert found["audit"].verdict == "no", case
            assert "--host" not in (found["audit"].remedy or ""), case


def test_the_audit_names_the_version_that_it_speaks_of(host):
    name, cases = host
    version = VERSIONS[name]
    for found in cases.values():
        if version is COMFYUI_LATER:
            assert f"{version} has" in found["audit"].reasons[0]
        else:
            assert (found["audit"].version, found["audit"].date) == (version.version, version.date)


def test_every_row_of_a_version_that_was_run_is_covered():
    """By a case above, whether or not a checkout is there to run it with."""
    covered = []
    for name, cases in CASES.items():
        for case in cases:
            with on_meta():
                autoencoder = BUILDERS[case]()
            config = autoencoder.config
            channels = config.get("latent_channels") or config["z_dim"]
            covered.append(row_for(audited_as(name), type(autoencoder).__name__, config, channels))
    assert not [row for row in ROWS if row not in covered]
    assert set(HOSTS) == {"comfyui", "a1111", "invokeai", "diffusers"}
