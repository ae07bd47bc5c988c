"""What each pipeline of diffusers reads of its autoencoder: one autoencoder has as many latent spaces as pipelines disagree.

Read in diffusers 0.42.1, in the lines where a pipeline encodes an image, and where it has none in the lines that end it
(`vae.decode`). Pipelines of one row agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from latent_codec.families.latent_space import CHANNEL_FIRST, POSITION_FIRST, LatentSpace

SCALE = ("scaling_factor",)
SCALE_AND_SHIFT = ("scaling_factor", "shift_factor")
MEAN_AND_STD = ("latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True)
class PipelineSpace:
    """How the pipelines of one row make latents of raw latents.

    Args:
        title: the models that they run.
        pipelines: names of their classes.
        autoencoders: names of the classes of autoencoders that they are made for, the usual one first.
        reads: the entries of the autoencoder's config that they use; the others change nothing.
        multiplier: what else they multiply latents by: the scheduler's sigma_data, as published.
        packed: order of the channels of 2x2 positions, which they pack before mean and std are applied.
        unpacked_again: whether they undo that packing afterwards.
        batch_norm_eps: of the statistics of packed channels; None: the config's.
        tokens: side of the squares of positions that make one token of their denoiser.
        frame_axis: whether latents have an axis of frames.
        repeated: whether their denoiser is handed every channel twice.
        channels_last: whether the axis of channels is the last, after frames, rows and columns.
    """

    title: str
    pipelines: tuple[str, ...]
    autoencoders: tuple[str, ...] = ("AutoencoderKL",)
    reads: tuple[str, ...] = SCALE
    encodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    decodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    scale: float | None = None
    multiplier: float = 1.0
    packed: str | None = None
    unpacked_again: bool = False
    batch_norm_eps: float | None = None
    tokens: int | None = None
    frame_axis: bool = False
    repeated: bool = False
    channels_last: bool = False

    def latent_space(self, channels: int, downsampling_factor: int, config: Mapping[str, Any]) -> LatentSpace:
        """The space of an autoencoder as these pipelines see it.

        Args:
            channels: of latents.
            downsampling_factor: pixels per position of latents.
            config: its entries of scale, shift, mean and std.

        Raises:
            ValueError: if they need mean and std, and the config has none.
        """
        entries = {key: config.get(key) for key in self.reads}
        if self.reads == MEAN_AND_STD and None in entries.values():
            raise ValueError(f"{self.title}: expected latents_mean and latents_std in the config, got none")
        if None in (entries.get("latents_mean"), entries.get("latents_std")):  # SDXL uses both or neither
            entries.pop("latents_mean", None), entries.pop("latents_std", None)
        scale = entries.get("scaling_factor") if self.scale is None else self.scale
        entries["scaling_factor"] = (1.0 if scale is None else scale) * self.multiplier
        return LatentSpace.of_entries(
            channels,
            downsampling_factor,
            entries,
            packed=self.packed,
            unpacked_again=self.unpacked_again,
            tokens=self.tokens,
            frame_axis=self.frame_axis,
            repeated=self.repeated,
        )


def _names(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}Pipeline" for stem in stems)


_FLUX2, _QWEN, _WAN = ("AutoencoderKLFlux2",), ("AutoencoderKLQwenImage",), ("AutoencoderKLWan",)
_MOVQ = ("VQModel",)

_PAELLA = ("PaellaVQModel",)

ROWS = (
    PipelineSpace(
        title="Stable Diffusion 1 and 2",
        pipelines=_names(
            "StableDiffusion",
            "StableDiffusionImg2Img",
            "StableDiffusionInpaint",
            "StableDiffusionInstructPix2Pix",
            "StableDiffusionControlNet",
            "StableDiffusionDepth2Img",
        ),
        autoencoders=("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny"),
    ),
    PipelineSpace(
        title="Stable Diffusion x4 upscaler", pipelines=_names("StableDiffusionUpscale"), scale=0.08333
    ),
    PipelineSpace(
        title="Latent consistency models",
        pipelines=_names("LatentConsistencyModel", "LatentConsistencyModelImg2Img"),
    ),
    PipelineSpace(title="Latent diffusion, text to image", pipelines=_names("LDMTextToImage")),
    PipelineSpace(
        title="Marigold", pipelines=_names("MarigoldDepth", "MarigoldNormals", "MarigoldIntrinsics")
    ),
    PipelineSpace(title="DiT", pipelines=_names("DiT")),
    PipelineSpace(title="PixArt", pipelines=_names("PixArtAlpha", "PixArtSigma")),
    PipelineSpace(title="HunyuanDiT", pipelines=_names("HunyuanDiT")),
    PipelineSpace(title="Lumina 1", pipelines=_names("Lumina")),
    PipelineSpace(title="AuraFlow", pipelines=_names("AuraFlow")),
    PipelineSpace(title="OmniGen", pipelines=_names("OmniGen")),
    PipelineSpace(title="CogView3 Plus", pipelines=_names("CogView3Plus")),
    PipelineSpace(title="CogView4", pipelines=_names("CogView4", "CogView4Control")),
    PipelineSpace(
        title="Kandinsky 5 image", pipelines=_names("Kandinsky5T2I", "Kandinsky5I2I"), channels_last=True
    ),  # FLUX.1's autoencoder, whose shift it ignores
    PipelineSpace(
        title="Stable Diffusion XL",
        pipelines=_names("StableDiffusionXL", "StableDiffusionXLImg2Img", "StableDiffusionXLInpaint"),
        reads=SCALE + MEAN_AND_STD,
        encodes={"StableDiffusionXLInpaintPipeline": SCALE},
    ),
    PipelineSpace(
        title="Kolors",
        pipelines=_names("Kolors", "KolorsImg2Img"),
        encodes={"KolorsImg2ImgPipeline": SCALE + MEAN_AND_STD},
    ),
    PipelineSpace(
        title="Stable Diffusion 3",
        pipelines=_names("StableDiffusion3", "StableDiffusion3Img2Img", "StableDiffusion3Inpaint"),
        reads=SCALE_AND_SHIFT,
        decodes={"StableDiffusion3InpaintPipeline": SCALE},
    ),
    PipelineSpace(
        title="FLUX.1",
        pipelines=_names(
            "Flux", "FluxImg2Img", "FluxInpaint", "FluxFill", "FluxControl", "FluxControlNet", "FluxKontext"
        ),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="Chroma",
        pipelines=_names("Chroma", "ChromaImg2Img", "ChromaInpaint"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="LongCat-Image",
        pipelines=_names("LongCatImage", "LongCatImageEdit"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(title="Ovis-Image", pipelines=_names("OvisImage"), reads=SCALE_AND_SHIFT, tokens=2),
    PipelineSpace(title="Bria 3", pipelines=_names("Bria"), reads=SCALE_AND_SHIFT, tokens=2),
    PipelineSpace(
        title="Z-Image",
        pipelines=_names("ZImage", "ZImageImg2Img", "ZImageInpaint", "ZImageOmni"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(title="Lumina 2", pipelines=_names("Lumina2"), reads=SCALE_AND_SHIFT),
    PipelineSpace(title="HiDream", pipelines=_names("HiDreamImage"), reads=SCALE_AND_SHIFT),
    PipelineSpace(
        title="PRX",
        pipelines=_names("PRX"),
        autoencoders=("AutoencoderKL", "AutoencoderDC"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(
        title="DreamLite",
        pipelines=_names("DreamLite", "DreamLiteMobile"),
        autoencoders=("AutoencoderTiny",),
        reads=SCALE_AND_SHIFT,
        encodes=dict.fromkeys(_names("DreamLite", "DreamLiteMobile"), ()),
    ),
    PipelineSpace(title="GLM-Image", pipelines=_names("GlmImage"), reads=MEAN_AND_STD),
    PipelineSpace(title="SANA", pipelines=_names("Sana", "SanaControlNet"), autoencoders=("AutoencoderDC",)),
    PipelineSpace(
        title="SANA-Sprint",
        pipelines=_names("SanaSprint", "SanaSprintImg2Img"),
        autoencoders=("AutoencoderDC",),
        multiplier=0.5,
    ),
    PipelineSpace(
        title="HunyuanImage 2.1",
        pipelines=_names("HunyuanImage"),
        autoencoders=("AutoencoderKLHunyuanImage",),
    ),
    PipelineSpace(
        title="HunyuanImage 2.1 refiner",
        pipelines=_names("HunyuanImageRefiner"),
        autoencoders=("AutoencoderKLHunyuanImageRefiner",),
        frame_axis=True,
        repeated=True,
    ),
    PipelineSpace(
        title="Kandinsky 2",
        pipelines=_names("Kandinsky", "KandinskyImg2Img", "KandinskyV22", "KandinskyV22Img2Img"),
        autoencoders=_MOVQ,
        reads=(),
    ),
    PipelineSpace(
        title="Kandinsky 3", pipelines=_names("Kandinsky3", "Kandinsky3Img2Img"), autoencoders=_MOVQ, reads=()
    ),
    PipelineSpace(
        title="Latent diffusion, super-resolution",
        pipelines=_names("LDMSuperResolution"),
        autoencoders=_MOVQ,
        reads=(),
    ),
    PipelineSpace(
        title="Stable Cascade",
        pipelines=_names("StableCascadeDecoder", "StableCascadeCombined", "WuerstchenDecoder"),
        autoencoders=_PAELLA,
    ),
    PipelineSpace(
        title="FLUX.2",
        pipelines=_names("Flux2", "Flux2Klein", "Flux2KleinInpaint", "Flux2KleinKV"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        tokens=1,
    ),
    PipelineSpace(
        title="ERNIE-Image",
        pipelines=_names("ErnieImage"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        batch_norm_eps=1e-5,
    ),
    PipelineSpace(
        title="Ideogram 4",
        pipelines=_names("Ideogram4"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=POSITION_FIRST,
        tokens=1,
    ),
    PipelineSpace(
        title="Bria FIBO 2",
        pipelines=_names("BriaFibo2"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        unpacked_again=True,
    ),
    PipelineSpace(
        title="Qwen-Image",
        pipelines=_names(
            "QwenImage",
            "QwenImageImg2Img",
            "QwenImageInpaint",
            "QwenImageEdit",
            "QwenImageEditInpaint",
            "QwenImageEditPlus",
            "QwenImageLayered",
            "QwenImageControlNet",
        ),
        autoencoders=_QWEN,
        reads=MEAN_AND_STD,
        tokens=2,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Krea 2",
        pipelines=_names("Krea2"),
        autoencoders=_QWEN,
        reads=MEAN_AND_STD,
        tokens=2,
        frame_axis=True,
    ),
    PipelineSpace(
        title="NucleusMoE-Image",
        pipelines=_names("NucleusMoEImage"),
        autoencoders=_QWEN,
        reads=MEAN_AND_STD,
        tokens=2,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Qwen-Image 2.1",
        pipelines=_names("QwenImage21"),
        autoencoders=("AutoencoderKLQwenImage21",),
        reads=MEAN_AND_STD,
        tokens=1,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Bria FIBO",
        pipelines=_names("BriaFibo", "BriaFiboEdit"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        tokens=1,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Wan",
        pipelines=_names("Wan", "WanImageToVideo", "WanVideoToVideo", "WanVACE", "WanAnimate"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Cosmos 2 text to image",
        pipelines=_names("Cosmos2TextToImage"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),  # multiplies by sigma_data, which is published as 1
    PipelineSpace(
        title="ChronoEdit",
        pipelines=_names("ChronoEdit"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),
    PipelineSpace(
        title="JoyImage-Edit",
        pipelines=_names("JoyImageEdit", "JoyImageEditPlus"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),
)

PIPELINES: dict[str, PipelineSpace] = {name: row for row in ROWS for name in row.pipelines}
"""Rows by the names of pipelines' classes."""


def find_pipeline(name: str) -> PipelineSpace:
    """The row of a pipeline, by the name of its class.

    Raises:
        ValueError: for a name that has none, with the nearest ones.
    """
    row = PIPELINES.get(name)
    if row is None:
        near = get_close_matches(name, PIPELINES, 3) or sorted(PIPELINES)
        raise ValueError(
            f"expected a pipeline whose latent space is known, such as {', '.join(near)}; got {name}"
        )
    return row
