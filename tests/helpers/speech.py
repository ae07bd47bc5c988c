"""Sentences that espeak-ng speaks, and tones where it is missing: sounds to train and to test on."""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
from scipy.io import wavfile

_WHO = (
    "the old sailor, my younger sister, a quiet farmer, our new teacher, the tired doctor, every child here, the king's guard, "
    "a foreign guest, the loud neighbor, her best friend, the careful judge, a famous singer, the village baker, his clever uncle, "
    "some hungry tourists, the night watchman, a brave pilot, this strange machine, the youngest brother, two lazy dogs"
)
_DOES = (
    "carried, painted, forgot, sold, found, dropped, cleaned, borrowed, followed, watched, measured, opened, broke, repaired, "
    "noticed, hid, described, brought, chose, threw"
)
_WHAT = (
    "a heavy wooden chest, the yellow umbrella, seven silver spoons, an ancient map, the garden fence, a bowl of cherries, "
    "the last letter, a rusty bicycle, fresh white bread, the church bell, a pair of gloves, the kitchen window, thirty blue jars, "
    "an empty barrel, the wedding photograph, a large green parrot, his leather jacket, the broken violin, a cup of tea, "
    "the morning paper"
)
_WHERE = (
    "near the river, before sunrise, in the crowded market, under a stone bridge, after the long winter, at the edge of the forest, "
    "on Thursday evening, without a single word, behind the theater, during the thunderstorm, for just five dollars, "
    "in front of everyone, with great joy, on the way to school, above the shop, while it was raining, next to the fountain, "
    "between two hills, as quickly as possible, across the frozen lake"
)
TRAIN_VOICES = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-us+f2",
    "en-us+m3",
    "en-gb+f4",
    "en-gb-x-rp+m7",
    "en-us+f5",
)
TEST_VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb-scotland", "en-us+m3")
NEW_VOICES = ("en-029+f3", "en-gb-x-gbcwmd+m2")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of 8 to 14 words."""
    parts = [text.split(", ") for text in (_WHO, _DOES, _WHAT, _WHERE)]
    generator, found = random.Random(seed), {}
    while len(found) < count:
        words = " ".join(generator.choice(part) for part in parts)
        found[f"{words[0].upper()}{words[1:]}."] = None
    return list(found)


def has_espeak() -> bool:
    return shutil.which("espeak-ng") is not None


def speak(text: str, path: Path, *, voice: str = "en-us", words_per_minute: int = 165) -> Path:
    """Write what espeak-ng says, 16-bit mono at its own 22,050 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-w", str(path), text]
    subprocess.run(command, check=True, capture_output=True)
    return path


def speak_sentences(folder: Path, count: int, *, seed: int = 0, voices=TRAIN_VOICES) -> Path:
    """A folder of sentences, each by one of the voices at 130 to 200 words a minute; what is there already is kept."""
    for number, text in enumerate(sentences(count, seed)):
        path = folder / f"{number:04d}.wav"
        if not path.exists():
            speak(text, path, voice=voices[number % len(voices)], words_per_minute=130 + 7 * (number % 11))
    return folder


def tones(
    seconds: float = 1.0, sample_rate: int = 16_000, *, frequencies=(220.0, 1000.0, 3000.0)
) -> np.ndarray:
    """Tones one after another, each fading in and out, float32 in [-0.5, 0.5]."""
    length = int(seconds * sample_rate) // len(frequencies)
    time = np.arange(length) / sample_rate
    fade = np.sin(np.pi * np.arange(length) / length)
    return np.concatenate([0.5 * fade * np.sin(2 * np.pi * each * time) for each in frequencies]).astype(
        np.float32
    )


def write_tones(path: Path, seconds: float = 1.0, sample_rate: int = 16_000, **kind) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, sample_rate, (tones(seconds, sample_rate, **kind) * 32767).astype(np.int16))
    return path
