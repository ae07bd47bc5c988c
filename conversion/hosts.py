"""What other programs load: one row for each class of autoencoder in each version that was run against.

A row says what the program builds, whatever a file holds, and what the file is called. `convert` makes what a row asks
for, `info --audit` says where a codec differs from it, and tests run every row of a version that can be had against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latent_codec.conversion import taesd
from latent_codec.conversion.embedding import QUANT_CONVS, SD, SD_X4, misfits
from latent_codec.conversion.renaming import as_tuple
from latent_codec.families.pipeline_spaces import FLUX1, SD1, SD3, SDXL

Pair = tuple[bool, bool]
"""Whether there is a quant_conv, and a post_quant_conv."""
BOTH, NEITHER = (True, True), (False, False)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A program, and the state of it that rows were taken from."""

    host: str
    version: str
    date: str
    """Of that state, in ISO 8601 as far as known."""
    source: str
    """Repository, commit and files."""

    def __str__(self) -> str:
        return f"{self.host} {self.version}"


COMFYUI = Version(
    host="ComfyUI",
    version="0.3.64",
    date="2025-10-11",
    source="comfyanonymous/ComfyUI a125cd8: comfy/sd.py, comfy/diffusers_convert.py, comfy/latent_formats.py, nodes.py",
)
COMFYUI_LATER = Version(
    host="ComfyUI",
    version="0.33.0",
    date="2026-08-22",
    source="Comfy-Org/ComfyUI 783545f: comfy/sd.py, comfy/taesd/taesd.py, nodes.py",
)
A1111 = Version(
    host="A1111",
    version="1.10.1",
    date="2025-02-09",
    source="AUTOMATIC1111/stable-diffusion-webui: modules/sd_vae.py, sd_vae_taesd.py, models/sd3/sd3_impls.py; its network is "
    "CompVis/latent-diffusion a506df5: ldm/models/autoencoder.py",
)
INVOKEAI = Version(
    host="InvokeAI",
    version="6.14.0",
    date="2026-08-19",
    source="invoke-ai/InvokeAI 8e71a8a: invokeai/backend/model_manager/configs/vae.py, load/model_loaders, "
    "app/invocations/*_latents.py",
)
DIFFUSERS = Version(
    host="diffusers",
    version="0.42.1",
    date="2026",
    source="huggingface/diffusers: pipelines, models/autoencoders, loaders/single_file_model.py",
)
HOSTS = {each.host.lower(): each for each in (COMFYUI, A1111, INVOKEAI, DIFFUSERS)}
"""Values of `host` in `convert`."""

FAMILY_SCALES = {
    "sd1": (SD1[0], None),
    "sdxl": (SDXL[0], None),
    "sd3": SD3,
    "flux": FLUX1,
    "sd-x4": (0.08333, None),
}
"""scaling_factor and shift_factor that programs apply to raw latents, by the family of the denoiser."""
TITLES = {
    "sd1": "SD 1 and 2",
    "sdxl": "SDXL",
    "sd3": "SD3",
    "flux": "FLUX",
    "flux2": "FLUX.2",
    "sd-x4": "the x4 upscaler",
}

_RGB = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
_TAESD = taesd.ORIGINAL | {
    "scaling_factor": taesd.SCALE.scaling_factor,
    "shift_factor": taesd.SCALE.shift_factor,
}
_WAN = {"base_dim": 96, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2, "in_channels": 3, "input_channels": 3}
_WAN_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "in_channels": 12,
    "is_residual": True,
}
_HUNYUAN_IMAGE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2,
    "downsample_match_channel": True,
    "upsample_match_channel": True,
}


def _levels(number: int) -> dict:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * number,
        "up_block_types": ("UpDecoderBlock2D",) * number,
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of file or folder that a program loads."""

    version: Version
    class_name: str
    """Of the component that it holds."""
    format: str
    """Value of `to` that writes it."""
    network: Mapping = field(default_factory=dict)
    """Entries of the component's config, with what the program always builds."""
    num_levels: int | None = None
    """Of the network, by which programs choose it; None: any."""
    channels: tuple[int, ...] | None = None
    """Of raw latents; None: all but `other_channels`."""
    other_channels: tuple[int, ...] = ()
    """Taken for another network's."""
    quant_convs: tuple[Pair, ...] = ()
    """What it takes, first choice first; empty: whatever there is."""
    asks_for: Mapping = field(default_factory=dict)
    """Entries of the config that it asks for in some of its settings, and without which others work."""
    takes_folder: bool = False
    """Whether it reads a codec's own folder, or the weight file in it."""
    families: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Of its denoisers, by the channels of their latents: it scales by their figures, whatever the file says. None here: it
    reads the config, or takes latents as they are."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What files are called, by the family of the denoiser; empty: as anyone likes."""
    filed_as: tuple[str, ...] = ()
    """Bases under which InvokeAI files it."""
    suffix: str = ".safetensors"
    place: str = ""
    """The program's folder for it."""

    @property
    def families_of_names(self) -> dict[int, tuple[str, ...]]:
        """Families that file names are for, by the channels of their latents."""
        channels = {"sd1": 4, "sdxl": 4, "sd3": 16, "flux": 16, "flux2": 32}
        return {
            number: tuple(name for name in self.names if channels[name] == number)
            for number in sorted({channels[name] for name in self.names})
        }

    def is_for(self, class_name: str, config: Mapping, channels: int) -> bool:
        """Whether the program takes an autoencoder of this class, depth and number of raw latents' channels for this."""
        return (
            class_name == self.class_name
            and self.num_levels in (None, len(config.get("block_out_channels", ())))
            and channels not in self.other_channels
            and (self.channels is None or channels in self.channels)
        )

    def changes(self, config: Mapping) -> dict:
        """Entries of an AutoencoderKL's config that have to become others, its weights with them."""
        found = {
            key: self.network[key]
            for key in SD
            if key in self.network and as_tuple(config[key]) != self.network[key]
        }
        if "block_out_channels" in found or "norm_num_groups" in found:
            found |= {key: self.network[key] for key in ("block_out_channels", "norm_num_groups")}
        found |= {key: value for key, value in self.asks_for.items() if config[key] != value}
        pair = tuple(config[key] for key in QUANT_CONVS) if self.quant_convs else ()
        if self.quant_convs and pair not in self.quant_convs:
            found |= dict(zip(QUANT_CONVS, self.quant_convs[0]))
        return found

    def differences(self, config: Mapping) -> dict[str, tuple[Any, Any]]:
        """Entries of a config that are not what the program builds: what they are, and what it builds."""
        pairs = {key: (as_tuple(config[key]), built) for key, built in self.network.items() if key in config}
        return {
            key: pair
            for key, pair in pairs.items()
            if pair[0] != pair[1] and pair != ("swish", "silu")  # one function by two names
        }

    def misfits(self, config: Mapping) -> list[str]:
        """Why an autoencoder of this config cannot be made what the program builds."""
        is_kl = self.class_name == "AutoencoderKL"
        changes = self.changes(config) if is_kl else {}
        wrong = [
            f"its {key} is {short(value)}, and {short(built)} there"
            for key, (value, built) in self.differences(config).items()
            if key not in SD or not is_kl
        ]
        return wrong + (misfits(config, changes) if changes else [])


_COMFYUI = {"version": COMFYUI, "place": "models/vae"}
_COMFYUI_LATER = {"version": COMFYUI_LATER, "place": "models/vae"}
_A1111 = {"version": A1111, "place": "models/VAE"}
_KL = {"class_name": "AutoencoderKL", "format": "ldm"}
_TINY = {"class_name": "AutoencoderTiny", "format": "taesd", "network": _TAESD, "channels": (4, 16)}
_SD = {"network": SD | _RGB | _levels(4), "num_levels": 4}
_HALVES = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3"}

ROWS = (
    Row(
        **_COMFYUI,
        **_KL,
        **_SD,
        other_channels=(32, 64),
        quant_convs=(BOTH, NEITHER),
        takes_folder=True,
        families={4: ("sd1", "sdxl"), 16: ("sd3", "flux")},
    ),
    Row(
        **_COMFYUI,
        **_KL,
        network=SD_X4 | _RGB | _levels(3),
        num_levels=3,
        other_channels=(32, 64),
        quant_convs=(BOTH, NEITHER),
        families={4: ("sd-x4",)},
    ),
    Row(version=COMFYUI, **_TINY, names=_HALVES | {"flux": "taef1"}, place="models/vae_approx"),
    Row(
        **_COMFYUI,
        class_name="AutoencoderKLHunyuanImage",
        format="hunyuan-image-comfy",
        network=_HUNYUAN_IMAGE,
        channels=(64,),
    ),
    Row(**_COMFYUI, class_name="AutoencoderKLWan", format="wan", network=_WAN, channels=(16,)),
    Row(**_COMFYUI, class_name="AutoencoderKLWan", format="wan", network=_WAN_2_2, channels=(48,)),
    Row(**_COMFYUI, class_name="AutoencoderKLQwenImage", format="wan", network=_WAN, channels=(16,)),
    Row(**_COMFYUI_LATER, **_KL, **_SD, channels=(32,), quant_convs=(BOTH, NEITHER), takes_folder=True),
    Row(
        version=COMFYUI_LATER,
        class_name="AutoencoderTinyGN",
        format="taesd",
        network=_TAESD | {"use_midblock_gn": True},
        channels=(32,),
        names={"flux2": "taef2"},
        place="models/vae_approx",
    ),
    Row(
        **_COMFYUI_LATER,
        class_name="AutoencoderKLFlux2",
        format="flux2-comfy",
        network={key: value for key, value in SD.items() if key != "mid_block_add_attention"},
        channels=(32,),
        takes_folder=True,
    ),
    Row(**_A1111, **_KL, **_SD, channels=(4,), quant_convs=(BOTH,), families={4: ("sd1", "sdxl")}),
    Row(**_A1111, **_KL, **_SD, channels=(16,), quant_convs=(NEITHER,), families={16: ("sd3",)}),
    Row(version=A1111, **_TINY, names=_HALVES, suffix=".pth", place="models/VAE-taesd"),
    Row(
        version=INVOKEAI,
        class_name="AutoencoderKL",
        format="diffusers",
        filed_as=("sd-1", "sdxl"),
        channels=(4,),
        asks_for={"mid_block_add_attention": True} | dict.fromkeys(QUANT_CONVS, True),
        takes_folder=True,
    ),
    Row(
        version=INVOKEAI,
        **_KL,
        **_SD,
        channels=(16,),
        quant_convs=(NEITHER,),
        families={16: ("flux",)},
        filed_as=("flux",),
    ),
    *(
        Row(
            version=INVOKEAI,
            class_name=class_name,
            format="diffusers",
            filed_as=bases,
            channels=channels,
            takes_folder=True,
        )
        for class_name, bases, channels in (
            ("AutoencoderTiny", ("sd-1", "sdxl"), (4,)),
            ("AutoencoderKLFlux2", ("flux2",), (32,)),
            ("AutoencoderKLWan", ("wan",), (16, 48)),
            ("AutoencoderKLQwenImage", ("qwen-image",), (16,)),
        )
    ),
)


def rows_of(host: str) -> tuple[Row, ...]:
    """A program's rows, those of the version that the audit speaks of first."""
    return tuple(row for row in ROWS if row.version.host.lower() == host.lower())


def row_for(host: str, class_name: str, config: Mapping, channels: int) -> Row | None:
    """The row by which a program takes an autoencoder; None where it has none for its class, depth and channels."""
    return next((row for row in rows_of(host) if row.is_for(class_name, config, channels)), None)


def short(value) -> str:
    """An entry of a config, in words."""
    if not isinstance(value, tuple):
        return str(value)
    return (
        f"{len(value)} x {value[0]}"
        if len(set(value)) == 1 and len(value) > 1
        else ", ".join(map(str, value))
    )
