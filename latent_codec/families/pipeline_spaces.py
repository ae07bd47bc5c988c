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
_MOVQ, _PAELLA = ("VQModel",), ("PaellaVQModel",)

ROWS = (
    PipelineSpace(
        title="Stable Diffusion 1 and 2",
        published=(SD1,),
        generator=True,
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
        title="Stable Diffusion x4 upscaler",
        published=((0.08333, 0.0),),
        released=((4, 4),),
        pipelines=_names("StableDiffusionUpscale"),
        scale=0.08333,
    ),
    PipelineSpace(
        title="Latent consistency models",
        published=(SD1,),
        pipelines=_names("LatentConsistencyModel", "LatentConsistencyModelImg2Img"),
    ),
    PipelineSpace(
        title="Latent diffusion, text to image", published=(SD1,), pipelines=_names("LDMTextToImage")
    ),
    PipelineSpace(
        title="Marigold",
        published=(SD1,),
        pipelines=_names("MarigoldDepth", "MarigoldNormals", "MarigoldIntrinsics"),
    ),
    PipelineSpace(title="DiT", published=(SD1,), pipelines=_names("DiT")),
    PipelineSpace(title="PixArt", published=(SD1, SDXL), pipelines=_names("PixArtAlpha", "PixArtSigma")),
    PipelineSpace(title="HunyuanDiT", published=(SDXL,), pipelines=_names("HunyuanDiT")),
    PipelineSpace(title="Lumina 1", published=(SDXL,), pipelines=_names("Lumina")),
    PipelineSpace(
        title="AuraFlow", published=(SDXL,), upcasts=("force_upcast",), pipelines=_names("AuraFlow")
    ),
    PipelineSpace(title="OmniGen", published=(SDXL,), pipelines=_names("OmniGen")),
    PipelineSpace(
        title="CogView3 Plus", released=((16, 8),), generator=True, pipelines=_names("CogView3Plus")
    ),
    PipelineSpace(
        title="CogView4",
        published=((1.0, 0.0),),
        released=((16, 8),),
        generator=True,
        pipelines=_names("CogView4", "CogView4Control"),
    ),
    PipelineSpace(
        title="Kandinsky 5 image",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("Kandinsky5T2I", "Kandinsky5I2I"),
        channel_axis=4,
    ),  # FLUX.1's autoencoder, whose shift it ignores
    PipelineSpace(
        title="Stable Diffusion XL",
        published=(SDXL,),
        optional=MEAN_AND_STD,
        upcasts=("force_upcast", "post_quant_conv"),
        pipelines=_names("StableDiffusionXL", "StableDiffusionXLImg2Img", "StableDiffusionXLInpaint"),
        reads=SCALE + MEAN_AND_STD,
        encodes={"StableDiffusionXLInpaintPipeline": SCALE},
    ),
    PipelineSpace(
        title="Kolors",
        published=(SDXL,),
        upcasts=("force_upcast", "post_quant_conv"),
        pipelines=_names("Kolors", "KolorsImg2Img"),
        encodes={"KolorsImg2ImgPipeline": SCALE + MEAN_AND_STD},
    ),
    PipelineSpace(
        title="Stable Diffusion 3",
        published=(SD3,),
        released=((16, 8),),
        pipelines=_names("StableDiffusion3", "StableDiffusion3Img2Img", "StableDiffusion3Inpaint"),
        reads=SCALE_AND_SHIFT,
        decodes={"StableDiffusion3InpaintPipeline": SCALE},
    ),
    PipelineSpace(
        title="FLUX.1",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names(
            "Flux", "FluxImg2Img", "FluxInpaint", "FluxFill", "FluxControl", "FluxControlNet", "FluxKontext"
        ),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="Chroma",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("Chroma", "ChromaImg2Img", "ChromaInpaint"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="LongCat-Image",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("LongCatImage", "LongCatImageEdit"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="Ovis-Image",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("OvisImage"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="Bria 3",
        released=((16, 8),),
        optional=("shift_factor",),
        pipelines=_names("Bria"),
        reads=SCALE_AND_SHIFT,
        tokens=2,
    ),
    PipelineSpace(
        title="Z-Image",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("ZImage", "ZImageImg2Img", "ZImageInpaint", "ZImageOmni"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(
        title="Lumina 2",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("Lumina2"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(
        title="HiDream",
        published=(FLUX1,),
        released=((16, 8),),
        pipelines=_names("HiDreamImage"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(
        title="PRX",
        published=(FLUX1,),
        released=((16, 8), (32, 32)),
        pipelines=_names("PRX"),
        autoencoders=("AutoencoderKL", "AutoencoderDC"),
        reads=SCALE_AND_SHIFT,
    ),
    PipelineSpace(
        title="DreamLite",
        published=((1.0, 0.0),),
        optional=("shift_factor",),
        pipelines=_names("DreamLite", "DreamLiteMobile"),
        autoencoders=("AutoencoderTiny",),
        reads=SCALE_AND_SHIFT,
        encodes=dict.fromkeys(_names("DreamLite", "DreamLiteMobile"), ()),
    ),
    PipelineSpace(
        title="GLM-Image",
        released=((16, 8),),
        generator=True,
        pipelines=_names("GlmImage"),
        reads=MEAN_AND_STD,
    ),
    PipelineSpace(
        title="SANA",
        released=((32, 32),),
        pipelines=_names("Sana", "SanaControlNet"),
        autoencoders=("AutoencoderDC",),
    ),
    PipelineSpace(
        title="SANA-Sprint",
        released=((32, 32),),
        pipelines=_names("SanaSprint", "SanaSprintImg2Img"),
        autoencoders=("AutoencoderDC",),
        multiplier=0.5,
    ),
    PipelineSpace(
        title="HunyuanImage 2.1",
        released=((64, 32),),
        pipelines=_names("HunyuanImage"),
        autoencoders=("AutoencoderKLHunyuanImage",),
    ),
    PipelineSpace(
        title="HunyuanImage 2.1 refiner",
        released=((32, 16),),
        pipelines=_names("HunyuanImageRefiner"),
        autoencoders=("AutoencoderKLHunyuanImageRefiner",),
        frame_axis=True,
        repeated=True,
    ),
    PipelineSpace(
        title="Kandinsky 2",
        quantizes=False,
        pipelines=_names("Kandinsky", "KandinskyImg2Img", "KandinskyV22", "KandinskyV22Img2Img"),
        autoencoders=_MOVQ,
        reads=(),
    ),
    PipelineSpace(
        title="Kandinsky 3",
        quantizes=False,
        pipelines=_names("Kandinsky3", "Kandinsky3Img2Img"),
        autoencoders=_MOVQ,
        reads=(),
    ),
    PipelineSpace(
        title="Latent diffusion, super-resolution",
        released=((3, 4),),
        pipelines=_names("LDMSuperResolution"),
        autoencoders=_MOVQ,
        reads=(),
    ),
    PipelineSpace(
        title="Stable Cascade",
        released=((4, 4),),
        pipelines=_names("StableCascadeDecoder", "StableCascadeCombined", "WuerstchenDecoder"),
        autoencoders=_PAELLA,
    ),
    PipelineSpace(
        title="FLUX.2",
        released=((128, 16),),
        pipelines=_names("Flux2", "Flux2Klein", "Flux2KleinInpaint", "Flux2KleinKV"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        tokens=1,
    ),
    PipelineSpace(
        title="ERNIE-Image",
        released=((128, 16),),
        pipelines=_names("ErnieImage"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        batch_norm_eps=1e-5,
    ),
    PipelineSpace(
        title="Ideogram 4",
        released=((128, 16),),
        pipelines=_names("Ideogram4"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=POSITION_FIRST,
        tokens=1,
    ),
    PipelineSpace(
        title="Bria FIBO 2",
        released=((32, 8),),
        pipelines=_names("BriaFibo2"),
        autoencoders=_FLUX2,
        reads=MEAN_AND_STD,
        packed=CHANNEL_FIRST,
        unpacked_again=True,
    ),
    PipelineSpace(
        title="Qwen-Image",
        released=((16, 8),),
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
        released=((16, 8),),
        pipelines=_names("Krea2"),
        autoencoders=_QWEN,
        reads=MEAN_AND_STD,
        tokens=2,
        frame_axis=True,
    ),
    PipelineSpace(
        title="NucleusMoE-Image",
        released=((16, 8),),
        pipelines=_names("NucleusMoEImage"),
        autoencoders=_QWEN,
        reads=MEAN_AND_STD,
        tokens=2,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Qwen-Image 2.1",
        released=((64, 16),),
        pipelines=_names("QwenImage21"),
        autoencoders=("AutoencoderKLQwenImage21",),
        reads=MEAN_AND_STD,
        tokens=1,
        frame_axis=True,
        references_first=True,
    ),
    PipelineSpace(
        title="Bria FIBO",
        released=((48, 16),),
        pipelines=_names("BriaFibo", "BriaFiboEdit"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        tokens=1,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Wan",
        released=((16, 8), (48, 16)),
        pipelines=_names("Wan", "WanImageToVideo", "WanVideoToVideo", "WanVACE", "WanAnimate"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),
    PipelineSpace(
        title="Cosmos 2 text to image",
        released=((16, 8),),
        pipelines=_names("Cosmos2TextToImage"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),  # multiplies by sigma_data, which is published as 1
    PipelineSpace(
        title="ChronoEdit",
        released=((16, 8),),
        pipelines=_names("ChronoEdit"),
        autoencoders=_WAN,
        reads=MEAN_AND_STD,
        frame_axis=True,
    ),
    PipelineSpace(
        title="JoyImage-Edit",
        released=((16, 8),),
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
