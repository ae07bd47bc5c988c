"""LatentCodec: images <-> latents through any diffusers autoencoder of images."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from latent_codec.components.codec_facts import digest, fingerprint, is_of_decoder
from latent_codec.components.codec_folders import (
    find_weights,
    is_foreign_file,
    load_autoencoder,
    load_foreign,
    short_name,
)
from latent_codec.components.weight_files import FORMER_WEIGHTS, check_folder_to_save, save_component
from latent_codec.families.latent_space import LatentSpace, is_movq, side_multiple, supported_class
from latent_codec.files import read_folder, replacing
from latent_codec.images.tensors import pad_to_multiple, to_image, to_pil
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.own_weights import check_finite
from latent_codec.models.quantizers import nearest_codewords
from latent_codec.models.tiling import decode_tiled, encode_tiled, has_exact_tiles
from latent_codec.tensors import check_dense, check_floating
from latent_codec.torch_settings import ignoring_caller_settings, plain_state_dict, uncompiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


class NonFiniteError(ValueError):
    """Latents or images came out as NaN or infinity."""


class LatentCodec:
    """Images to latents and back, through a diffusers autoencoder.

        images -> image [-1, 1] -> pad to f -> autoencoder.encode -> raw_latents -> space -> latents
        images <- image [-1, 1] <- crop to size <- autoencoder.decode <- raw_latents <- space <-

    `autoencoder` is the component itself, as a pipeline takes it: `StableDiffusionPipeline(vae=codec.autoencoder)`.
    The codec never computes gradients, and computes in its own dtype: autocast, a default dtype and a default device
    change nothing. Fingerprints are those of the weights as they were handed over.

    Args:
        autoencoder: a diffusers model of a class in `latent_space.SUPPORTED`; put into eval mode. Parts of it may be
            compiled; a model that is compiled as a whole is unwrapped, because `torch.compile` compiles only `forward`.
        name: what messages and latent files call it.

    Raises:
        ValueError: for a class of autoencoder that cannot be used, with the reason.
    """

    def __init__(self, autoencoder, *, name: str = "codec"):
        self.autoencoder = autoencoder
        self.autoencoder.eval()
        self.name = name
        self._space = LatentSpace.from_config(self.autoencoder)
        self._digests: dict[str, str] | None = None
        self.folder: Path | None = None
        """Where `from_pretrained` found it, and its sidecars lie; None for other origins."""

    @classmethod
    @ignoring_caller_settings()
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "default",
        *,
        subfolder: str | None = None,
        config: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "LatentCodec":
        """Open a codec.

        Args:
            name_or_path: a shipped codec ("default", "default-vq"), a diffusers folder, a pipeline's folder (its vae, vqvae
                or movq), a run folder of training (its codec/), diffusers' own weight file beside its
                config.json, an id on the Hugging Face hub ("owner/name"), or a foreign checkpoint file, which is
                converted in memory: where nothing in it says the latents' scale, that is 1, with a warning.
            subfolder: where in it the autoencoder lies, if elsewhere.
            config: the config.json of a lone weight file; None: the one in the file's metadata, or next to it.
            dtype: float32, bfloat16 or float16; None means float32.
            device: None means the CPU.

        Raises:
            ValueError: if nothing usable is there, if weights are damaged, missing, superfluous or beyond `dtype`, or for another
                dtype or a device that this machine lacks.
        """
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in DTYPES:
            allowed = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
            raise ValueError(f"dtype is {dtype}; allowed are {allowed}")
        device = _usable_device(device)
        if subfolder is None and is_foreign_file(name_or_path):
            codec = cls(load_foreign(name_or_path, config), name=Path(name_or_path).stem)
        else:
            if config is not None:
                raise ValueError(f"a config is for a lone weight file, and {name_or_path} has its own")
            weights = find_weights(name_or_path, subfolder)
            autoencoder = read_folder(weights.parent, lambda: load_autoencoder(weights))
            codec = cls(autoencoder, name=short_name(name_or_path))
            codec.folder = weights.parent
        if dtype != torch.float32:
            codec._weight_digests()  # of the weights as stored, so that a lower precision changes no fingerprint
        to_precision(codec.autoencoder.to(device), dtype)
        if dtype != torch.float32:
            for key, tensor in codec.autoencoder.state_dict().items():
                check_finite(tensor, key, codec.folder or name_or_path, torch.float32)
        return codec

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a diffusers folder, complete or not at all, with the model card this codec was opened with.

        An older codec's folder is overwritten; what else lies in it stays. Weights are written in `dtype`, so
        that a codec opened in half precision is saved with rounded weights: another codec, by its fingerprints.

        Raises:
            ValueError: if `folder` holds something other than a codec.
            OSError: if it cannot be written.
        """
        folder = check_folder_to_save(folder)
        with replacing(folder, superseded=FORMER_WEIGHTS) as new:
            if self.folder is not None and (self.folder / "README.md").is_file():
                new.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / "README.md", new / "README.md")
            save_component(self.autoencoder, new)

    @property
    def autoencoder(self) -> torch.nn.Module:
        """The component itself, as a pipeline takes it."""
        return self._autoencoder

    @autoencoder.setter
    def autoencoder(self, autoencoder: torch.nn.Module) -> None:
        self._autoencoder = uncompiled(autoencoder)

    @property
    def space(self) -> LatentSpace:
        """Scale, shift and grid. Assigning writes them into `autoencoder.config`, for pipelines to read."""
        return self._space

    @space.setter
    def space(self, space: LatentSpace) -> None:
        kind, entries = type(self.autoencoder).__name__, space.to_config()
        unscaled = LatentSpace(space.channels, space.downsampling_factor).to_config()
        for key in entries.keys() - self.autoencoder.config.keys():
            if entries[key] != unscaled[key]:
                raise ValueError(f"{kind} has no {key}, so no pipeline would read {entries[key]}")
            del entries[key]
        before = {key: self.autoencoder.config[key] for key in entries}
        self.autoencoder.register_to_config(**entries)
        found = LatentSpace.from_config(self.autoencoder)
        if found != space:
            self.autoencoder.register_to_config(**before)
            raise ValueError(f"{space} does not fit {kind}, which would have {found}")
        self._space = space

    @property
    def dtype(self) -> torch.dtype:
        return self.autoencoder.dtype

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @property
    def channels(self) -> int:
        """Channels of the images: 1, 3 or 4."""
        return self.autoencoder.config.in_channels

    @property
    def is_discrete(self) -> bool:
        """Whether latents are snapped to a codebook, so that `encode_indices` works."""
        return hasattr(self.autoencoder, "quantize") or self._is_hierarchical

    @property
    def codebook_sizes(self) -> list[int]:
        """Codewords of each level of a discrete codec, top level first; empty for the others."""
        if not self.is_discrete:
            return []
        if hasattr(self.autoencoder, "quantizers"):
            return [quantizer.codebook_size for quantizer in self.autoencoder.quantizers]
        return [self.autoencoder.config.num_vq_embeddings]

    @property
    def _is_hierarchical(self) -> bool:
        return isinstance(self.autoencoder, HierarchicalVQ)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.autoencoder.parameters())

    @property
    def space_fingerprint(self) -> str:
        """16 hex digits over encoder, quant conv, codebook, scale and shift: equal for a fine-tuned decoder."""
        return self._fingerprint(
            {key: digest for key, digest in self._weight_digests().items() if not self._is_of_decoder(key)}
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all weights, scale and shift."""
        return self._fingerprint(self._weight_digests())

    def _is_of_decoder(self, key: str) -> bool:
        return is_of_decoder(key, supported_class(type(self._autoencoder)), self._autoencoder.config)

    def weights_changed(self) -> None:
        """To be called by whoever changes the autoencoder's weights: fingerprints are then taken anew."""
        self._digests = None

    def _weight_digests(self) -> dict[str, str]:
        if self._digests is None:
            self._digests = {
                key: _digest(tensor) for key, tensor in sorted(plain_state_dict(self.autoencoder).items())
            }
        return self._digests

    def _fingerprint(self, digests: dict[str, str]) -> str:
        return fingerprint(digests, self.space)

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
                Grey, colour and alpha are brought to the codec's channels as `images.to_image` does it.
            sample: draw from the posterior, with `generator`; otherwise its mean.
            tile: side of the tiles to work in, in pixels, where memory is short. An AutoencoderKL, AutoencoderVQ or
                VQModel then gives what it gives untiled, up to rounding, for any tile; what the tiles do not hold
                lies in scratch files (TMPDIR), 2 KB for each pixel of a Stable Diffusion shape in float32. Other
                classes are blended by diffusers from overlapping tiles, which shifts tones, or refused.

        Returns:
            Latents (B, C, ceil(H / f), ceil(W / f)) in the codec's dtype; where the images differ in size, a
            list of such tensors with B = 1. A VQModel's latents are unquantised: `decode` quantises. A
            HierarchicalVQ's are its levels' codewords, side by side on the bottom grid.

        Raises:
            ValueError: for input of another kind, a tile that the codec cannot use, or latents that overflow the dtype.
            OSError: if the scratch files of tiles find no room.
        """
        batches = self._image_batches(images)
        latents = [
            self.space.normalize(self._encode_raw(batch, sample, generator, tile)).to(self.dtype).contiguous()
            for batch in batches
        ]
        for each in latents:
            self._check_finite(each, "latents")
        return latents[0] if len(latents) == 1 else latents

    @ignoring_caller_settings()
    def posterior(self, images: ImageLike | Sequence[ImageLike]) -> DiagonalGaussianDistribution | None:
        """Images of one size, padded as `encode` does -> the Gaussian over their raw latents.

        Its `mean` and `var` are (B, C, ceil(H / f), ceil(W / f)), neither scaled nor shifted, and not checked
        for overflow. None where the class of autoencoder has no posterior.

        Raises:
            ValueError: for images of different sizes, or input that is no image.
        """
        batches = self._image_batches(images)
        if len(batches) > 1:
            raise ValueError("the images differ in size; ask for their posteriors one by one")
        return getattr(self._encoder_output(batches[0], tile=None), "latent_dist", None)

    @ignoring_caller_settings()
    def decode(
        self,
        latents: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        tile: int | None = None,
    ) -> list[Image.Image] | Tensor | np.ndarray | list[Tensor] | list[np.ndarray]:
        """Latents -> images.

        Args:
            latents: (B, C, h, w), or a list of such tensors, as `encode` gave them.
            size: (height, width) to crop to, or a list with one for each image; None keeps the padding.
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
        images = [
            image for batch in batches for image in self._decode_raw(self.space.denormalize, batch, tile)
        ]
        return as_output(self._crop(images, size), output_type)

    @ignoring_caller_settings()
    def encode_indices(self, images: ImageLike | Sequence[ImageLike]) -> list[Tensor]:
        """Images of one size -> codebook indices: a list of int64 grids (B, h, w), top level first.

        There is one grid for each level of a HierarchicalVQ, and one for every other discrete codec.

        Raises:
            ValueError: if the codec has no codebook, or for images of different sizes.
        """
        self._check_discrete()
        batches = self._image_batches(images)
        if len(batches) > 1:
            raise ValueError(
                "the images differ in size, and one grid cannot hold them; encode them one by one"
            )
        if self._is_hierarchical:
            with self._precision() as dtype:
                return self.autoencoder.encode_indices(batches[0].to(dtype))
        if isinstance(self.autoencoder, AutoencoderVQ):
            return [self.autoencoder.encode_indices(batches[0])]  # in float32, whatever the codec's dtype
        return [self._assign(self._encode_raw(batches[0], sample=False, generator=None, tile=None))]

    @ignoring_caller_settings()
    def decode_indices(
        self,
        grids: Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | Tensor | np.ndarray | list[Tensor] | list[np.ndarray]:
        """Codebook indices, a list of int64 grids (B, h, w), top level first -> images, as `decode` gives them.

        Of a HierarchicalVQ's grids the lower ones may be left out: their mean codeword stands in.

        Raises:
            ValueError: if the codec has no codebook, or for grids of another form or out of its range.
        """
        self._check_discrete()
        for grid in grids:
            check_dense(grid, "indices")
        if self._is_hierarchical:  # which looks at the grids itself
            with self._precision():
                images = self.autoencoder.decode_indices([grid.to(self.device) for grid in grids])
            self._check_finite(images, "images")
            images = images.float().clamp(-1, 1)
        else:
            images = self._decode_raw(self._codewords, self._single_grid(grids), tile=None)
        return as_output(self._crop(list(images), size), output_type)

    def _image_batches(self, images: ImageLike | Sequence[ImageLike]) -> list[Tensor]:
        """Images of any kind -> padded batches (N, C, H, W): one where all sizes agree, else one for each."""
        device = self.device  # asked once: diffusers walks through all modules for it
        singles = [image.to(device) for each in _listed(images) for image in self._to_images(each)]
        if not singles:
            raise ValueError("no image came; give at least one")
        sizes = {image.shape[-2:] for image in singles}
        batches = [torch.stack(singles)] if len(sizes) == 1 else [image[None] for image in singles]
        return [pad_to_multiple(batch, side_multiple(self.autoencoder)) for batch in batches]

    def _to_images(self, image: ImageLike) -> list[Tensor]:
        """One image, or a batch as array or tensor -> images (C, H, W)."""
        if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4:
            return [to_image(each, channels=self.channels) for each in image]
        return [to_image(image, channels=self.channels)]

    def _check_latents(self, latents: Tensor) -> None:
        check_floating(latents, "latents")
        if latents.ndim != 4 or latents.shape[1] != self.space.channels or 0 in latents.shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} came; {self.name} takes (B, {self.space.channels}, h, w)"
            )
        if not torch.isfinite(latents.float()).all():
            raise ValueError("the latents hold NaN or infinity; look at where they were made")

    def _single_grid(self, grids: Sequence[Tensor]) -> Tensor:
        if isinstance(grids, Tensor) or len(grids) != 1:
            came = "a tensor" if isinstance(grids, Tensor) else f"{len(grids)} grids"
            raise ValueError(f"{came} came; {type(self.autoencoder).__name__} takes a list of one grid")
        (indices,), (codebook_size,) = grids, self.codebook_sizes
        if indices.ndim != 3 or indices.dtype != torch.int64:
            raise ValueError(
                f"indices are {indices.dtype} of shape {tuple(indices.shape)}; an int64 grid (B, h, w) is needed"
            )
        if indices.numel() and not 0 <= indices.min() <= indices.max() < codebook_size:
            raise ValueError(
                f"indices run from {indices.min()} to {indices.max()}; the codebook has 0 to {codebook_size - 1}"
            )
        return indices

    def _check_discrete(self) -> None:
        if not self.is_discrete:
            raise ValueError(
                f"{self.name} is of the class {type(self.autoencoder).__name__}, which has no codebook; use encode and decode"
            )

    def _encode_raw(
        self, images: Tensor, sample: bool, generator: torch.Generator | None, tile: int | None
    ) -> Tensor:
        output = self._encoder_output(images, tile)
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            return posterior.sample(generator) if sample else posterior.mode()
        if sample:
            raise ValueError(
                f"{type(self.autoencoder).__name__} has no posterior to sample from; leave sample=False"
            )
        return output.latents if "latents" in output else output.latent

    def _encoder_output(self, images: Tensor, tile: int | None):
        with self._tiling(tile), self._precision() as dtype:
            images = images.to(self.device, dtype)
            if tile is not None and has_exact_tiles(self.autoencoder):
                return encode_tiled(self.autoencoder, images, tile)
            return self.autoencoder.encode(images)

    def _decode_raw(self, to_raw, codes: Tensor, tile: int | None) -> Tensor:
        """`to_raw` turns latents or indices into raw latents, in the precision that decodes them."""
        with self._tiling(tile), self._precision() as dtype:
            codes = codes.to(self.device, dtype if codes.is_floating_point() else None)
            raw_latents = to_raw(codes)
            if tile is not None and has_exact_tiles(self.autoencoder):
                codewords = self._codewords(self._assign(raw_latents)) if self.is_discrete else raw_latents
                images = decode_tiled(self.autoencoder, codewords, tile)
            elif not self.is_discrete or self._is_hierarchical:
                images = self.autoencoder.decode(raw_latents).sample
            elif is_movq(self.autoencoder):
                images = self.autoencoder.decode(raw_latents, force_not_quantize=True).sample
            else:
                images = self._decode_grid(self._assign(raw_latents) if codes.is_floating_point() else codes)
        self._check_finite(images, "images")
        return images.float().clamp(-1, 1)

    def _decode_grid(self, indices: Tensor) -> Tensor:
        """VQModel.decode in any dtype: its own search for the nearest codeword has no half-precision form on CPUs."""
        autoencoder = self.autoencoder
        if autoencoder.config.lookup_from_codebook:
            shape = (*indices.shape, self.space.channels)
            return autoencoder.decode(indices, force_not_quantize=True, shape=shape).sample
        return autoencoder.decode(self._codewords(indices), force_not_quantize=True).sample

    def _assign(self, raw_latents: Tensor) -> Tensor:
        """Indices (B, h, w), scored in float32: bfloat16 rounding can change which codeword wins."""
        if isinstance(self.autoencoder, AutoencoderVQ):
            return self.autoencoder.quantize.assign(raw_latents)
        vectors = raw_latents.permute(0, 2, 3, 1)
        codebook = self.autoencoder.quantize.embedding.weight
        return nearest_codewords(vectors.flatten(0, 2), codebook).view(vectors.shape[:3])

    def _codewords(self, indices: Tensor) -> Tensor:
        return self.autoencoder.quantize.embedding(indices).permute(0, 3, 1, 2).contiguous()

    @contextmanager
    def _precision(self) -> Iterator[torch.dtype]:
        """The dtype to compute in: float32 while a float16 codec says force_upcast, as SDXL's pipelines do."""
        if self.dtype != torch.float16 or not self.autoencoder.config.get("force_upcast"):
            yield self.dtype
            return
        to_precision(self.autoencoder, torch.float32)
        try:
            yield torch.float32
        finally:
            to_precision(self.autoencoder, torch.float16)

    @contextmanager
    def _tiling(self, tile: int | None) -> Iterator[None]:
        """Check `tile`; where tiles are diffusers' own, switch them on, with an overlap of a quarter."""
        if tile is None:
            yield
            return
        if not isinstance(tile, Integral) or isinstance(tile, bool) or tile < 1:
            raise ValueError(f"tile is {tile!r}; it is an integer of pixels, at least 1, or None")
        if has_exact_tiles(self.autoencoder):
            yield
            return
        autoencoder, factor = self.autoencoder, self.space.downsampling_factor
        kind = supported_class(type(autoencoder))
        if kind == "AutoencoderKLKVAE":
            wanted = {"tile_sample_min_size": tile, "tile_latent_min_size": tile // factor}
            wanted["tile_overlap_factor"] = 0.25
        elif kind == "AutoencoderDC":
            wanted = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
            wanted |= {f"tile_sample_stride_{side}": tile * 3 // 4 for side in ("height", "width")}
            wanted |= {f"tile_latent_min_{side}": tile // factor for side in ("height", "width")}
        else:
            raise ValueError(f"diffusers cannot tile {type(autoencoder).__name__} reliably; leave tile=None")
        if tile < 4 * factor or tile % (4 * factor):
            raise ValueError(f"tile is {tile}; {self.name} needs a multiple of {4 * factor} pixels")
        wanted["use_tiling"] = True
        before = {key: getattr(autoencoder, key) for key in wanted}
        try:
            vars(autoencoder).update(wanted)
            yield
        finally:
            vars(autoencoder).update(before)

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
            raise ValueError(f"{len(sizes)} sizes came for {len(images)} images")
        factor = side_multiple(self.autoencoder)
        for image, (height, width) in zip(images, sizes):
            full_height, full_width = image.shape[-2:]
            if -(-height // factor) * factor != full_height or -(-width // factor) * factor != full_width:
                raise ValueError(
                    f"size (height, width) = ({height}, {width}) does not belong to these latents, which decode to "
                    f"{full_height}x{full_width}; height may be {full_height - factor + 1} to {full_height}, "
                    f"width {full_width - factor + 1} to {full_width}"
                )
        return [image[:, :height, :width] for image, (height, width) in zip(images, sizes)]


def decodes_codewords(codec: LatentCodec) -> bool:
    """Whether indices hold all that `decode` shows: not of MoVQ, whose latents are decoded unquantised."""
    return codec.is_discrete and not is_movq(codec.autoencoder)


def to_precision(autoencoder: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convert an autoencoder's weights in place, but for the parts that its class keeps in float32."""
    kept = getattr(autoencoder, "_keep_in_fp32_modules", None) or ()
    for name, part in autoencoder.named_children():
        torch.nn.Module.to(part, dtype=torch.float32 if name in kept else dtype)
    return autoencoder


def _listed(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, list | tuple):
        return list(images)
    return [images]


def as_output(
    images: list[Tensor], output_type: str
) -> list[Image.Image] | Tensor | np.ndarray | list[Tensor] | list[np.ndarray]:
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


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and float32 values."""
    return digest(tensor.detach().to("cpu", torch.float32).numpy())


def _usable_device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device("cpu" if device is None else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device} cannot be used here: {reason}") from error
    return device
