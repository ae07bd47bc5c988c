"""Sound files as images of their spectrum: `audio:`.

source = open_source("audio:recordings/")                 # an image for each recording, as long as it is
source = open_source("audio:80x128:recordings/")          # pieces of 128 frames, the last one filled up with silence
source = open_source("audio:64,rate=22050:talk.flac")     # 64 bands of another range
source.image(0, 1)                                        # float32 (1, 80, frames) in [-1, 1], see `MelScale`
source.origin(0).restore(image)                           # samples again
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_codec.errors import SettingError
from latent_codec.files import find_files, modified
from latent_codec.images.decoding import MIN_SIDE, ImageError, printable
from latent_codec.images.sound_files import SUFFIXES, num_samples_in, read_sound, resample
from latent_codec.images.sound_origins import SoundOrigin
from latent_codec.images.sources import AUDIO, FolderImages
from latent_codec.images.spectrograms import MelScale
from latent_codec.images.tensors import to_image, to_uint8

logger = logging.getLogger(__name__)

_FORM = f"{AUDIO}PATH, {AUDIO}BANDSxFRAMES:PATH, or {AUDIO}BANDS,rate=HZ,hop=SAMPLES:PATH"
_KEYS = {
    "rate": ("sample_rate", int),
    "hop": ("hop", int),
    "window": ("window", int),
    "lowest": ("lowest_hz", float),
    "highest": ("highest_hz", float),
    "floor": ("floor_db", float),
    "ceiling": ("ceiling_db", float),
}
_NOTED = 5
_noted: set[str] = set()


def parse_audio(names: Sequence[str]) -> tuple[list[str], MelScale, int | None]:
    """Take "audio:SPEC:PATH" apart: the paths, the scale, and the frames of a piece, or None for whole recordings.

    Raises:
        ValueError: for another form, or names that differ in SPEC.
    """
    specs, paths = set(), []
    for name in names:
        if not name.startswith(AUDIO):
            raise ValueError(
                f"{name}: {AUDIO} and other data cannot be mixed; put {AUDIO} before each recording"
            )
        rest = name.removeprefix(AUDIO)
        spec, colon, path = rest.partition(":")
        if not colon or Path(rest).exists():
            spec, path = "", rest
        if not path:
            raise ValueError(f"expected {_FORM}, got {name!r}; name a recording, or a folder of them")
        specs.add(spec)
        paths.append(path)
    if len(specs) > 1:
        raise ValueError(
            f"{names[0]} and the others differ in what is before the path; give all recordings the same"
        )
    scale, frames = _parse_spec(specs.pop(), names[0])
    return paths, scale, frames


def _parse_spec(spec: str, name: str) -> tuple[MelScale, int | None]:
    found, frames = {}, None
    for part in filter(None, spec.split(",")):
        shape, setting = (
            re.fullmatch(r"(\d{1,4})(?:x(\d{1,6}))?", part),
            re.fullmatch(r"(\w+)=(-?\d+(?:\.\d+)?)", part),
        )
        if shape:
            found["bands"], frames = int(shape[1]), int(shape[2]) if shape[2] else None
        elif setting and setting[1] in _KEYS:
            field, kind = _KEYS[setting[1]]
            found[field] = kind(float(setting[2]))
        else:
            raise ValueError(f"{name}: expected {_FORM}, with {', '.join(_KEYS)}; got {part!r}")
    if "sample_rate" in found:
        found.setdefault("highest_hz", 0.475 * found["sample_rate"])
    if frames is not None and frames < MIN_SIDE:
        raise ValueError(
            f"{name}: expected at least {MIN_SIDE} frames in {AUDIO}BANDSxFRAMES:PATH, got {frames}"
        )
    try:
        return MelScale(**found), frames
    except SettingError as error:
        raise ValueError(f"{name}: {error}") from None


class RecordingImages(FolderImages):
    """Log-mel spectrograms of recordings, float32 (1, bands, frames); folders are classes as they are of images.

    Several channels are mixed to one, and other sample rates are resampled, with a note where that leaves rows empty.

    Args:
        paths: sound files, and folders of them.
        root: the folder, if it is a single one.
        scale: how samples become an image.
        frames: cut recordings into pieces of this many frames; None: a whole recording is an image.

    Raises:
        ValueError: if there are none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        root: Path | None,
        scale: MelScale | None = None,
        frames: int | None = None,
    ):
        self.scale, self.frames = scale or MelScale(), frames
        self._pieces: list[int] = []  # of its recording, which each image is
        super().__init__(paths, root)

    def _find(self, paths: Sequence[Path]) -> list[tuple[Path, Path]]:
        found: list[tuple[Path, Path]] = []
        for path in paths:
            files = find_files(path, (*SUFFIXES, *map(str.upper, SUFFIXES))) if path.is_dir() else [path]
            found += [(file, file.relative_to(path) if path.is_dir() else Path(file.name)) for file in files]
        if not found:
            given = ", ".join(map(str, paths))
            raise ValueError(f"no recordings ({', '.join(SUFFIXES)}) in {given}; name a folder that has some")
        if self.frames is None:
            self._pieces = [0] * len(found)
            return found
        pieces = [(*each, piece) for each in found for piece in range(self._num_pieces(each[0]))]
        self._pieces = [piece for *_, piece in pieces]
        return [(path, _piece_name(relative, piece)) for path, relative, piece in pieces]

    def _num_pieces(self, path: Path) -> int:
        try:
            num_samples, rate = num_samples_in(path)
        except ImageError:  # which reading it will raise again
            return 1
        return max(-(-num_samples * self.scale.sample_rate // (rate * self.frames * self.scale.hop)), 1)

    def name(self, index: int) -> str:
        path = self.paths[index]
        return str(path if self.frames is None else _piece_name(path, self._pieces[index]))

    def part(self, indices: Sequence[int]) -> "RecordingImages":
        some = super().part(indices)
        some._pieces = [self._pieces[index] for index in indices]
        return some

    def image(self, index: int, channels: int = 3) -> Tensor:
        """The spectrogram, float32 (channels, bands, frames) in [-1, 1]; of several channels all are equal.

        Raises:
            ImageError: for a recording that cannot be read, or is shorter than 8 frames.
        """
        image = self._recording(index)[0]
        if self.frames is not None:
            image = image[:, :, self._pieces[index] * self.frames :][:, :, : self.frames]
            image = F.pad(image, (0, self.frames - image.shape[2]), value=-1.0)
        return to_image(image, channels=channels)

    def read(self, index: int, channels: int = 3) -> Tensor:
        return to_uint8(self.image(index, channels))

    def size(self, index: int) -> tuple[int, int]:
        if self.frames is not None:
            return self.scale.bands, self.frames
        num_samples, rate = num_samples_in(self.paths[index])
        return self.scale.bands, 1 + -(-num_samples * self.scale.sample_rate // rate) // self.scale.hop

    def origin(self, index: int) -> SoundOrigin:
        num_samples = self._recording(index)[1]
        if self.frames is not None:
            length = self.frames * self.scale.hop
            num_samples = min(num_samples - self._pieces[index] * length, length)
        return SoundOrigin.of(self.scale, num_samples)

    def _recording(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        return _spectrogram(path, modified(path), self.scale)


def _piece_name(path: Path, piece: int) -> Path:
    return path.with_name(f"{path.stem}-{piece:04d}{path.suffix}")


@lru_cache(maxsize=2)  # the pieces of a recording are asked for one after another
def _spectrogram(path: Path, changed: int, scale: MelScale) -> tuple[Tensor, int]:
    """The image of a whole recording, and how many samples it has at the scale's rate."""
    samples, rate = read_sound(path)
    shortest = (MIN_SIDE - 1) * scale.hop / scale.sample_rate
    if len(samples) / rate < shortest:
        expected = f"expected {shortest:.3g} s or more, {MIN_SIDE} frames, got {len(samples) / rate:.3g} s"
        raise ImageError(f"{path}: {expected}; add silence to it, or leave it out")
    _note(path, samples, rate, scale)
    mono = resample(samples.mean(1), rate, scale.sample_rate)
    return scale.spectrogram(torch.from_numpy(mono)), len(mono)


def _note(path: Path, samples: np.ndarray, rate: int, scale: MelScale) -> None:
    """Say once of a recording what its image leaves out or lacks; of many such recordings, of the first few."""
    notes = []
    if samples.shape[1] > 1:
        notes.append(
            f"its {samples.shape[1]} channels are mixed to one; for one of them, save that as a file of its own"
        )
    if rate / 2 < scale.highest_hz:
        own = f"{AUDIO}{scale.bands},rate={rate}:PATH gives images of its own range"
        notes.append(f"at {rate} Hz it has nothing above {rate / 2:g} Hz, so the rows above are empty; {own}")
    if not samples.any():
        notes.append("it is silent, so its image is empty; leave it out of a training")
    if not notes or str(path) in _noted or len(_noted) > _NOTED:
        return
    _noted.add(str(path))
    more = "; so it is with further recordings" if len(_noted) > _NOTED else ""
    logger.warning("Note: %s: %s%s", printable(str(path)), "; ".join(notes), more)
