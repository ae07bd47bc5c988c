"""What speech-vae and speech-vq keep of speech: the spectrum, and what was said.

    RUNS=runs pytest tests/benchmarks/test_speech.py -s -o addopts=       about 12 minutes of one core, 7 of them training

espeak-ng speaks 480 sentences in eight voices for training, 50 others of the same words in five of these voices, and 20 of
them in two voices that training did not hear. Decoded images are inverted by Griffin-Lim.

The words are judged by dynamic time warping (Sakoe and Chiba, IEEE TASSP 26, 1978) of 12 cepstral coefficients: a decoded sound
counts as its own sentence where its distance to the original is below that to each of the others.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.speech import NEW_VOICES, TEST_VOICES, has_espeak, speak_sentences
from scipy.fft import dct
from tables import table

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.evaluation.codes import fixed_length_bits_per_pixel
from latent_codec.images.recordings import RecordingImages
from latent_codec.images.sources import open_source
from latent_codec.images.spectrograms import MelScale
from latent_codec.metrics import psnr

pytestmark = pytest.mark.skipif(not has_espeak(), reason="espeak-ng is not installed")
SCALE = MelScale()


@pytest.fixture(scope="module")
def speech(runs) -> dict[str, Path]:
    return {
        "train": speak_sentences(runs / "speech-data/train", 480, seed=1),
        "voices that were trained on": speak_sentences(
            runs / "speech-data/test", 50, seed=2, voices=TEST_VOICES
        ),
        "other voices": speak_sentences(runs / "speech-data/other", 20, seed=2, voices=NEW_VOICES),
    }


@pytest.fixture(scope="module")
def codecs(speech, runs) -> dict[str, LatentCodec | None]:
    """Trained by their presets; None: no codec, Griffin-Lim only."""
    found: dict[str, LatentCodec | None] = {"Griffin-Lim of the spectrogram itself": None}
    for preset in ("speech-vae", "speech-vq"):
        assert main(["train", preset, "--data", f"audio:{speech['train']}", "--out", str(runs / preset)]) == 0
        found[preset] = LatentCodec.from_pretrained(runs / preset)
    found["default-f8c4, trained on photographs"] = LatentCodec.from_pretrained("default")
    return found


def test_decoded_speech_is_its_own_sentence(speech, codecs):
    rows, own_shares = [], {}
    for voices, folder in list(speech.items())[1:]:
        source = open_source(f"audio:{folder}")
        originals = [cepstra(source.image(index, 1)) for index in range(len(source))]
        for name, codec in codecs.items():
            found = [judge(codec, source, index, originals) for index in range(len(source))]
            images, sounds, own, other = (np.array(values) for values in zip(*found))
            own_shares[name, voices] = (own < other).mean()
            rows.append(
                (
                    name,
                    voices,
                    numbers(codec),
                    "" if codec is None else f"{images.mean():.1f}",
                    f"{sounds.mean():.1f}",
                    f"{own_shares[name, voices]:.0%}",
                    f"{np.median(other / own):.2f}",
                )
            )
    columns = [
        "codec",
        "voices",
        "numbers or bits a second",
        "PSNR of the spectrogram, dB",
        "of the sound's, dB",
    ]
    table("Sentences", [*columns, "nearest to its own", "next distance over its own"], rows)
    for preset in ("speech-vae", "speech-vq"):
        assert own_shares[preset, "voices that were trained on"] >= 0.95


def numbers(codec: LatentCodec | None) -> str:
    """How much a second of 62.5 frames takes, before any entropy coding."""
    if codec is None:
        return "5,000 numbers"
    pixels = SCALE.bands * SCALE.sample_rate / SCALE.hop
    if codec.indices_suffice:
        return f"{fixed_length_bits_per_pixel(codec, SCALE.bands, 128) * pixels:,.0f} bits"
    space = codec.latent_space
    return f"{space.channels * pixels / space.downsampling_factor**2:,.0f} numbers"


def judge(
    codec: LatentCodec | None, source: RecordingImages, index: int, originals: list[np.ndarray]
) -> tuple[float, float, float, float]:
    """PSNR of the decoded spectrogram, and of that of its sound; DTW distances to its own sentence and to the nearest other."""
    image = source.image(index, 1 if codec is None else codec.channels)
    decoded = image
    if codec is not None:
        (decoded,) = codec.decode(codec.encode(image), size=tuple(image.shape[-2:]), output_type="pt")
    sound = SCALE.spectrogram(torch.from_numpy(source.origin(index).restore(decoded)))
    distances = warped_distances(cepstra(sound), originals)
    return (
        psnr(decoded[None], image[None]).item(),
        psnr(sound[None], image[None, :1]).item(),
        distances[index],
        np.delete(distances, index).min(),
    )


def cepstra(image: torch.Tensor) -> np.ndarray:
    """Mel-frequency cepstral coefficients 1 to 12, (frames, 12), of mean 0 over the recording."""
    found = dct(SCALE.levels(image).T.numpy(), norm="ortho")[:, 1:13]
    return found - found.mean(0)


def warped_distances(sound: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """The least mean distance along a warping path from a sound to each of the others, diagonal after diagonal."""
    longest = max(map(len, others))
    padded = np.stack([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in others])
    costs = torch.cdist(
        torch.from_numpy(sound), torch.from_numpy(padded)
    ).numpy()  # (others, frames, longest)
    count, rows, columns = costs.shape
    before = last = np.full((count, rows + 1), np.inf)  # of the two diagonals before; entry 0 is outside
    found, ends = np.empty(count), np.array([len(each) - 1 for each in others])
    for diagonal in range(rows + columns - 1):
        first, stop = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        row = np.arange(first, stop)
        behind = np.minimum(np.minimum(last[:, row], last[:, row + 1]), before[:, row])
        now = np.full_like(last, np.inf)
        now[:, row + 1] = costs[:, row, diagonal - row] + (behind if diagonal else 0)
        before, last = last, now
        ended = ends == diagonal - (rows - 1)
        found[ended] = now[ended, rows] / (rows + ends[ended] + 1)
    return found
