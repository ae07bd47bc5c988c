"""What a data set of latents is to hold, and how its images are cut into shards.

    options = EncodingOptions(container="webdataset", size=512, buckets=True)
    shards = plan_shards(source, options, codec)        # [Shard(name="00000-1f0c9b3a", start=0, stop=1000), ...]

A shard's name is a function of its images' names, the options and the codec: whoever plans the same work, on whatever
machine and however often, gives the same names to the same shards. Batch size, device and precision of the network
are not part of it, since they change no more than rounding.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from latent_codec.errors import SettingError
from latent_codec.images.buckets import Framing
from latent_codec.images.sources import FolderImages, ImageSource

if TYPE_CHECKING:
    from latent_codec.codec import LatentCodec

Container = Literal["webdataset", "parquet", "safetensors"]
Kind = Literal["latents", "indices"]
PosteriorChoice = Literal["mean", "sample", "both"]
StoredDtype = Literal["float32", "float16", "bfloat16"]

SUFFIXES: dict[Container, str] = {"webdataset": ".tar", "parquet": ".parquet", "safetensors": ".safetensors"}


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What each image becomes, and how the results are stored.

    Raises:
        SettingError: for values that do not fit, or not together.
    """

    container: Container = "safetensors"
    kind: Kind = "latents"
    """Indices are of codecs with a codebook."""
    size: int | None = None
    """Side of a square with the area of the images that are encoded, pixels; None: their own sizes."""
    buckets: bool = False
    """Whether images keep their aspect ratio, up to multiples of `bucket_step`; else they become squares of `size`."""
    bucket_step: int = 64
    """What the sides of buckets are multiples of, pixels."""
    upscale: bool = True
    """Whether images smaller than `size` are enlarged."""
    flip: bool = False
    """Whether each image is followed by its mirror image."""
    augment: int = 0
    """Further versions of each image: random windows of it, some of them mirrored."""
    posterior: PosteriorChoice = "mean"
    """What is stored of the posterior: its mean; a sample; both mean and log variance, for a trainer that draws samples."""
    dtype: StoredDtype | None = None
    """Of the latents as they are stored; None: that of the codec, float32 where the container has no bfloat16."""
    labels: bool = True
    """Whether labels are read and stored."""
    images_per_shard: int = 1000
    """Images of the source; what `flip` and `augment` add is not counted."""
    seed: int = 0
    """Of samples and random windows, which are functions of it and the image's name."""

    def __post_init__(self):
        for name, allowed in (
            ("container", get_args(Container)),
            ("kind", get_args(Kind)),
            ("posterior", get_args(PosteriorChoice)),
            ("dtype", (*get_args(StoredDtype), None)),
        ):
            if getattr(self, name) not in allowed:
                listed = ", ".join(each for each in allowed if each)
                raise SettingError(name, f"one of {listed}", getattr(self, name))
        for name, least in (("images_per_shard", 1), ("augment", 0), ("seed", 0), ("bucket_step", 1)):
            if getattr(self, name) < least:
                raise SettingError(name, f"at least {least}", getattr(self, name))
        if self.dtype == "bfloat16" and self.container != "safetensors":
            raise SettingError("dtype", f"float32 or float16, which {self.container} has", self.dtype)
        if self.posterior == "both" and self.container == "safetensors":
            advice = "it holds one tensor for each image; take `container=webdataset`"
            raise SettingError("posterior", "mean or sample of safetensors", self.posterior, advice=advice)
        if self.kind == "indices" and self.posterior != "mean":
            raise SettingError("posterior", "mean where indices are stored", self.posterior)
        if self.buckets and self.size is None:
            raise SettingError("buckets", "a size", advice="add `size=512`")

    @classmethod
    def of_json(cls, entries: Mapping[str, Any]) -> Self:
        """Undo `to_json`; entries of later versions are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in entries.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def suffix(self) -> str:
        """Of a shard's file."""
        return SUFFIXES[self.container]

    def framing(self, multiple: int) -> Framing:
        """How images are brought to their sizes, for a codec whose images have sides that are multiples of `multiple`."""
        step = self.bucket_step if self.buckets else None
        return Framing(size=self.size, step=step, multiple=multiple, upscale=self.upscale)

    def stored_dtype(self, codec: "LatentCodec") -> str:
        if self.dtype is not None:
            return self.dtype
        own = str(codec.dtype).removeprefix("torch.")
        return "float32" if own == "bfloat16" and self.container != "safetensors" else own


@dataclass(frozen=True)
class Shard:
    """Consecutive images of a source, which become one file."""

    name: str
    """Its number and 8 hex digits: of its images' names, the options and the codec."""
    start: int
    stop: int

    @property
    def numbers(self) -> range:
        """Of its images in the source."""
        return range(self.start, self.stop)


def plan_shards(source: ImageSource, options: EncodingOptions, codec: "LatentCodec") -> list[Shard]:
    """Cut a source into shards of `images_per_shard` consecutive images."""
    encoding = encoding_id(options, codec)
    shards = []
    for start in range(0, len(source), options.images_per_shard):
        stop = min(start + options.images_per_shard, len(source))
        listing = hashlib.sha256((encoding + source.reading).encode())
        for number in range(start, stop):
            listing.update(f"\0{stored_name(source, number)}".encode(errors="surrogateescape"))
        shards.append(Shard(f"{len(shards):05d}-{listing.hexdigest()[:8]}", start, stop))
    return shards


def encoding_id(options: EncodingOptions, codec: "LatentCodec") -> str:
    """8 hex digits over the options and the codec: equal for shards that may be in one data set."""
    what = {
        "options": options.to_json() | {"dtype": options.stored_dtype(codec)},
        "codec": [codec.space_fingerprint, codec.fingerprint, codec.pipeline],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def stored_name(source: ImageSource, number: int) -> str:
    """What an image is called in a data set: the source's name of it, below the folder where there is one."""
    name = source.name(number)
    if isinstance(source, FolderImages) and source.root is not None:
        return Path(name).relative_to(source.root).as_posix()  # as good wherever the folder is
    return name
