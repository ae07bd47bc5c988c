"""Sounds as images of their spectrum: read, encoded, decoded and heard again."""

import json
import logging
import pickle
import wave

import numpy as np
import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.speech import tones, write_tones
from helpers.training import write_images
from scipy.io import wavfile

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.components.codec_folders import read_origin
from latent_codec.errors import SettingError
from latent_codec.images.decoding import ImageError
from latent_codec.images.origins import origin_from_json
from latent_codec.images.sound_files import read_sound, write_wav
from latent_codec.images.sound_origins import SoundOrigin
from latent_codec.images.sources import open_source
from latent_codec.images.spectrograms import MelScale, _filters
from latent_codec.images.vocoders import Vocoder
from latent_codec.metrics import psnr


@pytest.fixture
def tone(tmp_path):
    """A second of three tones, at espeak-ng's rate."""
    return write_tones(tmp_path / "tones" / "tone.wav", sample_rate=22_050)


def test_a_tone_is_a_bright_row_at_its_frequency():
    scale = MelScale()
    image = scale.spectrogram(torch.from_numpy(tones(frequencies=(1000.0,))) * 2)
    assert image.shape == (1, 80, 1 + 16_000 // 256) and image.abs().max() <= 1
    band = int(scale.levels(image)[:, 30].argmax())
    assert image[0, 79 - band, 30] == image[0, :, 30].max()  # the lowest band is the last row
    low, high = 1000 * 0.97, 1000 * 1.03
    frequencies = torch.linspace(0, 8000, 513)
    heard = frequencies[_filters(scale)[band] > 0]
    assert heard.min() < high and heard.max() > low
    assert scale.levels(image).max() == pytest.approx(19.65, abs=0.1)  # of a sine at full scale


def test_filters_are_those_of_transformers():
    reference = pytest.importorskip("transformers.audio_utils")
    for scale in (MelScale(), MelScale(bands=64, window=512, lowest_hz=0.0, highest_hz=8000.0)):
        bins, *ends = scale.window // 2 + 1, scale.lowest_hz, scale.highest_hz
        found = reference.mel_filter_bank(bins, scale.bands, *ends, 16_000, norm="slaney", mel_scale="slaney")
        assert np.abs(found.T - _filters(scale).numpy()).max() < 1e-7


def test_a_spectrogram_becomes_a_sound_of_about_that_spectrogram():
    scale = MelScale()
    image = scale.spectrogram(torch.from_numpy(tones()))
    sound = scale.invert(image)
    assert sound.shape == (63 * 256,) and torch.equal(sound, scale.invert(image))
    again = scale.spectrogram(sound[:16_000])
    assert psnr(again[None], image[None]).item() > 23  # what is lost is the silence around the tones
    noise = scale.spectrogram(torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * sound.std())
    assert psnr(noise[None], image[None]).item() < 15


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bands", 4),
        ("bands", 8.0),
        ("hop", 600),
        ("sample_rate", 10**9),
        ("highest_hz", 9000.0),
        ("floor_db", float("nan")),
    ],
)
def test_scales_that_make_no_image_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting}: expected"):
        MelScale(**{setting: value})


def test_wav_files_of_every_depth_are_read_alike(tmp_path):
    samples = tones(0.2, 22_050)
    for name, values in {
        "8.wav": np.rint(samples * 128 + 128).astype(np.uint8),
        "16.wav": np.rint(samples * 2**15).astype(np.int16),
        "32.wav": np.rint(samples.astype(np.float64) * 2**31).astype(np.int32),
        "float.wav": samples,
    }.items():
        wavfile.write(tmp_path / name, 22_050, values)
    with wave.open(str(tmp_path / "24.wav"), "wb") as file:
        file.setparams((1, 3, 22_050, 0, "NONE", ""))
        deep = np.rint(samples.astype(np.float64) * 2**31).astype("<i4").view(np.uint8).reshape(-1, 4)
        file.writeframes(deep[:, 1:].tobytes())
    for bits in ("8", "16", "24", "32", "float"):
        found, rate = read_sound(tmp_path / f"{bits}.wav")
        assert rate == 22_050 and found.shape == (len(samples), 1)
        assert np.abs(found[:, 0] - samples).max() < (0.005 if bits == "8" else 2e-5)


def test_other_formats_are_read_by_soundfile(tmp_path, tone):
    soundfile = pytest.importorskip("soundfile", reason="the extra audio is not installed")
    samples, rate = read_sound(tone)
    for suffix in ("flac", "ogg", "mp3"):
        path = tmp_path / f"tone.{suffix}"
        soundfile.write(path, samples, rate)
        image = open_source(f"audio:{path}").image(0, 1)
        assert psnr(image[None], open_source(f"audio:{tone}").image(0, 1)[None]).item() > 18
    mu_law = tmp_path / "mu-law.wav"
    soundfile.write(mu_law, samples, rate, "ULAW")
    assert np.abs(read_sound(mu_law)[0] - samples).max() < 0.02


def _header(tone) -> bytes:
    return tone.read_bytes()[:44]


BAD = {
    "empty": (lambda tone: b"", "the file is empty"),
    "text": (lambda tone: b"<html>no", "not a sound file in a known format"),
    "cut": (lambda tone: tone.read_bytes()[:9000], "cut short: its header announces more samples"),
    "hollow": (lambda tone: _header(tone)[:40] + bytes(4), "no samples in it; record it again"),
    "rate": (
        lambda tone: tone.read_bytes().replace(b"\x22\x56\0\0\x44\xac", b"\1\0\0\0\2\0", 1),
        "got 1: its header is damaged",
    ),
    "short": (np.zeros(300, np.int16), "expected 0.112 s or more, 8 frames, got 0.0136 s; add silence"),
    "nan": (
        np.array([0.0, np.nan, np.inf, 0] * 9000, np.float32),
        "18,000 of 36,000 samples are NaN or infinite",
    ),
    "scale": (np.full(9000, 20_000.0, np.float32), "float samples in -1 to 1, got up to 2e"),
}


def test_recordings_have_neither_value_range_nor_axis(tone):
    for given in ({"value_range": (0, 1)}, {"axis": 0}):
        with pytest.raises(SettingError, match="of data that is no"):
            open_source(f"audio:{tone}", **given)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sound_is_refused_in_one_line(tmp_path, tone, name):
    content, message = BAD[name]
    path = tmp_path / f"{name}.wav"
    if isinstance(content, np.ndarray):
        wavfile.write(path, 22_050, content)
    else:
        path.write_bytes(content(tone))
    with pytest.raises(ImageError, match=message) as caught:
        open_source(f"audio:{path}").image(0, 1)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_stereo_low_rates_and_silence_are_read_with_a_note(tmp_path, caplog):
    samples = (tones(sample_rate=8000, frequencies=(300.0,)) * 2**15).astype(np.int16)
    wavfile.write(tmp_path / "stereo.wav", 16_000, np.stack([samples, samples], 1))
    wavfile.write(tmp_path / "mono.wav", 16_000, samples)
    wavfile.write(tmp_path / "low.wav", 8000, samples)
    wavfile.write(tmp_path / "silent.wav", 16_000, 0 * samples)
    source = open_source(f"audio:{tmp_path}")
    with caplog.at_level(logging.WARNING):
        low, mono, silent, stereo = (source.image(index, 1) for index in range(4))
    assert torch.equal(stereo, mono)
    assert low[:, :12].max() < -0.9 < low[:, 40:].max()  # nothing above 4 kHz
    assert (silent == -1).all() and source.origin(2).restore(silent).max() < 1e-3
    notes = [record.getMessage() for record in caplog.records]
    assert [
        next(word for word in ("stereo", "low", "silent") if f"{word}.wav" in note) for note in notes
    ] == [
        "low",
        "silent",
        "stereo",
    ]
    assert "nothing above 4000 Hz" in notes[0] and "rate=8000:PATH" in notes[0]


def test_pieces_of_a_stated_shape_join_to_the_whole(tone):
    whole = open_source(f"audio:{tone}")
    pieces = open_source(f"audio:80x24:{tone}")
    assert [pieces.origin(index).num_samples for index in range(len(pieces))] == [6144, 6144, 3712]
    assert {pieces.image(index, 1).shape for index in range(3)} == {(1, 80, 24)} == {(1, *pieces.size(0))}
    joined = torch.cat([pieces.image(index, 1) for index in range(3)], 2)
    assert torch.equal(joined[:, :, :63], whole.image(0, 1)) and whole.size(0) == (80, 63)
    assert pieces.name(2).endswith("tone-0002.wav")
    last = pickle.loads(pickle.dumps(pieces)).part([2])
    assert len(last) == 1 and torch.equal(last.read(0), pieces.read(2))


def test_a_folder_of_recordings_has_classes_and_other_scales(tmp_path):
    for name in ("a/one.wav", "a/two.WAV", "b/three.wav"):
        write_tones(tmp_path / name, 0.3)
    (tmp_path / "b/notes.txt").write_text("no sound")
    source = open_source(f"audio:64,rate=8000,hop=128,window=512:{tmp_path}")
    assert [source.label(index) for index in range(3)] == [0, 0, 1]
    assert source.image(0, 3).shape == (3, 64, 1 + 2400 // 128)
    assert source.scale.highest_hz == 3800


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["audio:"], "name a recording"),
        (["audio:pitch=3:."], "got 'pitch=3'"),
        (["audio:80x4:."], "at least 8 frames"),
        (["audio:4:."], "expected 8 to 512 bands, got 4"),
        (["audio:80:.", "audio:64:."], "give all recordings the same"),
        (["audio:.", "photo.png"], "cannot be mixed"),
        (["audio:nowhere.wav"], "no such file"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_source(names)


def test_an_origin_is_plain_json_and_refuses_other_values(tmp_path, tone):
    origin = open_source(f"audio:{tone}").origin(0)
    facts = json.loads(json.dumps(origin.to_json()))
    assert origin_from_json(facts) == origin and "1.00 s at 16000 Hz" in origin.describe()
    for wrong in (
        {"num_samples": 0},
        {"num_samples": 1e9},
        {"bands": 10**9},
        {"hop": "256"},
        {"ceiling_db": None},
    ):
        with pytest.raises(ValueError):
            origin_from_json(facts | wrong)
    assert origin.restore(torch.zeros(1, 80, 40)).shape == (40 * 256,)  # of a window
    for shape in ((1, 64, 63), (1, 80, 7)):
        with pytest.raises(ValueError, match="expected a spectrogram of 80 bands and 8 frames or more"):
            origin.restore(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"written as \.wav"):
        write_wav(np.zeros(9), 16_000, tmp_path / "a.mp3")


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("codec") / "gray"
    LatentCodec(build("AutoencoderKL", in_channels=1, out_channels=1)).save_pretrained(folder)
    return str(folder)


def test_latents_of_sounds_are_decoded_to_sounds(tmp_path, tone, codec, capsys):
    assert main(["encode", f"audio:{tone}", "--codec", codec, "--out", str(tmp_path / "latents")]) == 0
    assert main(["decode", str(tmp_path / "latents"), "--codec", codec, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out/tone.wav")
    rate, samples = wavfile.read(tmp_path / "out/tone.wav")
    assert (rate, samples.shape, samples.dtype) == (16_000, (16_000,), np.int16)
    assert open_source(tmp_path / "out/tone.png").size(0) == (80, 63)


def test_compressed_sounds_become_sounds_again(tmp_path, tone, vocoder, capsys):
    """The shipped codec, of color, has an entropy model."""
    small, out = tmp_path / "small", tmp_path / "out"
    assert main(["compress", f"audio:{tone}", "--out", str(small)]) == 0
    assert main(["decompress", str(small / "tone.lcf"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "tone.wav")
    rate, samples = wavfile.read(out / "tone.wav")
    assert (rate, samples.shape) == (16_000, (16_000,))
    assert open_source(out / "tone.png").size(0) == (80, 63)
    command = ["decompress", str(small / "tone.lcf"), "--out", str(tmp_path / "voiced"), "--vocoder", vocoder]
    assert main(command) == 0
    assert not np.array_equal(wavfile.read(tmp_path / "voiced/tone.wav")[1], samples)
    looked_at = [*command, "--format", "png"]
    assert "expected none where images are no spectrograms" in fails(capsys, *looked_at)
    err = fails(capsys, "compress", f"audio:{tone}", "--max-error", "1", "--out", small)
    assert "--max-error: expected none of a sound, which has no unit, got 1.0" in err


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory) -> str:
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        upsample_rates=[16, 16], upsample_kernel_sizes=[16, 16], upsample_initial_channel=8, resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vocoder")
    transformers.SpeechT5HifiGan(config).save_pretrained(folder)
    return str(folder)


def test_a_vocoder_makes_the_sound_of_its_own_scale(tmp_path, tone, codec, vocoder, capsys):
    latents = tmp_path / "latents"
    assert main(["encode", f"audio:{tone}", "--codec", codec, "--out", str(latents)]) == 0
    command = ["decode", str(latents), "--codec", codec, "--out", str(tmp_path / "out"), "--vocoder", vocoder]
    assert main(command) == 0
    _, samples = wavfile.read(tmp_path / "out/tone.wav")
    opened = Vocoder.from_pretrained(vocoder)
    image = open_source(f"audio:{tone}").image(0, 1)
    levels = MelScale().levels(image).T / 20
    assert torch.equal(opened.samples(image, MelScale()), opened.model(levels))
    assert samples.shape == (16_000,)
    opened.model.config.normalize_before = False  # as AudioLDM's, which takes natural logarithms
    torch.testing.assert_close(opened.samples(image, MelScale()), opened.model(levels * np.log(10)))

    assert main(["encode", f"audio:64:{tone}", "--codec", codec, "--out", str(latents)]) == 0
    err = fails(capsys, *command)
    assert "expects 80 bands at 16000 Hz with a hop of 256, got 64 bands" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    assert "expected a SpeechT5HifiGan, got bert" in fails(capsys, *command[:-1], tmp_path / "other")


def test_a_sampled_image_of_the_kind_is_a_sound_too():
    origin = SoundOrigin.of(MelScale(), 1000)
    assert origin.for_size(80, 32).num_samples == 32 * 256
    assert origin.for_size(64, 32) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What speech-vae leaves after one step of a narrow network."""
    folder = tmp_path_factory.mktemp("run")
    for name, frequencies in {"a": (200.0, 900.0), "b": (2000.0,)}.items():
        write_tones(folder / f"tones/{name}.wav", 0.8 if name == "a" else 0.5, frequencies=frequencies)
    small = [
        "model.arguments.block_out_channels=[8,16,16]",
        "run.steps=1",
        "run.calibration_images=0",
        "data.width=32",
    ]
    command = ["train", "speech-vae", "--data", f"audio:{folder / 'tones'}", "--out", str(folder / "run")]
    settings = [word for setting in small for word in ("--set", setting)]
    assert main([*command, "--set", "optimizer.batch_size=1", *settings]) == 0
    return folder


def test_a_codec_of_recordings_knows_that_its_samples_are_sounds(run, tmp_path, capsys):
    origin = read_origin(run / "run/codec")
    assert origin == SoundOrigin.of(MelScale(), 32 * 256)
    out = tmp_path / "drawn.png"
    assert main(["sample", "--codec", str(run / "run"), "--num", "2", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["size"] == [80, 32] and facts["sounds"] == [str(tmp_path / f"drawn-{i}.wav") for i in (0, 1)]
    assert all(wavfile.read(path)[1].shape == (32 * 256,) for path in facts["sounds"])
    copy = tmp_path / "copy"
    LatentCodec.from_pretrained(run / "run").save_pretrained(copy)
    assert read_origin(copy) == origin
    (copy / "origin.json").write_text('{"kind": "smell"}')
    assert "origin.json: expected an image of" in fails(capsys, "sample", "--codec", copy, "--out", out)


def test_a_round_trip_shows_both_spectrograms_and_writes_the_sound(run, tmp_path, capsys):
    command = ["roundtrip", f"audio:{run}/tones/a.wav", "--codec", str(run / "run"), "--out", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["images"]
    assert facts["size"] == [80, 51] and facts["decoded_path"] == str(tmp_path / "a-decoded.wav")
    assert wavfile.read(facts["decoded_path"])[1].shape == (12_800,)
    assert open_source(tmp_path / "a-decoded.png").size(0) == (80, 51)
    assert open_source(facts["path"]).size(0) == (3 * 80 + 2 * 4, 51)  # one below the other


def test_between_two_recordings_are_sounds(run, tmp_path, capsys):
    names = [f"audio:{run}/tones/{name}.wav" for name in "ab"]
    command = ["interpolate", *names, "--codec", str(run / "run"), "--out", str(tmp_path / "morph.png")]
    assert main([*command, "--steps", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sounds"] == [str(tmp_path / f"morph-{number}.wav") for number in range(3)]
    assert {wavfile.read(path)[1].shape for path in facts["sounds"]} == {(12_800,)}  # of the longer one
    assert open_source(tmp_path / "morph-0.png").size(0) == (80, 51)


def test_a_vocoder_for_what_is_no_sound_is_refused(run, tmp_path, vocoder, capsys):
    paths = write_images(tmp_path / "photos", 2)
    command = [
        "interpolate",
        paths,
        "--codec",
        run / "run",
        "--out",
        tmp_path / "a.png",
        "--vocoder",
        vocoder,
    ]
    assert "--vocoder: expected none where images are no spectrograms" in fails(capsys, *command)
