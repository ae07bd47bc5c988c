"""LatentCodec: images <-> latents through any diffusers autoencoder of images."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from latent_codec import deprecated
from latent_codec.components.codec_facts import digest, facts_of, fingerprint
from latent_codec.components.codec_folders import (
    ORIGIN,
    SIDECARS,
    find_weights,
    is_foreign_file,
    load_autoencoder,
    load_foreign,
    pipeline_of,
    short_name,
)
from latent_codec.components.weight_files import (
    FORMER_WEIGHTS,
    check_folder_to_save,
    metadata_of,
    save_component,
)
from latent_codec.families import Encoded, LatentSpace, Level, family_of
from latent_codec.files import read_folder, replacing
from latent_codec.images.tensors import pad_to_multiple, to_image, to_images, to_pil
from latent_codec.models.latent_translator import LatentTranslator
from latent_codec.models.memory_format import use_channels_last
from latent_codec.models.own_weights import check_finite
from latent_codec.tensors import check_dense, check_floating
from latent_codec.torch_settings import ignoring_caller_settings, plain_state_dict, uncompiled, usable_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
Images: TypeAlias = list[Image.Image] | Tensor | np.ndarray | list[Tensor] | list[np.ndarray]


class NonFiniteError(ValueError):
    """Latents or images came out as NaN or infinity."""


class Encoding(NamedTuple):
    """What one pass of an encoder gives of images of one size."""

    latents: Tensor
    """As `LatentCodec.encode` gives them."""
    posterior: DiagonalGaussianDistribution | None
    """As `LatentCodec.posterior` gives it."""
    indices: list[Tensor] | None
    """As `LatentCodec.encode_indices` gives them; None of codecs without a codebook."""


class LatentCodec:
    """Images to latents and back, through a diffusers autoencoder.

        files, PIL images, arrays -> tensors [-1, 1] -> pad to f -> family.encode_raw -> raw_latents -> latent_space -> latents
        PIL images, arrays, tensors <- crop to size <- family.decode_raw <- raw_latents <- latent_space <-

    `autoencoder` is the component itself, as a pipeline takes it: `StableDiffusionPipeline(vae=codec.autoencoder)`.
    The codec never computes gradients, and computes in its own dtype: autocast, a default dtype and a default device
    change nothing. Fingerprints are those of the weights as they were handed over.

    Args:
        autoencoder: a diffusers model of a class in `families.FAMILIES`; put into eval mode. Parts of it may be
            compiled; a model that is compiled as a whole is unwrapped, because `torch.compile` compiles only `forward`.
        name: what messages and latent files call it.
        pipeline: the class name of a pipeline of diffusers, such as "Ideogram4Pipeline": latents are those that its
            denoiser works on; None: the usual ones of the autoencoder's class.

    Raises:
        ValueError: for a class of autoencoder that cannot be used, with the reason, or a pipeline that takes another.
    """

    def __init__(self, autoencoder, *, name: str = "codec", pipeline: str | None = None):
        self.autoencoder = autoencoder
        self.autoencoder.eval()
        self.name = name
        self.pipeline = pipeline
        self._latent_space = self.family.latent_space(pipeline)
        self._digests: dict[str, str] | None = None
        self.folder: Path | None = None
        """Where `from_pretrained` found it, with its sidecars; None for other origins."""

    @classmethod
    @ignoring_caller_settings()
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "default",
        *,
        subfolder: str | None = None,
        pipeline: str | None = None,
        config: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Open a codec.

        Args:
            name_or_path: a shipped codec ("default", "default-16", "default-eq", "default-rd", "default-vq", "garments"), a diffusers folder, a pipeline's folder (its
                vae, vqvae or movq), a run folder of training (its codec/), diffusers' own weight file next to its
                config.json, an id on the Hugging Face hub ("owner/name"), or a foreign checkpoint file, which is
                converted in memory: where nothing in it says the latents' scale, that is 1, with a warning.
            subfolder: of the autoencoder, if it is elsewhere.
            pipeline: the class name of the pipeline whose latents these are to be; None: the pipeline whose folder it
                is in, or the one that it was saved with, or else the usual ones of the autoencoder's class.
            config: the config.json of a lone weight file; None: the one in the file's metadata, or next to it.
            dtype: float32, bfloat16 or float16; None means float32.
            device: None means the CPU.

        Raises:
            ValueError: if nothing usable is there, if weights are damaged, missing, superfluous or beyond `dtype`, or for another
                dtype or a device that this machine lacks.
        """
        dtype = _usable_dtype(torch.float32 if dtype is None else dtype)
        device = usable_device("cpu" if device is None else device)
        if subfolder is None and is_foreign_file(name_or_path):
            path = Path(name_or_path)
            pipeline = pipeline or pipeline_of(path)
            codec = cls(load_foreign(path, config), name=path.stem, pipeline=pipeline)
        else:
            if config is not None:
                raise ValueError(f"a config is for a lone weight file, and {name_or_path} has its own")
            weights = find_weights(name_or_path, subfolder)
            autoencoder = read_folder(weights.parent, lambda: load_autoencoder(weights))
            pipeline = pipeline or pipeline_of(weights)
            codec = cls(autoencoder, name=short_name(name_or_path), pipeline=pipeline)
            codec.folder = weights.parent
        return codec.to(device, dtype)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move and convert the weights in place: `codec.to("cuda")`, `codec.to(torch.bfloat16)`. Fingerprints stay.

        Args:
            device: None: where it is. A dtype in its place is the dtype.
            dtype: float32, bfloat16 or float16; None: as it is.

        Raises:
            ValueError: for another dtype, a device that this machine lacks, or weights beyond `dtype`.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            self.autoencoder.to(usable_device(device))
        if dtype is not None and _usable_dtype(dtype) != self.dtype:
            self._weight_digests()  # of the weights as they are, so that a lower precision changes no fingerprint
            stored = self.dtype
            to_precision(self.autoencoder, dtype)
            for key, tensor in self.autoencoder.state_dict().items():
                check_finite(tensor, key, self.folder or self.name, stored)
        return self

    def __repr__(self) -> str:
        return "\n".join([f"LatentCodec {self.name}", *(f"  {key}: {text}" for key, text in self._rows())])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = "".join(f"<tr><th>{key}</th><td>{escape(text)}</td></tr>" for key, text in self._rows())
        return f"<table><caption>LatentCodec {escape(self.name)}</caption>{rows}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        """What `latent-codec info` shows, device and dtype; fingerprints only once they were computed."""
        facts = facts_of(self, fingerprints=self._digests is not None).describe()
        facts |= {"device": self.device, "dtype": str(self.dtype).removeprefix("torch.")}
        del facts["kind"], facts["name"]
        return [
            (key.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
            for key, value in facts.items()
            if value is not None
        ]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload codec",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, with a model card where the codec has none.

        Args:
            repo_id: "owner/name"; the repository is made if there is none.
            private: of a new repository; None: the owner's default.
            token: None: the one that is logged in.
            create_pr: open a pull request with it, instead of a commit.

        Returns:
            The URL of the commit.

        Raises:
            HfHubHTTPError: as huggingface_hub raises it, of the package's `errors`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = Path(folder, "README.md")
            if not card.is_file():
                rows = "\n".join(f"| {key} | {text} |" for key, text in self._rows())
                card.write_text(_CARD.format(name=self.name, repo_id=repo_id, rows=rows), encoding="utf-8")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            ).commit_url

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a diffusers folder, complete or not at all.

        It opens with the latents of `pipeline` again. The model card of the folder that this codec was opened from goes with it, and so do its preview and entropy
        model where they fit what is saved.

        An older codec's folder is overwritten; its other files stay. Weights are written in `dtype`, so
        that a codec opened in half precision is saved with rounded weights: another codec, by its fingerprints.

        Raises:
            ValueError: if `folder` holds something other than a codec.
            OSError: if it cannot be written.
        """
        folder = check_folder_to_save(folder)
        with replacing(folder, superseded=FORMER_WEIGHTS) as new:
            save_component(self.autoencoder, new, self.pipeline)
            for file in self._companions():
                shutil.copyfile(file, new / file.name)

    def _companions(self) -> list[Path]:
        """Model card, origin, preview and entropy model of the folder that the codec was opened from.

        Preview and entropy model name the fingerprint that they were fitted to.
        """
        if self.folder is None:
            return []
        found = [self.folder / "README.md", self.folder / ORIGIN]
        if self.dtype == torch.float32:
            for path in (self.folder / name for name in SIDECARS):
                metadata = "".join(metadata_of(path).values())
                if metadata and (self.fingerprint in metadata or self.space_fingerprint in metadata):
                    found.append(path)
        return [path for path in found if path.is_file()]

    @property
    def autoencoder(self) -> Any:
        """The component itself, as a pipeline takes it."""
        return self._autoencoder

    @autoencoder.setter
    def autoencoder(self, autoencoder: Any) -> None:
        self._autoencoder = uncompiled(autoencoder)
        self.family = family_of(self._autoencoder)

    @property
    def latent_space(self) -> LatentSpace:
        """Scale, shift and packing. Assigning writes them into config or weights, where this codec's pipelines read them."""
        return self._latent_space

    @latent_space.setter
    def latent_space(self, space: LatentSpace) -> None:
        if space == self._latent_space:
            return
        self._latent_space = self.family.set_latent_space(space, self.pipeline)
        if self.family.statistics_keys:
            self.weights_changed()

    space = deprecated.attribute("space", "latent_space")

    @property
    def dtype(self) -> torch.dtype:
        return self.autoencoder.dtype

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @property
    def channels(self) -> int:
        """Channels of the images: 1, 3 or 4."""
        return self.family.channels

    @property
    def upscale(self) -> int:
        """How many times as large as the encoded image the decoded one is, per side: 1 but for decoders that enlarge."""
        return self.family.upscale

    @property
    def levels(self) -> list[Level]:
        """Codebooks of a discrete codec, top level first; empty for the others."""
        return self.family.levels

    @property
    def is_discrete(self) -> bool:
        """Whether latents are snapped to a codebook, so that `encode_indices` works."""
        return bool(self.levels)

    @property
    def indices_suffice(self) -> bool:
        """Whether indices hold all that `decode` uses: not of MoVQ, whose latents are decoded unquantized."""
        return self.is_discrete and self.family.indices_suffice

    @property
    def codebook_sizes(self) -> list[int]:
        """Codewords of each level of a discrete codec, top level first; empty for the others."""
        return [level.codebook_size for level in self.levels]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.autoencoder.parameters())

    @property
    def space_fingerprint(self) -> str:
        """16 hex digits over encoder, quant conv, codebook, scale and shift: equal for a fine-tuned decoder."""
        digests = self._weight_digests().items()
        in_space = {key: digest for key, digest in digests if not self.is_of_decoder(key)}
        return fingerprint(in_space, self.latent_space)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all weights, scale and shift."""
        return fingerprint(self._weight_digests(), self.latent_space)

    def is_of_decoder(self, key: str) -> bool:
        """Whether a weight may differ without changing any latent."""
        return key.startswith(self.family.decoder_keys(self.autoencoder.config))

    def check_keeps_size(self, what: str) -> None:
        """Refuse a decoder that enlarges, for `what`, which needs an image back in the size that was encoded.

        Raises:
            ValueError: with what to take instead.
        """
        if self.upscale > 1:
            raise ValueError(
                f"{self.name} decodes to {self.upscale} times the size of what it encodes, and {what} needs the same size: "
                f"expected a codec of the same latents (space {self.space_fingerprint}) whose decoder does not enlarge"
            )

    def weights_changed(self) -> None:
        """To be called by whoever changes the autoencoder's weights: fingerprints are then taken anew."""
        self._digests = None

    def _weight_digests(self) -> dict[str, str]:
        if self._digests is None:
            state = sorted(plain_state_dict(self.autoencoder).items())
            self._digests = {
                key: digest(each.detach().to("cpu", torch.float32).numpy()) for key, each in state
            }
        return self._digests

    @ignoring_caller_settings()
    def encode(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        tile: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Images -> latents, scaled and shifted, ready for a denoiser.

        Args:
            images: one image or a list: a path, PIL image, array (H, W, C) of uint8 or of floats in [0, 1],
                tensor (C, H, W) in [-1, 1]; or a batch, as array (N, H, W, C) or tensor (N, C, H, W).
                Sides that are no multiple of the factor f are padded with their last row and column.
                Gray, color and alpha are brought to the codec's channels as `images.to_image` does it.
            sample: draw from the posterior, with `generator`; otherwise its mean.
            tile: side of the tiles to work in, in pixels, where memory is short. An AutoencoderKL, AutoencoderVQ or
                VQModel then gives what it gives untiled, up to rounding, for any tile; what the tiles do not hold
                is in scratch files (TMPDIR), 2 KB for each pixel of a Stable Diffusion shape in float32. Other
                classes are blended by diffusers from overlapping tiles, which shifts tones, or refused.

        Returns:
            Latents (B, C, ceil(H / f), ceil(W / f)) in the codec's dtype; where the images differ in size, a
            list of such tensors with B = 1. A VQModel's latents are unquantized: `decode` quantizes. A
            HierarchicalVQ's are its levels' codewords, side by side at the bottom level's resolution.

        Raises:
            ValueError: for input of another kind, a tile that the codec cannot use, or latents that overflow the dtype.
            OSError: if the scratch files of tiles find no room.
        """
        latents = []
        for batch in self._image_batches(images):
            posterior, raw_latents = self._encoded(batch, tile)
            if posterior is not None:
                raw_latents = posterior.sample(generator) if sample else posterior.mode()
            elif sample:
                name = type(self.autoencoder).__name__
                raise ValueError(f"{name} has no posterior to sample from; leave sample=False")
            latents.append(self._latents(raw_latents))
        return latents[0] if len(latents) == 1 else latents

    @ignoring_caller_settings()
    def encode_all(self, images: ImageLike | Sequence[ImageLike]) -> Encoding:
        """Images of one size -> latents, posterior and indices, in one pass of the encoder.

        Raises:
            ValueError: for images of different sizes, or latents that overflow the dtype.
        """
        batch, indices = self._one_batch(images), None
        with self._precision() as dtype:
            if self.is_discrete:
                encoded, indices = self.family.encode_with_indices(batch)
            else:
                encoded = self.family.encode_raw(batch.to(self.device, dtype))
        posterior, raw_latents = encoded
        if posterior is not None:
            raw_latents = posterior.mode()
        return Encoding(self._latents(raw_latents), posterior, indices)

    @ignoring_caller_settings()
    def posterior(self, images: ImageLike | Sequence[ImageLike]) -> DiagonalGaussianDistribution | None:
        """Images of one size, padded as `encode` does -> the Gaussian over their raw latents.

        Its `mean` and `var` are (B, C, ceil(H / f), ceil(W / f)), neither scaled nor shifted, and not checked
        for overflow. None where the class of autoencoder has no posterior.

        Raises:
            ValueError: for images of different sizes, or input that is no image.
        """
        return self._encoded(self._one_batch(images), tile=None).posterior

    @ignoring_caller_settings()
    def decode(
        self,
        latents: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        tile: int | None = None,
    ) -> Images:
        """Latents -> images.

        Args:
            latents: (B, C, h, w), or a list of such tensors, as `encode` gave them.
            size: (height, width) of the image that was encoded, to crop to, or a list with one for each; None keeps the
                padding. A decoder that enlarges gives `upscale` times as many pixels per side.
            output_type: "pil", a list of PIL images; "pt", float32 (B, C, H, W) in [-1, 1] on the codec's device;
                "np", float32 (B, H, W, C) in [0, 1]. For "pt" and "np" a list where images differ in size.
            tile: as for `encode`.

        Raises:
            ValueError: for other shapes, sizes or tiles, non-finite latents, or images that overflow the dtype.
            OSError: as for `encode`.
        """
        batches = [latents] if isinstance(latents, Tensor) else list(latents)
        for batch in batches:
            self._check_latents(batch)
        images = [image for batch in batches for image in self._decode(batch, tile)]
        return as_output(self._crop(images, size), output_type)

    def roundtrip(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        output_type: str = "pil",
        tile: int | None = None,
    ) -> Images:
        """Images -> latents -> reconstructions of the same sizes, or `upscale` times as large, as `decode` gives them.

        Raises:
            ValueError, OSError: as `encode` and `decode`.
        """
        singles = self._singles(images)
        sizes = [(image.shape[1], image.shape[2]) for image in singles]
        return self.decode(self.encode(singles, tile=tile), size=sizes, output_type=output_type, tile=tile)

    def translate(
        self, latents: Tensor | Sequence[Tensor], translator: LatentTranslator
    ) -> Tensor | list[Tensor]:
        """This codec's latents -> those that another codec would have encoded the images to.

            translator = LatentTranslator.from_pretrained("runs/translator/translator")
            images = other.decode(codec.translate(latents, translator))

        Args:
            latents: (B, C, h, w), or a list of such tensors, as `encode` gave them.
            translator: from this codec, on any device.

        Returns:
            The other codec's latents, in the dtype and on the device of `latents`; a list for a list.

        Raises:
            ValueError: for a translator from another codec, naming both, or latents of another shape.
        """
        translator.check_source(self)
        if isinstance(latents, Tensor):
            return translator.translate(latents)
        return [translator.translate(batch) for batch in latents]

    @ignoring_caller_settings()
    def encode_indices(self, images: ImageLike | Sequence[ImageLike]) -> list[Tensor]:
        """Images of one size -> codebook indices: a list of int64 index maps (B, h, w), top level first.

        There is one for each level of a HierarchicalVQ, and one for every other discrete codec.

        Raises:
            ValueError: if the codec has no codebook, or for images of different sizes.
        """
        self._check_discrete()
        batch = self._one_batch(images)
        with self._precision():
            return self.family.encode_with_indices(batch)[1]

    @ignoring_caller_settings()
    def decode_indices(
        self,
        indices: Sequence[Tensor],
        *,
        known: Sequence[Tensor] | None = None,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
    ) -> Images:
        """Codebook indices, a list of int64 index maps (B, h, w), top level first -> images, as `decode` gives them.

        Of a HierarchicalVQ's index maps the lower ones may be left out: their mean codeword takes their place.

        Raises:
            ValueError: if the codec has no codebook, or for index maps of another form or out of its range.
        """
        self._check_discrete()
        if isinstance(indices, Tensor):
            raise ValueError(
                "expected a list of index maps, one for each level, got a tensor: put it into a list"
            )
        for each in indices:
            check_dense(each, "indices")
        with self._precision():
            images = self.family.decode_indices(
                [each.to(self.device) for each in indices],
                None if known is None else [each.to(self.device) for each in known],
            )
        return as_output(self._crop(list(self._clamped(images)), size), output_type)

    def _image_batches(self, images: ImageLike | Sequence[ImageLike]) -> list[Tensor]:
        """Images of any kind -> padded batches (N, C, H, W): one where all sizes agree, else one for each."""
        singles = self._singles(images)
        sizes = {image.shape[-2:] for image in singles}
        for height, width in sizes:
            self.family.check_size(height, width)
        batches = [torch.stack(singles)] if len(sizes) == 1 else [image[None] for image in singles]
        return [pad_to_multiple(batch, self.family.side_multiple) for batch in batches]

    def _singles(self, images: ImageLike | Sequence[ImageLike]) -> list[Tensor]:
        """Images of any kind -> (C, H, W) each, of their own sizes, on the codec's device."""
        device = self.device  # asked once: diffusers walks through all modules for it
        listed = list(images) if isinstance(images, list | tuple) else [images]
        singles = [image.to(device) for each in listed for image in self._to_images(each)]
        if not singles:
            raise ValueError("expected at least one image, got none")
        return singles

    def _one_batch(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        batches = self._image_batches(images)
        if len(batches) > 1:
            raise ValueError("the images differ in size: expected one size, or one image at a time")
        return batches[0]

    def _to_images(self, image: ImageLike) -> list[Tensor]:
        """One image, or a batch as array or tensor -> images (C, H, W)."""
        if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 5:
            raise ValueError(
                f"{self.name}: expected images, which have no frames, got {type(image).__name__} of shape "
                f"{tuple(image.shape)}; encode a video's frames one by one"
            )
        if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4:
            return to_images(image, channels=self.channels)
        return [to_image(image, channels=self.channels)]

    def _check_latents(self, latents: Tensor) -> None:
        check_floating(latents, "latents")
        if latents.ndim != 4 or latents.shape[1] != self.latent_space.channels or 0 in latents.shape:
            raise ValueError(
                f"expected latents of {self.name}, (B, {self.latent_space.channels}, h, w), got shape {tuple(latents.shape)}"
            )
        if not torch.isfinite(latents.float()).all():
            raise ValueError("the latents hold NaN or infinity; look at where they were made")

    def _check_discrete(self) -> None:
        if not self.is_discrete:
            raise ValueError(
                f"{self.name} is of the class {type(self.autoencoder).__name__}, which has no codebook; use encode and decode"
            )

    def _latents(self, raw_latents: Tensor) -> Tensor:
        latents = self.latent_space.normalize(raw_latents).to(self.dtype).contiguous()
        self._check_finite(latents, "latents")
        return latents

    def _encoded(self, images: Tensor, tile: int | None) -> Encoded:
        with self._precision() as dtype:
            return self.family.encode_raw(images.to(self.device, dtype), _checked_tile(tile))

    def _decode(self, latents: Tensor, tile: int | None) -> Tensor:
        with self._precision() as dtype:
            raw_latents = self.latent_space.denormalize(latents.to(self.device, dtype))
            images = self.family.decode_raw(raw_latents, _checked_tile(tile))
        return self._clamped(images)

    def _clamped(self, images: Tensor) -> Tensor:
        self._check_finite(images, "images")
        return images.float().clamp(-1, 1)

    @contextmanager
    def _precision(self) -> Iterator[torch.dtype]:
        """The dtype to compute in: float32 while a float16 codec says force_upcast, as SDXL's pipelines do.

        Weights are laid out for it; their values stay.
        """
        upcasts = self.dtype == torch.float16 and self.autoencoder.config.get("force_upcast")
        if upcasts:
            to_precision(self.autoencoder, torch.float32)
        if self.family.channels_last:
            use_channels_last(self.autoencoder)
        try:
            yield self.dtype
        finally:
            if upcasts:
                to_precision(self.autoencoder, torch.float16)

    def _check_finite(self, tensor: Tensor, what: str) -> None:
        if torch.isfinite(tensor).all():
            return
        if self.dtype == torch.float16:
            raise NonFiniteError(
                f"{self.name} gave non-finite {what} in float16: use bfloat16 or float32, or run "
                "`latent-codec calibrate`, which records that float16 is unsafe (force_upcast)"
            )
        raise NonFiniteError(
            f"{self.name} gave non-finite {what}: its weights are damaged, or scale is far off"
        )

    def _crop(self, images: list[Tensor], size) -> list[Tensor]:
        if size is None:
            return images
        sizes = [size] * len(images) if isinstance(size[0], Integral) else list(size)
        if len(sizes) != len(images):
            raise ValueError(f"expected {len(images)} sizes, one for each image, got {len(sizes)}")
        factor, upscale = self.family.side_multiple, self.upscale
        for image, (height, width) in zip(images, sizes):
            full_height, full_width = (side // upscale for side in image.shape[-2:])
            if -(-height // factor) * factor != full_height or -(-width // factor) * factor != full_width:
                raise ValueError(
                    f"size (height, width) = ({height}, {width}) does not belong to these latents, which decode to "
                    f"{full_height}x{full_width}; height may be {full_height - factor + 1} to {full_height}, "
                    f"width {full_width - factor + 1} to {full_width}"
                )
        return [
            image[:, : height * upscale, : width * upscale] for image, (height, width) in zip(images, sizes)
        ]


def to_precision(component: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convert a component's weights in place, but for the parts that its class keeps in float32."""
    kept = getattr(component, "_keep_in_fp32_modules", None) or ()
    for name, part in component.named_children():
        torch.nn.Module.to(part, dtype=torch.float32 if name in kept else dtype)
    return component


def _checked_tile(tile: int | None) -> int | None:
    if tile is None:
        return None
    if not isinstance(tile, Integral) or isinstance(tile, bool) or tile < 1:
        raise ValueError(f"tile is {tile!r}; expected an integer of pixels, at least 1, or None")
    return int(tile)


def as_output(images: list[Tensor], output_type: str) -> Images:
    """Images (C, H, W) in [-1, 1] as `LatentCodec.decode` gives them.

    Raises:
        ValueError: for another `output_type`.
    """
    if output_type == "pil":
        return [to_pil(image) for image in images]
    if output_type not in ("pt", "np"):
        raise ValueError(f'output_type is {output_type!r}; allowed are "pil", "pt" and "np"')
    alike = len({image.shape for image in images}) == 1
    if output_type == "pt":
        return torch.stack(images) if alike else images
    arrays = [(image.permute(1, 2, 0).cpu().numpy() + 1) / 2 for image in images]
    return np.stack(arrays) if alike else arrays


def _usable_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"dtype: expected one of {allowed}, got {dtype}")
    return dtype


_CARD = """---
library_name: diffusers
tags: [autoencoder, latent-codec]
---

# {name}

| | |
|---|---|
{rows}

```python
from latent_codec import LatentCodec

codec = LatentCodec.from_pretrained("{repo_id}")
```
"""
