"""How well a diffusion model trains on a codec's latents: the same small denoiser on the latents of each codec.

images --codec--> latents --DenoiserTraining--> denoiser --at marks: sample--> latents --codec--> images --frechet--> distance

found = measure_diffusability("photos/", ["default", "runs/mine"], seeds=3)
found.steps_to_first("mine")     # of each seed: after how many steps mine is as near as the first codec at the end
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation import denoisers
from latent_codec.evaluation.codec_comparison import check_comparable, distinct_names
from latent_codec.evaluation.cost import device_name
from latent_codec.evaluation.denoisers import DenoiserTraining, sample
from latent_codec.evaluation.diffusability_result import CodecDiffusability, DenoiserCurve, Diffusability
from latent_codec.evaluation.frechet import FeatureNetwork, feature_network, features_of
from latent_codec.files import replacing
from latent_codec.images.batches import iter_images
from latent_codec.images.sources import Data, ImageSource, open_source
from latent_codec.images.tensors import fit_square, to_uint8
from latent_codec.metrics import frechet_distance

MARKS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the steps after which samples are drawn."""
FEWEST_IMAGES = 100
FEWEST_POSITIONS = 4
"""Of latents, along a side: fewer leave a denoiser nothing to put in order."""
NUM_SHOWN = 8
"""Samples that a sheet shows of each codec."""
BATCH = 64

Report = Callable[[int, int, str], None]


def measure_diffusability(
    data: Data | ImageSource,
    codecs: Sequence[str | os.PathLike | LatentCodec],
    *,
    seeds: int = 3,
    steps: int = 2000,
    size: int = 64,
    num_samples: int = 500,
    limit: int | None = None,
    split: str = "train",
    folder: str | os.PathLike | None = None,
    network: FeatureNetwork | None = None,
    on_progress: Report | None = None,
    on_estimate: Callable[[float, int], None] | None = None,
) -> Diffusability:
    """Train the same denoiser on the latents of each codec, and measure how soon its samples look like the images.

    All denoisers have as many tokens, weights (but for those that read and write latents) and steps, and see the same images in the
    same order. Latents are what `LatentCodec.encode` gives.

    Args:
        data: images as `open_source` takes them, or an open source.
        codecs: open, or as `LatentCodec.from_pretrained` takes them.
        seeds: denoisers for each codec.
        steps: of each; 0 trains none, and measures reconstructions and iFID only.
        size: the images are resized and cut to squares of this side.
        num_samples: of each denoiser at each mark, and of reconstructions; at most as many as images.
        limit: at most N images, spread evenly over the source; None means all. They are held in memory.
        split: of data that has splits.
        folder: keep results here, and denoisers as diffusers folders. What is here already is not computed again: a call that was killed
            goes on from its last mark.
        network: whose features are compared; None: as `load_feature_network` finds it.
        on_progress: called with (done, in all, of what).
        on_estimate: called before the first denoiser is trained with (seconds that one takes, denoisers to train).

    Raises:
        ValueError: for codecs whose images differ in channels, naming two; for a size that a codec cannot take, or whose latents are
            smaller than 4x4; for fewer than 100 images; without a feature network.
    """
    opened = [each if isinstance(each, LatentCodec) else LatentCodec.from_pretrained(each) for each in codecs]
    if len(opened) > 1:
        check_comparable(opened)
    patches = patches_of(opened, size)
    network = network or feature_network(opened[0].device)
    report: Report = on_progress or (lambda done, total, what: None)
    source = data if isinstance(data, ImageSource) else open_source(data, split=split)
    images, num_enlarged, skipped = _squares(source, size, opened[0].channels, limit, report)
    against = _Images(images, network, min(num_samples, len(images)), report)
    marks = sorted({max(1, round(share * steps)) for share in MARKS}) if steps else []
    shelf = _Shelf(folder, against.settings)

    names, measured, runs = distinct_names(opened), [], []
    half = shelf.keep("images", {}, lambda: against.half)
    for name, codec, patch in zip(names, opened, patches):
        latents = cache(lambda codec=codec, name=name: encode_squares(codec, images, name, report))
        settings = {"codec": codec.fingerprint, "dtype": str(codec.dtype)}
        facts = shelf.keep(
            codec.name, settings, lambda codec=codec, latents=latents: _facts(codec, latents(), against)
        )
        runs.append([])
        for seed in range(seeds if steps else 0):
            file = shelf.place(
                f"{codec.name}-seed{seed}", settings | {"patch": patch, "marks": marks, "seed": seed}
            )
            runs[-1].append(_Run(name, codec, latents, against, patch, seed, marks, file))
        measured.append({"name": name, "fingerprint": codec.fingerprint, "patch": patch} | facts)
    in_order = [
        run for each in zip(*runs) for run in each
    ]  # all codecs of a seed, so that they can be compared soon
    left = [run for run in in_order if not run.is_done]
    if left and on_estimate:
        on_estimate(left[0].estimate(), len(left))
    for run in in_order:
        run.go_on()
    return Diffusability(
        steps=marks,
        codecs=[
            CodecDiffusability(**facts, curves=[run.curve for run in some])
            for facts, some in zip(measured, runs)
        ],
        half=half,
        network=network.name,
        num_images=len(images),
        num_samples=against.num_samples,
        side=size,
        num_enlarged=num_enlarged,
        device=device_name(opened[0].device),
        skipped=skipped,
    )


def patches_of(codecs: Sequence[LatentCodec], size: int) -> list[int]:
    """Of each codec the side of a token in positions, so that all have as many tokens.

    The coarsest latents have tokens of 2x2 positions, as DiT-XL/2's, or of one where that would leave fewer than 4x4 tokens.

    Raises:
        SettingError: for a size that a codec cannot take, that leaves latents smaller than 4x4, or that has no such tokens.
    """
    for codec in codecs:
        factor = codec.latent_space.downsampling_factor
        if size < FEWEST_POSITIONS * factor:
            raise SettingError(
                "size",
                f"at least {FEWEST_POSITIONS * factor} px, {FEWEST_POSITIONS}x{FEWEST_POSITIONS} latents of {codec.name}",
                size,
            )
        if size % max(factor, codec.family.side_multiple):
            raise SettingError(
                "size", f"a multiple of {max(factor, codec.family.side_multiple)} px for {codec.name}", size
            )
    grids = [size // codec.latent_space.downsampling_factor for codec in codecs]
    tokens = min(grids)
    if tokens % 2 == 0 and tokens // 2 >= FEWEST_POSITIONS:
        tokens //= 2
    for codec, grid in zip(codecs, grids):
        if grid % tokens:
            coarsest = codecs[grids.index(min(grids))]
            raise SettingError(
                "size",
                f"one that leaves {codec.name} and {coarsest.name} latents whose sides divide, not {grid} and {min(grids)}",
                size,
            )
    return [grid // tokens for grid in grids]


def encode_squares(
    codec: LatentCodec, images: Tensor, name: str = "", report: Report | None = None
) -> Tensor:
    """Latents (N, C, h, w) in float32, on the codec's device, of uint8 images (N, C, H, W) of one size."""
    found: list[Tensor] = []
    for some in images.split(BATCH):
        found.append(codec.encode(some.float() / 127.5 - 1).float())
        if report:
            report(sum(map(len, found)), len(images), f"encoding by {name or codec.name}")
    return torch.cat(found)


def decode_squares(
    codec: LatentCodec, latents: Tensor, report: Report | None = None, what: str = "decoding"
) -> Tensor:
    """Images, uint8 (N, C, H, W) on the CPU, of latents (N, C, h, w)."""
    found: list[Tensor] = []
    for some in latents.split(BATCH):
        found.append(to_uint8(codec.decode(some.to(codec.dtype), output_type="pt")).cpu())
        if report:
            report(sum(map(len, found)), len(latents), what)
    return torch.cat(found)


def between_neighbors(latents: Tensor, chosen: Tensor) -> Tensor:
    """Latents half-way from each chosen one to its nearest neighbor among all, on the sphere (iFID, arXiv:2603.05630).

    Nearest by cosine, as that paper's code measures it. The middle of a and b by spherical interpolation is
    (a + b) / (2 cos(w / 2)) with w the angle between them, and 2 cos(w / 2) = sqrt(2 + 2 cos w).

    Args:
        latents: (N, C, h, w).
        chosen: places of some of them, int64 (M,).
    """
    directions = torch.nn.functional.normalize(latents.flatten(1), dim=1)
    found = []
    for places in chosen.to(latents.device).split(BATCH):
        cosines = directions[places] @ directions.T
        cosines.scatter_(1, places[:, None], -2.0)  # not itself
        cosine, nearest = cosines.max(1)
        length = (2 + 2 * cosine).clamp_min(1e-6).sqrt()
        found.append((latents[places] + latents[nearest]) / length[:, None, None, None])
    return torch.cat(found)


class _Images:
    """The images that samples and reconstructions are compared with."""

    def __init__(self, images: Tensor, network: FeatureNetwork, num_samples: int, report: Report):
        self.images, self.network, self.num_samples, self.report = images, network, num_samples, report

    @property
    def settings(self) -> dict:
        """What distances depend on."""
        digest = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()
        return {"images": digest, "network": self.network.name, "num_samples": self.num_samples}

    @cached_property
    def _features(self) -> Tensor:
        return features_of(
            self.images, self.network, lambda done, total: self.report(done, total, "features of the images")
        )

    @property
    def half(self) -> float:
        """Distance of every second image, as many as samples at most, from the others."""
        return frechet_distance(self._features[::2][: self.num_samples], self._features[1::2])

    def distance(self, images: Tensor) -> float:
        return frechet_distance(features_of(images, self.network), self._features)


class _Shelf:
    """Results in a folder, each under the settings that it depends on; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike | None, settings: dict):
        self.folder, self.settings = folder, settings | {"version": denoisers.VERSION}

    def place(self, name: str, settings: dict) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(self.settings | settings, sort_keys=True).encode()).hexdigest()
        return Path(self.folder, f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{digest[:12]}")

    def keep(self, name: str, settings: dict, measure: Callable):
        """What `measure` gives, or gave before."""
        place = self.place(name, settings)
        if place is None:
            return measure()
        file = place.with_name(place.name + ".json")
        if not file.is_file():
            found = measure()
            with replacing(file) as new:
                new.write_text(json.dumps(found))
        return json.loads(file.read_text())


class _Run:
    """One denoiser on the latents of one codec."""

    def __init__(
        self,
        name: str,
        codec: LatentCodec,
        latents: Callable[[], Tensor],
        against: _Images,
        patch: int,
        seed: int,
        marks: list[int],
        place: Path | None,
    ):
        self.what, self.codec, self.latents, self.against = f"{name}, seed {seed}", codec, latents, against
        self.patch, self.seed, self.marks, self.place = patch, seed, marks, place
        self.file = place and place.with_name(place.name + ".pt")
        self.state: dict = {"distances": [], "seconds": 0.0}
        if self.file is not None and self.file.is_file():
            self.state = torch.load(self.file, map_location=codec.device, weights_only=True)

    @property
    def is_done(self) -> bool:
        return len(self.state["distances"]) == len(self.marks)

    @property
    def curve(self) -> DenoiserCurve:
        distances, seconds, samples = (self.state[key] for key in ("distances", "seconds", "samples"))
        return DenoiserCurve(seed=self.seed, distances=distances, seconds=seconds, samples=samples.cpu())

    def estimate(self) -> float:
        """Seconds that all of it takes, by a few steps and samples."""
        training = DenoiserTraining(self.latents(), seed=self.seed, patch=self.patch)
        training.step()  # which allocates and tunes
        start = time.perf_counter()
        for _ in range(3):
            training.step()
        of_steps = (time.perf_counter() - start) / 3 * self.marks[-1]
        few = min(16, self.against.num_samples)
        start = time.perf_counter()
        features_of(self._draw(training, few), self.against.network)
        return of_steps + (time.perf_counter() - start) / few * self.against.num_samples * len(self.marks)

    def go_on(self) -> None:
        """Train from the last mark to the end."""
        if self.is_done:
            return
        training = DenoiserTraining(self.latents(), seed=self.seed, patch=self.patch)
        if "training" in self.state:
            training.load_state_dict(self.state["training"])
        for mark in self.marks[len(self.state["distances"]) :]:
            start = time.perf_counter()
            while training.num_steps < mark:
                training.step()
                self.against.report(training.num_steps, self.marks[-1], f"{self.what}: training")
            images = self._draw(training, self.against.num_samples)
            self.state["distances"].append(self.against.distance(images))
            self.state["seconds"] += time.perf_counter() - start
            self.state |= {"samples": images[:NUM_SHOWN], "training": training.state_dict()}
            self._save(training)

    def _draw(self, training: DenoiserTraining, count: int) -> Tensor:
        what = f"{self.what}: samples after {training.num_steps} steps"
        self.against.report(0, count, what)
        latents = sample(training.denoiser, count, seed=self.seed)
        return decode_squares(self.codec, latents, self.against.report, what)

    def _save(self, training: DenoiserTraining) -> None:
        if self.is_done:
            del self.state["training"]
        if self.file is None or self.place is None:
            return
        if self.is_done:
            training.denoiser.save_pretrained(self.place)
        with replacing(self.file) as new:
            torch.save(self.state, new)


def _squares(
    source: ImageSource, size: int, channels: int, limit: int | None, report: Report
) -> tuple[Tensor, int, list[str]]:
    """Images, uint8 (N, channels, size, size); how many of them were enlarged; and why others could not be read."""
    skipped: list[str] = []
    found, num_enlarged = [], 0
    for _, image in iter_images(
        source,
        limit,
        channels,
        on_skip=skipped.append,
        on_progress=lambda done, total: report(done, total, "reading images"),
    ):
        num_enlarged += min(image.shape[1:]) < size
        found.append(to_uint8(fit_square(image, size)))
    if len(found) < FEWEST_IMAGES:
        raise ValueError(f"expected {FEWEST_IMAGES} images or more to train a denoiser, got {len(found)}")
    return torch.stack(found), num_enlarged, skipped


def _facts(codec: LatentCodec, latents: Tensor, against: _Images) -> dict:
    """What `CodecDiffusability` says of a codec without a denoiser."""
    count = against.num_samples
    chosen = torch.arange(count) * len(latents) // count
    decoded = decode_squares(codec, latents[chosen], against.report, f"{codec.name}: reconstructions")
    middles = decode_squares(
        codec, between_neighbors(latents, chosen), against.report, f"{codec.name}: between neighbors"
    )
    return {
        "channels": latents.shape[1],
        "grid": latents.shape[2],
        "std": latents.std((0, 2, 3)).tolist(),
        "reconstructions": against.distance(decoded),
        "interpolated": against.distance(middles),
    }
