"""A sound file's samples, or an ImageError that says in one line what the file is instead.

WAV files are read and written by scipy; FLAC, Ogg, MP3 and AIFF by soundfile, of the extra `audio`.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from latent_codec.files import replacing
from latent_codec.images.decoding import ImageError, open_regular, without_warnings

WAV = ".wav"
SUFFIXES = (WAV, ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64")
LOUDEST = 10.0
"""Samples of floats may pass 1 where a mix is loud; those beyond this are of another scale."""
_RATES = 1000, 768_000
_FULL_SCALE = {
    "uint8": 2**7,
    "int16": 2**15,
    "int32": 2**31,
    "int64": 2**63,
}  # scipy shifts 24 bits to the top of int32
_NO_SOUNDFILE = 'reading it needs soundfile: pip install "latent-codec[audio]", or save it as WAV'
_ADVICE = "save it as WAV or FLAC, such as by ffmpeg -i IN out.wav"


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Samples, float32 (num_samples, channels), where full scale is -1 to 1, and the sample rate in Hz.

    Raises:
        ImageError: for anything that is no whole sound file of finite samples, saying why and what to do.
    """
    name = os.fspath(path)
    try:
        with open_regular(path) as file:
            head = file.read(12)
            header = _wav_header(file) if _is_wav(head) else None
        if not head:
            raise ImageError(f"{name}: the file is empty")
        if header and header.is_cut_short:
            raise ImageError(
                f"{name}: cut short: its header announces more samples than there are; copy it again"
            )
        samples, rate = _read_wav(name) if _is_wav(head) else _read_other(name, head)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ImageError(
            f"{name}: expected {_RATES[0]} to {_RATES[1]} samples a second, got {rate}: its header is damaged"
        )
    if not samples.size:
        raise ImageError(f"{name}: there are no samples in it; record it again, or leave it out")
    wrong = np.flatnonzero(~np.isfinite(samples).all(1))
    if len(wrong):
        what = f"{len(wrong):,} of {len(samples):,} samples are NaN or infinite, the first at {wrong[0] / rate:.3f} s"
        raise ImageError(
            f"{name}: {what}; expected finite ones: replace them, or write the file again in 16 bits"
        )
    peak = np.abs(samples).max()
    if peak > LOUDEST:
        raise ImageError(
            f"{name}: expected float samples in -1 to 1, got up to {peak:.4g}; divide them by their full scale"
        )
    return samples, rate


def _is_wav(head: bytes) -> bool:
    return head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE"


def _read_wav(name: str) -> tuple[np.ndarray, int]:
    try:
        with without_warnings():  # of chunks that are no sound
            rate, values = wavfile.read(name)
    except OSError:
        raise
    except Exception as error:  # scipy raises what it trips over: ValueError, struct.error, KeyError ...
        try:
            return _read_by_soundfile(name)  # which knows more encodings, such as mu-law
        except ImportError:
            reason = " ".join(str(error).split()).split(". Supported formats")[0]
            raise ImageError(
                f"{name}: damaged, or an encoding that scipy does not read ({reason}); {_ADVICE}"
            ) from error
    values = values.reshape(len(values), values.shape[1] if values.ndim == 2 else 1)
    scale = _FULL_SCALE.get(values.dtype.name)
    if scale is None:
        return values.astype(np.float32), rate
    middle = 128.0 if values.dtype == np.uint8 else 0.0
    return ((values - middle) / scale).astype(np.float32), rate


def _read_other(name: str, head: bytes) -> tuple[np.ndarray, int]:
    if not _looks_like_sound(name, head):
        raise ImageError(f"{name}: not a sound file in a known format (WAV, FLAC, Ogg, MP3, AIFF); {_ADVICE}")
    try:
        return _read_by_soundfile(name)
    except ImportError as error:
        raise ImageError(f"{name}: {_NO_SOUNDFILE}") from error


def _looks_like_sound(name: str, head: bytes) -> bool:
    """By its mark, or, as many an MP3 has none, by its suffix."""
    marks = (
        b"fLaC",
        b"OggS",
        b"FORM",
        b"ID3",
        b".snd",
        b"caff",
        b"riff",
        b"\xff\xfb",
        b"\xff\xf3",
        b"\xff\xf2",
    )
    return head.startswith(marks) or Path(name).suffix.lower() in SUFFIXES[1:]


def _read_by_soundfile(name: str) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        samples, rate = soundfile.read(name, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise ImageError(
            f"{name}: not a sound file, damaged, or of an unknown encoding ({reason}); {_ADVICE}"
        ) from error
    return samples, rate


def num_samples_in(path: str | os.PathLike) -> tuple[int, int]:
    """(samples of each channel, sample rate), by the header alone where it is a WAV file.

    Raises:
        ImageError: as `read_sound`.
    """
    name = os.fspath(path)
    try:
        with open_regular(path) as file:
            header = _wav_header(file) if _is_wav(file.read(12)) else None
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error
    if header:
        return header.num_samples, header.rate
    samples, rate = read_sound(path)
    return len(samples), rate


class _WavHeader(NamedTuple):
    num_samples: int
    rate: int
    is_cut_short: bool


def _wav_header(file: BinaryIO) -> _WavHeader | None:
    """What the chunks "fmt " and "data" say, from behind the first 12 bytes; None where they are not as usual."""
    rate = frame = 0
    end = os.fstat(file.fileno()).st_size
    while len(head := file.read(8)) == 8:
        chunk, size = struct.unpack("<4sI", head)
        if chunk == b"fmt " and 16 <= size < 1024:
            fields = file.read(size + size % 2)
            rate, _, frame = struct.unpack("<IIH", fields[4:14]) if len(fields) >= 14 else (0, 0, 0)
        elif chunk == b"data":
            there = min(size, end - file.tell())
            is_usual = frame and _RATES[0] <= rate <= _RATES[1]
            is_stream = (
                size >= 2**31 - 2**16
            )  # a writer that could not know the size, such as `ffmpeg -f wav -`
            return _WavHeader(there // frame, rate, there < size and not is_stream) if is_usual else None
        else:
            file.seek(size + size % 2, os.SEEK_CUR)
    return None


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (num_samples,) at another rate, ceil(num_samples wanted / rate) of them, by a polyphase filter."""
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def write_wav(samples: np.ndarray, sample_rate: int, path: str | os.PathLike) -> None:
    """Write samples in [-1, 1], (num_samples,), as 16-bit mono, whole or not at all; what is beyond the range is clipped.

    Raises:
        ValueError: for another suffix than .wav.
        OSError: where the system cannot write.
    """
    path = Path(path)
    if path.suffix.lower() != WAV:
        raise ValueError(
            f"{path}: sound is written as {WAV}, not as {path.suffix or 'a file without suffix'}"
        )
    with replacing(path) as partial:
        wavfile.write(partial, sample_rate, np.rint(samples.clip(-1, 1) * 32767).astype(np.int16))
