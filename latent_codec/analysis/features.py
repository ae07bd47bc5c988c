"""Features: one vector per image, of its latents, its codes or a layer of the encoder.

images --codec, or a layer of its encoder--> maps (C, h, w) --whole | mean-std | pyramid--> vectors (D,)
       --codec--> indices of each level ------------------------------------- histogram ----^
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.components.weight_files import FEATURES, metadata_of
from latent_codec.errors import SettingError
from latent_codec.evaluation.one_vector import fit_image, vector_side
from latent_codec.evaluation.reconstruction import BATCH_PIXELS
from latent_codec.files import check_is_file, named_in_utf8, replacing
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.labels import class_in
from latent_codec.images.sources import Data, ImageSource, open_source, spread
from latent_codec.latents.data_set import LatentDataset
from latent_codec.torch_settings import ignoring_caller_settings

POOLINGS = ("whole", "mean-std", "pyramid", "histogram")
PYRAMID = (1, 2, 4)
VERSION = "1"
_ADVICE = {
    "whole": "`pooling=mean-std` takes images of any size",
    "pyramid": "`pooling=mean-std` takes grids of any size",
    "histogram": "`pooling=mean-std` takes codecs without a codebook",
}

Label = int | dict | None


@dataclass(frozen=True, kw_only=True)
class Features:
    """A vector for each image, and which codec it is from."""

    names: list[str]
    """Of the images in their source."""
    indices: list[int]
    """Of the images in their source."""
    vectors: Tensor
    """float32 (N, D), on the CPU."""
    labels: list[Label]
    """A class, a dict of attributes, or None where an image has no label."""
    codec: str
    space_fingerprint: str
    fingerprint: str
    pooling: str
    """One of POOLINGS."""
    layer: str | None = None
    """Of the encoder; None: the latents."""
    side: int | None = None
    """What images were resized to; None: as `fit_image` does it by itself."""
    skipped: list[str] = field(default_factory=list)
    """One line for each image that could not be read, naming it and the reason."""

    def classes(self, key: str = "class") -> Tensor:
        """The class of each image, int64 (N,), as `images.labels.class_in` reads it from the labels.

        Raises:
            ValueError: if an image has no such label, naming it.
        """
        pairs = zip(self.labels, self.names)
        return torch.tensor([class_in(label, key, name, setting="label") for label, name in pairs])

    def some(self, mask: Tensor) -> "Features":
        """Those where a mask, bool (N,), is True."""
        places = mask.nonzero().flatten().tolist()
        chosen = {
            key: [getattr(self, key)[place] for place in places] for key in ("names", "indices", "labels")
        }
        return replace(self, vectors=self.vectors[places], **chosen)

    def check(self, codec: LatentCodec) -> None:
        """Refuse a codec with another latent space.

        Raises:
            ValueError: naming both.
        """
        if self.space_fingerprint != codec.space_fingerprint:
            raise ValueError(
                f"these are features of {self.codec} (space {self.space_fingerprint}), not of {codec.name} (space "
                f"{codec.space_fingerprint}); use the codec {self.codec}"
            )

    def to_dict(self) -> dict:
        """Plain data for JSON, without the vectors."""
        return {
            "codec": self.codec,
            "space_fingerprint": self.space_fingerprint,
            "fingerprint": self.fingerprint,
            "pooling": self.pooling,
            "layer": self.layer,
            "side": self.side,
            "num_images": len(self.names),
            "num_features": self.vectors.shape[1],
            "skipped": self.skipped,
        }


def extract_features(
    data: Data | ImageSource,
    codec: str | os.PathLike | LatentCodec = "default",
    *,
    pooling: str | None = None,
    layer: str | None = None,
    side: int | None = None,
    limit: int | None = None,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Make a vector of each image: `latent_codec.extract_features("photos/").vectors`.

    Latents are posterior means, scaled and shifted as a denoiser sees them. Images that cannot be read are left
    out and listed.

    Args:
        data: images as `open_source` takes them, or an open source.
        codec: an open one, or what `LatentCodec.from_pretrained` takes.
        pooling: how the latents of an image, C channels on a grid, become a vector:
            "whole": as they are, C h w numbers; of images of one size;
            "mean-std": mean and standard deviation of each channel, 2 C numbers;
            "pyramid": the means of each channel in 1x1, 2x2 and 4x4 cells, 21 C numbers;
            "histogram": the share of each codeword among an image's indices, level by level, top first.
            None: "whole" of a grid of 1x1, else "histogram" of codecs with a codebook, else "mean-std".
        layer: a module of the encoder whose output takes the place of the latents, such as "mid_block".
        side: resize images and cut them to squares of this side; None: as `fit_image` does it by itself.
        limit: at most N images, spread evenly; None means all.
        split: of data that has splits.
        on_progress: called with (images done, images in all).

    Raises:
        SettingError: for a pooling or layer that the codec or the images do not have.
        ValueError: if there are no such data or codec, no image could be read, or features are not finite.
    """
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    codec = codec if isinstance(codec, LatentCodec) else LatentCodec.from_pretrained(codec)
    if pooling not in (None, *POOLINGS):
        raise SettingError("pooling", f"one of {', '.join(POOLINGS)}", pooling)
    if pooling == "histogram" and (layer is not None or not codec.is_discrete):
        has = "a layer has no codewords" if layer is not None else f"{codec.name} has no codebook"
        raise SettingError("pooling", f"another, as {has}", pooling, advice=_ADVICE[pooling])
    skipped: list[str] = []
    chosen = spread(len(source), limit)
    images = iter_images(
        source, channels=codec.channels, indices=chosen, on_skip=skipped.append, on_progress=on_progress
    )
    images = ((index, fit_image(image, codec, side)) for index, image in images)
    indices: list[int] = []
    parts: list[Tensor] = []
    with ignoring_caller_settings(), _watching(codec, layer) as encode:
        for batch_indices, batch in batch_by_shape(images, max_pixels=BATCH_PIXELS):
            pooling = pooling or _usual_pooling(codec, batch, layer)
            if pooling == "histogram":
                part = _histograms(codec.encode_indices(batch), codec.codebook_sizes)
            else:
                part = _pooled(encode(batch), pooling)
            if parts and part.shape[1] != parts[0].shape[1]:
                raise SettingError(
                    "pooling",
                    f"images of one size for {pooling}",
                    f"vectors of {parts[0].shape[1]} and {part.shape[1]} numbers",
                    advice=_ADVICE[pooling],
                )
            indices += batch_indices
            parts.append(part.cpu())
    if pooling is None or not parts:
        raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")
    names = [source.name(index) for index in indices]
    vectors = torch.cat(parts)
    _check_finite(vectors, names)
    return Features(
        names=names,
        indices=indices,
        vectors=vectors,
        labels=[source.label(index) for index in indices],
        codec=codec.name,
        space_fingerprint=codec.space_fingerprint,
        fingerprint=codec.fingerprint,
        pooling=pooling,
        layer=layer,
        side=side,
        skipped=skipped,
    )


def features_of_latents(
    dataset: LatentDataset,
    *,
    pooling: str | None = None,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Make a vector of each sample of a data set of latents, which needs no codec.

    Latents are the posterior's means where those are stored.

    Args:
        pooling, limit, on_progress: as for `extract_features`.

    Raises:
        SettingError: for a pooling that the latents do not have.
    """
    index = dataset.index
    usual = "histogram" if dataset.is_discrete else None
    if pooling not in (None, usual, *(() if dataset.is_discrete else POOLINGS[:3])):
        has = "indices, which have a histogram" if dataset.is_discrete else "latents, which have no codewords"
        raise SettingError("pooling", f"another, as {index.location} holds {has}", pooling)
    pooling = pooling or usual
    chosen = spread(len(dataset), limit)
    names, labels, vectors = [], [], []
    for done, number in enumerate(chosen, 1):
        sample = dataset[number]
        if dataset.is_discrete:
            vector = _histograms([level[None] for level in sample["indices"]], index.codebook_sizes)
        else:
            latents = sample["latents"][None]
            pooling = pooling or ("whole" if latents.shape[2:] == (1, 1) else "mean-std")
            vector = _pooled(latents, pooling)
        if vectors and vector.shape != vectors[0].shape:
            got = f"vectors of {vectors[0].shape[1]} and {vector.shape[1]} numbers"
            raise SettingError("pooling", f"latents of one size for {pooling}", got, advice=_ADVICE[pooling])
        names.append(sample.get("name", sample.get("key")))
        labels.append(dataset.label(number))
        vectors.append(vector)
        if on_progress:
            on_progress(done, len(chosen))
    return Features(
        names=names,
        indices=chosen,
        vectors=torch.cat(vectors),
        labels=labels,
        codec=index.codec_name,
        space_fingerprint=index.space_fingerprint,
        fingerprint=index.fingerprint,
        pooling=pooling,
    )


def check_vector_side(codec: LatentCodec, what: str) -> int:
    """`vector_side` of a codec that has one.

    Args:
        what: it is for, such as "an attribute".

    Raises:
        ValueError: for a codec with a larger grid of latents, saying which codecs have one vector per image.
    """
    side = vector_side(codec)
    if side is None:
        raise ValueError(
            f"{what} needs a codec with one vector per image, and {codec.name} has a grid of latents; take the shipped codec "
            "garments, or train one by the preset fashion-mnist-global or faces-global"
        )
    return side


def hold_out_of_each(classes: Tensor, share: float, seed: int, *, at_least: int = 0) -> Tensor:
    """A mask of the images to test on, bool (N,): a share of each class, rounded, but never a whole class."""
    generator = torch.Generator().manual_seed(seed)
    is_held_out = torch.zeros(len(classes), dtype=torch.bool)
    for each in classes.unique():
        places = (classes == each).nonzero().flatten()
        count = min(max(round(share * len(places)), at_least), len(places) - 1)
        is_held_out[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return is_held_out


def save_features(features: Features, path: str | os.PathLike) -> None:
    """Write features as safetensors: `vectors` (N, D) and `indices` (N,); names, labels and the codec in the metadata.

    Raises:
        OSError: if it cannot be written.
    """
    told = {
        key: value for key, value in vars(features).items() if key not in ("indices", "vectors", "skipped")
    }
    metadata = {"format": FEATURES, "version": VERSION, "features": json.dumps(told, default=str)}
    tensors = {"vectors": features.vectors.contiguous(), "indices": torch.tensor(features.indices)}
    with replacing(path) as written:
        written.write_bytes(save(tensors, metadata))


def load_features(path: str | os.PathLike) -> Features:
    """Read what `save_features` wrote.

    Raises:
        ValueError: for a file that holds no features, is damaged, or of a newer version.
        OSError: if it cannot be read.
    """
    path = Path(path)
    check_is_file(path)
    metadata = metadata_of(path)
    if metadata.get("format") != FEATURES:
        raise ValueError(f"{path} holds no features; `latent-codec features` writes a file that does")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {metadata.get('version')} of a file of features; this latent-codec reads version "
            f"{VERSION}. Update it."
        )
    try:
        with named_in_utf8(path) as name:
            tensors = load_file(name)
        features = Features(
            vectors=tensors["vectors"].float(),
            indices=tensors["indices"].tolist(),
            **json.loads(metadata["features"]),
        )
        count = len(features.vectors)
        if features.vectors.ndim != 2 or features.pooling not in POOLINGS:
            raise ValueError("its vectors are no vectors of images")
        if not count == len(features.indices) == len(features.names) == len(features.labels):
            raise ValueError("names, labels and vectors differ in number")
        _check_finite(features.vectors, features.names)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return features


def write_csv(features: Features, path: str | os.PathLike) -> None:
    """Write features as a table: `name`, `label` (a number, or attributes as JSON), `feature_0`, `feature_1`, ...

    Raises:
        OSError: if it cannot be written.
    """
    headings = ["name", "label", *(f"feature_{number}" for number in range(features.vectors.shape[1]))]
    with (
        replacing(path) as written,
        open(written, "w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(headings)
        for name, label, vector in zip(features.names, features.labels, features.vectors.tolist()):
            text = "" if label is None else json.dumps(label, default=str)
            rows.writerow([name, text, *(f"{value:.8g}" for value in vector)])


@contextmanager
def _watching(codec: LatentCodec, layer: str | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that makes maps (B, C, h, w) of images: the latents, or the output of a layer of the encoder."""
    if layer is None:
        yield lambda images: codec.encode_all(images).latents
        return
    seen: list = []
    handle = _find_layer(codec, layer).register_forward_hook(lambda *call: seen.append(call[-1]))

    def encode(images: Tensor) -> Tensor:
        seen.clear()
        codec.encode_all(images)
        if not seen:
            raise SettingError("layer", "one that takes part in encoding", layer, advice=_layers(codec))
        if len(seen) == len(images):  # an autoencoder that encodes a batch one by one
            return torch.cat([_as_maps(each, layer, 1) for each in seen])
        return _as_maps(seen[-1], layer, len(images))

    try:
        yield encode
    finally:
        handle.remove()


def _find_layer(codec: LatentCodec, layer: str) -> torch.nn.Module:
    modules = dict(codec.autoencoder.named_modules())
    for name in (layer, f"encoder.{layer}"):
        if layer and name in modules and not codec.is_of_decoder(f"{name}."):
            return modules[name]
    raise SettingError("layer", "a module of the encoder", layer, advice=_layers(codec))


def _layers(codec: LatentCodec) -> str:
    own = [
        name.removeprefix("encoder.")
        for name, module in codec.autoencoder.named_modules()
        if name and not isinstance(module, torch.nn.ModuleList) and not codec.is_of_decoder(f"{name}.")
    ]
    short = [name for name in own if name.count(".") <= 1]
    return f"{codec.name} has {', '.join(short[:16])}{', ...' if len(short) > 16 else ''}"


def _as_maps(output, layer: str, count: int) -> Tensor:
    """What a layer gives of `count` images -> (B, C, h, w): of a still the one frame, of tokens (B, N, C) a column."""
    found = (
        list(output.values()) if isinstance(output, Mapping) else output
    )  # as models of transformers give it
    found = found if isinstance(found, (tuple, list)) else [found]
    maps = next((each for each in found if isinstance(each, Tensor)), None)
    if maps is not None and maps.ndim == 5:
        maps = maps.flatten(2, 3)
    if maps is not None and maps.ndim == 3:
        maps = maps.transpose(1, 2)[..., None]
    if maps is None or maps.ndim not in (2, 4) or len(maps) != count:
        shape = type(output).__name__ if maps is None else f"shape {tuple(maps.shape)}"
        raise SettingError(
            "layer", "one whose output is a map (B, C, h, w) of each image", f"{layer}: {shape}"
        )
    return maps if maps.ndim == 4 else maps[:, :, None, None]


def _usual_pooling(codec: LatentCodec, images: Tensor, layer: str | None) -> str:
    side = codec.family.side_multiple
    if max(images.shape[-2:]) <= side and layer is None and not codec.is_discrete:
        return "whole"
    return "histogram" if layer is None and codec.is_discrete else "mean-std"


def _pooled(maps: Tensor, pooling: str) -> Tensor:
    """(B, C, h, w) -> (B, D)."""
    maps = maps.float()
    if pooling == "whole":
        return maps.flatten(1)
    if pooling == "mean-std":
        flat = maps.flatten(2)
        return torch.cat((flat.mean(2), flat.std(2, correction=0)), 1)
    height, width = maps.shape[-2:]
    if min(height, width) < max(PYRAMID):
        expected = f"a grid of at least {max(PYRAMID)}x{max(PYRAMID)} for pyramid"
        raise SettingError("pooling", expected, f"{height}x{width}", advice=_ADVICE["pyramid"])
    return torch.cat([F.adaptive_avg_pool2d(maps, side).flatten(1) for side in PYRAMID], 1)


def _histograms(indices: list[Tensor], codebook_sizes: list[int]) -> Tensor:
    """Index maps of each level, (B, h, w) -> the share of each codeword of each level, (B, sum of the sizes)."""
    shares = []
    for level, size in zip(indices, codebook_sizes):
        flat = level.flatten(1)
        counts = torch.zeros(len(flat), size, device=flat.device)
        shares.append(counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype)) / flat.shape[1])
    return torch.cat(shares, 1)


def _check_finite(vectors: Tensor, names: Sequence[str]) -> None:
    bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the features of {names[bad[0]]} hold NaN or infinity; look at where they were made"
        )
