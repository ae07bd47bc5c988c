"""What each pipeline of diffusers reads of its autoencoder: one autoencoder has as many latent spaces as pipelines disagree.

Read in diffusers 0.42.1, in the lines where a pipeline encodes an image, and where it has none in the lines that end it
(`vae.decode`). Pipelines of one row agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from latent_codec.families.latent_space import CHANNEL_FIRST, POSITION_FIRST, Config, LatentSpace

SCALE = ("scaling_factor",)
SCALE_AND_SHIFT = ("scaling_factor", "shift_factor")
MEAN_AND_STD = ("latents_mean", "latents_std")

SD1, SDXL, SD3, FLUX1 = (0.18215, 0.0), (0.13025, 0.0), (1.5305, 0.0609), (0.3611, 0.1159)
"""scaling_factor and shift_factor, as published."""


@dataclass(frozen=True, kw_only=True)
class PipelineSpace:
    """How the pipelines of one row make latents of raw latents.

    Args:
        title: the models that they run.
        pipelines: names of their classes.
        autoencoders: names of the classes of autoencoders that they are made for, the usual one first.
        reads: the entries of the autoencoder's config that they use; the others change nothing.
        encodes, decodes: pipelines of the row whose encoding or decoding reads other entries, by their names.
        scale: what they take as scaling_factor whatever the config says; None: the config's.
        multiplier: what else they multiply latents by: the scheduler's sigma_data, as published.
        released: channels of latents and the downsampling factor, of the denoisers that were released.
        published: scaling_factor and shift_factor of the autoencoders that were released with them, of AutoencoderKL's
            class, which many models share; empty: not known.
        optional: what they read if it is set.
        generator: whether they hand decode a generator.
        upcasts: what they ask an autoencoder of float16 for, to decode in float32 where force_upcast is set.
        quantizes: whether latents of a VQModel are snapped to its codebook as they are decoded.
        read_in: the version of diffusers that all this was read from.
        packed: order of the channels of 2x2 positions, which they pack before mean and std are applied.
        unpacked_again: whether they undo that packing afterwards.
        batch_norm_eps: of the statistics of packed channels; None: the config's.
        tokens: side of the squares of positions that make one token of their denoiser.
        frame_axis: whether latents have an axis of frames.
        repeated: whether their denoiser is handed every channel twice.
        channel_axis: of video (B, C, T, h, w); 4: channels last.
        references_first: whether their denoiser is told the shapes of references before that of the image it draws.
    """

    title: str
    pipelines: tuple[str, ...]
    autoencoders: tuple[str, ...] = ("AutoencoderKL",)
    reads: tuple[str, ...] = SCALE
    encodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    decodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    scale: float | None = None
    multiplier: float = 1.0
    released: tuple[tuple[int, int], ...] = ((4, 8),)
    published: tuple[tuple[float, float], ...] = ()
    optional: tuple[str, ...] = ()
    generator: bool = False
    upcasts: tuple[str, ...] = ()
    quantizes: bool = True
    read_in: str = "0.42.1"
    packed: str | None = None
    unpacked_again: bool = False
    batch_norm_eps: float | None = None
    tokens: int | None = None
    frame_axis: bool = False
    repeated: bool = False
    channel_axis: int = 1
    references_first: bool = False

    def latent_space(self, channels: int, downsampling_factor: int, config: Config) -> LatentSpace:
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


def _row(title: str, *stems: str, **facts: Any) -> PipelineSpace:
    """The row of the pipelines whose classes are called by these `stems` and "Pipeline"."""
    return PipelineSpace(title=title, pipelines=tuple(f"{stem}Pipeline" for stem in stems), **facts)


# What rows of models with the same autoencoder share.
_SDXL: dict[str, Any] = {"published": (SDXL,), "upcasts": ("force_upcast", "post_quant_conv")}
_FLUX1: dict[str, Any] = {"published": (FLUX1,), "released": ((16, 8),), "reads": SCALE_AND_SHIFT}
_COGVIEW: dict[str, Any] = {"released": ((16, 8),), "generator": True}
_SANA: dict[str, Any] = {"autoencoders": ("AutoencoderDC",), "released": ((32, 32),)}
_MOVQ: dict[str, Any] = {"autoencoders": ("VQModel",), "reads": ()}
_FLUX2: dict[str, Any] = {
    "autoencoders": ("AutoencoderKLFlux2",),
    "released": ((128, 16),),
    "reads": MEAN_AND_STD,
    "packed": CHANNEL_FIRST,
}
_WAN: dict[str, Any] = {
    "autoencoders": ("AutoencoderKLWan",),
    "released": ((16, 8),),
    "reads": MEAN_AND_STD,
    "frame_axis": True,
}
_QWEN = _WAN | {"autoencoders": ("AutoencoderKLQwenImage",), "tokens": 2}

ROWS = (
    _row(
        "Stable Diffusion 1 and 2",
        "StableDiffusion",
        "StableDiffusionImg2Img",
        "StableDiffusionInpaint",
        "StableDiffusionInstructPix2Pix",
        "StableDiffusionControlNet",
        "StableDiffusionDepth2Img",
        autoencoders=("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny"),
        published=(SD1,),
        generator=True,
    ),
    _row(
        "Stable Diffusion x4 upscaler",
        "StableDiffusionUpscale",
        published=((0.08333, 0.0),),
        released=((4, 4),),
        scale=0.08333,
    ),
    _row(
        "Latent consistency models",
        "LatentConsistencyModel",
        "LatentConsistencyModelImg2Img",
        published=(SD1,),
    ),
    _row("Latent diffusion, text to image", "LDMTextToImage", published=(SD1,)),
    _row("Marigold", "MarigoldDepth", "MarigoldNormals", "MarigoldIntrinsics", published=(SD1,)),
    _row("DiT", "DiT", published=(SD1,)),
    _row("PixArt", "PixArtAlpha", "PixArtSigma", published=(SD1, SDXL)),
    _row("HunyuanDiT", "HunyuanDiT", published=(SDXL,)),
    _row("Lumina 1", "Lumina", published=(SDXL,)),
    _row("AuraFlow", "AuraFlow", published=(SDXL,), upcasts=("force_upcast",)),
    _row("OmniGen", "OmniGen", published=(SDXL,)),
    _row("CogView3 Plus", "CogView3Plus", **_COGVIEW),
    _row("CogView4", "CogView4", "CogView4Control", published=((1.0, 0.0),), **_COGVIEW),
    # FLUX.1's autoencoder, whose shift it ignores
    _row(
        "Kandinsky 5 image", "Kandinsky5T2I", "Kandinsky5I2I", **(_FLUX1 | {"reads": SCALE}), channel_axis=4
    ),
    _row(
        "Stable Diffusion XL",
        "StableDiffusionXL",
        "StableDiffusionXLImg2Img",
        "StableDiffusionXLInpaint",
        reads=SCALE + MEAN_AND_STD,
        encodes={"StableDiffusionXLInpaintPipeline": SCALE},
        optional=MEAN_AND_STD,
        **_SDXL,
    ),
    _row(
        "Kolors",
        "Kolors",
        "KolorsImg2Img",
        encodes={"KolorsImg2ImgPipeline": SCALE + MEAN_AND_STD},
        **_SDXL,
    ),
    _row(
        "Stable Diffusion 3",
        "StableDiffusion3",
        "StableDiffusion3Img2Img",
        "StableDiffusion3Inpaint",
        published=(SD3,),
        released=((16, 8),),
        reads=SCALE_AND_SHIFT,
        decodes={"StableDiffusion3InpaintPipeline": SCALE},
    ),
    _row(
        "FLUX.1",
        "Flux",
        "FluxImg2Img",
        "FluxInpaint",
        "FluxFill",
        "FluxControl",
        "FluxControlNet",
        "FluxKontext",
        tokens=2,
        **_FLUX1,
    ),
    _row("Chroma", "Chroma", "ChromaImg2Img", "ChromaInpaint", tokens=2, **_FLUX1),
    _row("LongCat-Image", "LongCatImage", "LongCatImageEdit", tokens=2, **_FLUX1),
    _row("Ovis-Image", "OvisImage", tokens=2, **_FLUX1),
    _row("Bria 3", "Bria", optional=("shift_factor",), tokens=2, **(_FLUX1 | {"published": ()})),
    _row("Z-Image", "ZImage", "ZImageImg2Img", "ZImageInpaint", "ZImageOmni", **_FLUX1),
    _row("Lumina 2", "Lumina2", **_FLUX1),
    _row("HiDream", "HiDreamImage", **_FLUX1),
    _row(
        "PRX",
        "PRX",
        autoencoders=("AutoencoderKL", "AutoencoderDC"),
        **(_FLUX1 | {"released": ((16, 8), (32, 32))}),
    ),
    _row(
        "DreamLite",
        "DreamLite",
        "DreamLiteMobile",
        autoencoders=("AutoencoderTiny",),
        published=((1.0, 0.0),),
        reads=SCALE_AND_SHIFT,
        encodes={"DreamLitePipeline": (), "DreamLiteMobilePipeline": ()},
        optional=("shift_factor",),
    ),
    _row("GLM-Image", "GlmImage", released=((16, 8),), reads=MEAN_AND_STD, generator=True),
    _row("SANA", "Sana", "SanaControlNet", **_SANA),
    _row("SANA-Sprint", "SanaSprint", "SanaSprintImg2Img", multiplier=0.5, **_SANA),
    _row(
        "HunyuanImage 2.1",
        "HunyuanImage",
        autoencoders=("AutoencoderKLHunyuanImage",),
        released=((64, 32),),
    ),
    _row(
        "HunyuanImage 2.1 refiner",
        "HunyuanImageRefiner",
        autoencoders=("AutoencoderKLHunyuanImageRefiner",),
        released=((32, 16),),
        frame_axis=True,
        repeated=True,
    ),
    _row(
        "Kandinsky 2",
        "Kandinsky",
        "KandinskyImg2Img",
        "KandinskyV22",
        "KandinskyV22Img2Img",
        quantizes=False,
        **_MOVQ,
    ),
    _row("Kandinsky 3", "Kandinsky3", "Kandinsky3Img2Img", quantizes=False, **_MOVQ),
    _row("Latent diffusion, super-resolution", "LDMSuperResolution", released=((3, 4),), **_MOVQ),
    _row(
        "Stable Cascade",
        "StableCascadeDecoder",
        "StableCascadeCombined",
        "WuerstchenDecoder",
        autoencoders=("PaellaVQModel",),
        released=((4, 4),),
    ),
    _row("FLUX.2", "Flux2", "Flux2Klein", "Flux2KleinInpaint", "Flux2KleinKV", tokens=1, **_FLUX2),
    _row("ERNIE-Image", "ErnieImage", batch_norm_eps=1e-5, **_FLUX2),
    _row("Ideogram 4", "Ideogram4", tokens=1, **(_FLUX2 | {"packed": POSITION_FIRST})),
    _row("Bria FIBO 2", "BriaFibo2", unpacked_again=True, **(_FLUX2 | {"released": ((32, 8),)})),
    _row(
        "Qwen-Image",
        "QwenImage",
        "QwenImageImg2Img",
        "QwenImageInpaint",
        "QwenImageEdit",
        "QwenImageEditInpaint",
        "QwenImageEditPlus",
        "QwenImageLayered",
        "QwenImageControlNet",
        **_QWEN,
    ),
    _row("Krea 2", "Krea2", **_QWEN),
    _row("NucleusMoE-Image", "NucleusMoEImage", **_QWEN),
    _row(
        "Qwen-Image 2.1",
        "QwenImage21",
        autoencoders=("AutoencoderKLQwenImage21",),
        released=((64, 16),),
        reads=MEAN_AND_STD,
        tokens=1,
        frame_axis=True,
        references_first=True,
    ),
    _row("Bria FIBO", "BriaFibo", "BriaFiboEdit", tokens=1, **(_WAN | {"released": ((48, 16),)})),
    _row(
        "Wan",
        "Wan",
        "WanImageToVideo",
        "WanVideoToVideo",
        "WanVACE",
        "WanAnimate",
        **(_WAN | {"released": ((16, 8), (48, 16))}),
    ),
    _row("Cosmos 2 text to image", "Cosmos2TextToImage", **_WAN),  # times sigma_data, which is published as 1
    _row("ChronoEdit", "ChronoEdit", **_WAN),
    _row("JoyImage-Edit", "JoyImageEdit", "JoyImageEditPlus", **_WAN),
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
