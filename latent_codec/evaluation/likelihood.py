"""The likelihood of images under priors, compared with simpler entropy models.

    images --codec--> index maps, top first --+--prior of each level--> nats --> bits per index, bits per dim
    latent files -----------------------------+--shares of the values--> order-0 entropy

The bits are the code length of an ideal arithmetic coder.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.reconstruction import BATCH_PIXELS
from latent_codec.files import plain
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.labels import Images, class_of
from latent_codec.images.sources import spread
from latent_codec.latents.encoded_images import EncodedImages
from latent_codec.models.autoregressive import AutoregressivePrior
from latent_codec.torch_settings import ignoring_caller_settings

BATCH_POSITIONS = 2**13
"""Batches of a prior have at most this many positions, whose attention is quadratic in an image's."""


@dataclass(frozen=True, kw_only=True)
class LevelLikelihood:
    """What the indices of one level cost. An index is one of the codebook, or one channel's value at a position."""

    level: int
    """0 is the top."""
    prior: str
    """Its class."""
    num_values: int
    """K: how many values an index can have."""
    first_grid: tuple[int, int]
    """Height and width of the first image's index map."""
    num_positions: int
    num_indices: int
    """Positions times channels."""
    bits_per_index: float
    """-log2 p(index | those before it, condition, class), the mean."""
    perplexity: float | None
    """2^bits_per_index; None beyond what a number holds."""
    order_0_bits_per_index: float
    """Entropy of the shares of these indices, per channel: the code length under a static (order-0) model."""
    uniform_bits_per_index: float
    """log2 K."""
    bits_per_dim: float
    """Bits of the level, per value of the images."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What `measure_likelihood` found. Bits per dim are bits of all these levels, over channels x height x width."""

    kind: str
    """What the indices are: "codes", "pixels" or "latents"."""
    codec: str | None
    space_fingerprint: str | None
    device: str
    label: str | None
    """Which label was the class; None for priors without classes."""
    levels: list[LevelLikelihood]
    num_images: int
    num_dims: int
    """Values of the images without padding: channels times pixels."""
    bits_per_dim: float
    order_0_bits_per_dim: float
    uniform_bits_per_dim: float
    notes: list[str]
    """What to know before these figures are compared with others."""
    skipped: list[str]
    """One line for each image that could not be read, naming it and the reason."""

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return plain(asdict(self))


@ignoring_caller_settings()
def measure_likelihood(
    priors: Sequence[AutoregressivePrior],
    images: Images,
    codec: LatentCodec | None = None,
    *,
    label: str = "class",
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Measure the negative log-likelihood of images' indices, latents or pixels.

    Images are encoded whole, in their own size, padded as the codec does it. A lower level's condition is what
    the codec says of the levels above it. Images that cannot be read are left out and listed.

    Args:
        priors: of every level, top first, or of a single one. Classes may be missing in some.
        images: to be encoded here, or encoded ones; a prior over pixels takes them as they are.
        codec: whose indices or latents they are; None for pixels.
        label: of priors with classes: "class" where a label is a number, else the name of an attribute.
        limit: at most N images, spread evenly; None means all.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: if priors, codec, images and labels do not belong together, naming both sides, or if no image
            could be read.
    """
    kind = priors[0].config.get("data", "codes")
    levels = _levels(priors, codec)
    notes = [note for level, prior in levels.items() for note in _check_fits(prior, codec, level)]
    _check_encoded(images, codec, kind)
    if codec is not None and len(levels) < len(codec.codebook_sizes):
        notes.append(
            f"bits per dim are only those of level {min(levels)}, of {len(codec.codebook_sizes)} levels"
        )
    has_classes = any(prior.config.num_classes for prior in priors)
    meters = {level: _LevelMeter(level, prior) for level, prior in levels.items()}
    numbers = spread(len(images), limit)
    channels = priors[0].data_channels if codec is None else codec.channels
    num_done, num_dims = 0, 0
    skipped: list[str] = []
    values = _values(images, numbers, channels, skipped)
    for batch, *stacked in batch_by_shape(values, max_pixels=BATCH_PIXELS):
        index_maps = _encode(images, stacked, priors[0], codec)
        labels = None
        if has_classes:
            labels = torch.tensor([_class(images, number, label, priors) for number in batch])
        for level, meter in meters.items():
            meter.add(index_maps[: level + 1], labels, codec)
        num_done += len(batch)
        if isinstance(images, EncodedImages):
            num_dims += channels * sum(math.prod(images.size(number)) for number in batch)
        else:
            num_dims += stacked[0].numel()
        if on_progress:
            on_progress(num_done + len(skipped), len(numbers))
    if not num_done:
        raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")

    found = [meter.likelihood(num_dims) for meter in meters.values()]
    order_0 = sum(level.order_0_bits_per_index * level.num_indices for level in found)
    uniform = sum(level.uniform_bits_per_index * level.num_indices for level in found)
    return Likelihood(
        kind=kind,
        codec=None if codec is None else codec.name,
        space_fingerprint=None if codec is None else codec.space_fingerprint,
        device=str(priors[0].device),
        label=label if has_classes else None,
        levels=found,
        num_images=num_done,
        num_dims=num_dims,
        bits_per_dim=sum(level.bits_per_dim for level in found),
        order_0_bits_per_dim=order_0 / num_dims,
        uniform_bits_per_dim=uniform / num_dims,
        notes=notes,
        skipped=skipped,
    )


class _LevelMeter:
    """Adds up a level's nats, and counts its values channel by channel."""

    def __init__(self, level: int, prior: AutoregressivePrior):
        self.level, self.prior = level, prior
        self.nats = 0.0
        self.counts = torch.zeros(prior.data_channels, prior.num_values, dtype=torch.int64)
        self.first_grid: tuple[int, int] | None = None

    def add(self, index_maps: list[Tensor], labels: Tensor | None, codec: LatentCodec | None) -> None:
        """Count in a batch: index maps of the levels down to this one, top first, and classes."""
        prior, device = self.prior, self.prior.device
        *above, values = index_maps
        self.first_grid = self.first_grid or tuple(values.shape[-2:])
        by_channel = values.movedim(1, 0).flatten(1) if prior.has_channels else values.flatten()[None]
        for counts, channel in zip(self.counts, by_channel):
            counts += torch.bincount(channel, minlength=len(counts)).cpu()
        for part in torch.arange(len(values)).split(max(BATCH_POSITIONS // math.prod(values.shape[-2:]), 1)):
            condition = None
            if prior.config.condition_codebook_size is not None:
                condition = above[-1][part].to(device)
            elif prior.config.condition_channels is not None:
                upper = [indices[part].to(codec.device) for indices in above]
                condition = codec.autoencoder.upper_features(upper).to(device)
            classes = None if prior.config.num_classes is None else labels[part].to(device)
            self.nats -= float(prior.log_prob(values[part].to(device), condition, classes).double().sum())

    def likelihood(self, num_dims: int) -> LevelLikelihood:
        bits, num_indices = self.nats / math.log(2), int(self.counts.sum())
        if not math.isfinite(bits):
            raise ValueError(
                f"the prior of level {self.level} gives {bits} bits: its weights are damaged, or these are not the indices "
                "that it knows."
            )
        shares = self.counts.double() / self.counts.sum(1, keepdim=True)
        per_index = bits / num_indices
        return LevelLikelihood(
            level=self.level,
            prior=type(self.prior).__name__,
            num_values=self.prior.num_values,
            first_grid=self.first_grid,
            num_positions=num_indices // len(self.counts),
            num_indices=num_indices,
            bits_per_index=per_index,
            perplexity=2**per_index if per_index < 1024 else None,
            order_0_bits_per_index=float(torch.special.entr(shares).sum(1).mean()) / math.log(2),
            uniform_bits_per_index=math.log2(self.prior.num_values),
            bits_per_dim=bits / num_dims,
        )


def _levels(
    priors: Sequence[AutoregressivePrior], codec: LatentCodec | None
) -> dict[int, AutoregressivePrior]:
    """Priors by level; that of a single one follows from its condition."""
    if len(priors) == 1:
        return {_level_of(priors[0], codec): priors[0]}
    if codec is None or len(priors) != len(codec.codebook_sizes):
        whose = "no codec" if codec is None else f"{codec.name} has {len(codec.codebook_sizes)} levels"
        raise ValueError(f"expected one prior for each level, or one, got {len(priors)}: {whose}")
    return dict(enumerate(priors))


def _level_of(prior: AutoregressivePrior, codec: LatentCodec | None) -> int:
    codes, channels = prior.config.condition_codebook_size, prior.config.condition_channels
    if codes is None and channels is None:
        return 0
    sizes = codec.codebook_sizes if codec is not None else []
    lower = range(1, len(sizes))
    if codes is None:
        fitting = [level for level in lower if codec.autoencoder.condition_channels(level) == channels]
    else:
        fitting = [level for level in lower if (sizes[level - 1], sizes[level]) == (codes, prior.num_values)]
    if len(fitting) == 1:
        return fitting[0]
    whose = f"{codec.name}, whose codebooks have {sizes}" if codec is not None else "no codec"
    if fitting:
        raise ValueError(
            f"the prior may be that of level {' or '.join(map(str, fitting))} of {whose}; join the priors of all levels to a "
            "pipeline (latent-codec pipeline), which tells them apart."
        )
    raise ValueError(
        f"the prior was made for a condition, {prior.condition_network.expected}, and {whose}, has no level with that above "
        "it; give the codec that it was trained with."
    )


def _check_fits(prior: AutoregressivePrior, codec: LatentCodec | None, level: int) -> list[str]:
    """Refuse a codec whose indices a prior cannot read; notes say what is doubtful."""
    kind = prior.config.get("data", "codes")
    told = f"the prior, a {type(prior).__name__} over {kind}"
    if kind == "pixels":
        if codec is not None:
            raise SettingError("codec", f"none for {told}", codec.name, advice="leave out `codec`")
        return []
    if codec is None:
        raise SettingError("codec", f"the codec that {told} was trained with")
    if (kind == "codes") != codec.is_discrete:
        has = f"{len(codec.codebook_sizes)} codebook(s)" if codec.is_discrete else "no codebook"
        raise ValueError(f"{told}, does not fit {codec.name}, which has {has}.")
    if kind == "codes":
        theirs, ours, what = codec.codebook_sizes[level], prior.num_values, f"codewords on level {level}"
    else:
        theirs, ours, what = codec.latent_space.channels, prior.data_channels, "latent channels"
    if theirs != ours:
        raise ValueError(
            f"{told} knows {ours} {what}, and {codec.name} has {theirs}; give the codec that it was trained with."
        )
    if (prior.condition_network is not None) != (level > 0):
        needs = f"takes {prior.condition_network.expected}" if level == 0 else "takes no condition"
        raise ValueError(f"expected the priors top first, got {told}, for level {level}, which {needs}.")
    known = prior.config.space_fingerprint
    if known in (None, codec.space_fingerprint):
        return []
    return [
        f"the prior of level {level} learned the indices of a codec with space {known}, and {codec.name} has space "
        f"{codec.space_fingerprint}: they may mean something else"
    ]


def _check_encoded(images: Images, codec: LatentCodec | None, kind: str) -> None:
    if not isinstance(images, EncodedImages):
        return
    holds = "indices" if images.is_discrete else "latents"
    if codec is None:
        raise ValueError(
            f"the files hold {holds} of {images.codec_name}, and the prior is over pixels; give images."
        )
    if images.space_fingerprint != codec.space_fingerprint:
        raise ValueError(
            f"the files hold {holds} of {images.codec_name} (space {images.space_fingerprint}), not of {codec.name} "
            f"(space {codec.space_fingerprint})."
        )
    if images.is_discrete != (kind == "codes"):
        raise ValueError(
            f"the files hold {holds} of {codec.name}, and the prior is over {kind}; encode the other kind."
        )


def _class(images: Images, number: int, label: str, priors: Sequence[AutoregressivePrior]) -> int:
    """An image's class, which all priors with classes know."""
    found = class_of(images, number, label, setting="label")
    num_classes = min(prior.config.num_classes for prior in priors if prior.config.num_classes is not None)
    if found >= num_classes:
        raise ValueError(
            f"{images.name(number)} is of class {found}, and the prior has classes 0 to {num_classes - 1}; are these the "
            "labels that it was trained with?"
        )
    return found


def _values(
    images: Images, numbers: list[int], channels: int, skipped: list[str]
) -> Iterator[tuple[int, Tensor] | tuple[int, *tuple[Tensor, ...]]]:
    """The index of an image, and its index maps, latents or pixels; unreadable ones go to `skipped`."""
    if not isinstance(images, EncodedImages):
        yield from iter_images(images, channels=channels, indices=numbers, on_skip=skipped.append)
        return
    for number in numbers:
        yield number, *(images.indices(number) if images.is_discrete else [images.latents(number)])


def _encode(
    images: Images, values: list[Tensor], prior: AutoregressivePrior, codec: LatentCodec | None
) -> list[Tensor]:
    """A batch of `_values` -> int64 index maps as priors take them, top level first."""
    if not isinstance(images, EncodedImages):
        if codec is None:
            return [values[0].add(1).mul(127.5).round().to(torch.int64)]
        pixels = values[0].to(codec.device)
        values = codec.encode_indices(pixels) if codec.is_discrete else [codec.encode(pixels)]
    if values[0].is_floating_point():
        return [prior.encode_latents(values[0].float())]
    return values
