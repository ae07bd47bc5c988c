"""What the tabs of the page do, without the page."""

import socket
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.autoencoders import build
from helpers.one_vector import one_vector_codec
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.analysis.attributes import fit_attribute
from latent_codec.bitstream import unpack
from latent_codec.metrics import psnr
from latent_codec.pipelines.folders import load_pipeline
from latent_codec.ui import desk as desk_module
from latent_codec.ui.completion import PARTS, Completion, hidden_cells
from latent_codec.ui.compressed import arriving, compress_to, open_file, space_of, stages
from latent_codec.ui.desk import TINY, Desk, read_dropped
from latent_codec.ui.equal_bytes import compare
from latent_codec.ui.garments import CLASSES, PER_CLASS, Garments, garment
from latent_codec.ui.latents import channels, morphed, strongest_dimensions, turned, vector
from latent_codec.ui.ports import free_port
from latent_codec.ui.round_trip import round_trip
from latent_codec.ui.watching import watch


@pytest.fixture(scope="module")
def desk():
    desk = Desk()
    yield desk
    desk.close()


@pytest.fixture(scope="module")
def photo(desk):
    return read_dropped(desk.image)[0][:, 150:246, 200:296]


def test_a_desk_offers_the_shipped_codecs_and_those_given(tmp_path):
    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "mine")
    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "other" / "mine")
    desk = Desk([tmp_path / "mine", tmp_path / "other" / "mine"])
    assert list(desk.codecs) == [
        "mine",
        str(tmp_path / "other" / "mine"),
        "default",
        "default-16",
        "default-eq",
        "default-rd",
        "default-vq",
        "garments",
    ]
    without_rates = ("default-eq", "garments")
    assert desk.compressing == [name for name in desk.codecs if name not in without_rates]
    assert desk.codec("mine") is desk.codec("mine")
    assert desk.codec_of(desk.codec("default-vq").space_fingerprint) is desk.codec("default-vq")
    with pytest.raises(ValueError, match=r"another codec .space 0000"):
        desk.codec_of("0000")
    for name in ("/etc", "../mine", "nothing"):
        with pytest.raises(ValueError, match=r"expected one of mine, .*garments, got"):
            desk.codec(name)
        with pytest.raises(ValueError, match="expected one of tiny"):
            desk.pipeline_folder(name)
    desk.close()
    assert not desk.folder.exists()


def test_a_desk_refuses_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nothing does not exist"):
        Desk(["nothing"])
    with pytest.raises(ValueError, match=r"found no model_index.json"):
        Desk(pipelines=[tmp_path])


def test_what_is_dropped_is_bounded(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((20, 3000, 3), np.uint8)).save(tmp_path / "wide.png")
    image, (said,) = read_dropped(tmp_path / "wide.png")
    assert image.shape == (3, 7, 1024) and said.startswith("shrunk from 3000x20 to 1024x7 px")
    with pytest.raises(ValueError, match="drop an image first"):
        read_dropped(None)
    monkeypatch.setattr(desk_module, "MAX_PIXELS", 50_000)
    with pytest.raises(ValueError, match=r"^wide.png: expected at most 50,000 pixels, got 3000x20"):
        read_dropped(tmp_path / "wide.png")
    monkeypatch.setattr(desk_module, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"^wide.png: expected a file of at most"):
        read_dropped(tmp_path / "wide.png")


def test_round_trip(desk, photo):
    codec = desk.codec("default")
    found = round_trip(codec, photo)
    assert found.original.size == found.reconstruction.size == found.difference.size == (96, 96)
    expected = codec.roundtrip(photo, output_type="pt")
    assert float(found.figures["PSNR"].removesuffix(" dB")) == pytest.approx(
        psnr(expected, photo[None]).item(), abs=0.05
    )
    assert found.figures["latents"] == "4x12x12: 48 times fewer numbers"
    assert "LPIPS" in found.figures and found.notes == []


def test_a_codec_of_one_vector_takes_the_middle_square(desk, photo):
    found = round_trip(desk.codec("garments"), photo[:, :, :100])
    assert found.original.size == (28, 28) and "28x28 px" in found.notes[0]


def test_no_lpips_says_why(desk, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert (
        round_trip(desk.codec("garments"), photo).figures["LPIPS"].startswith("- (its weights squeezenet1_1")
    )


def test_compare_at_equal_bytes(desk, photo):
    told = []
    found = compare(
        {name: desk.codec(name) for name in ("default", "default-vq")},
        ["webp", "jpeg"],
        photo,
        0.35,
        lambda *each: told.append(each),
    )
    assert [each.name for each in found] == ["original", "default", "default-vq", "webp", "jpeg"]
    bound = 0.35 * 96 * 96 / 8
    assert [each.note for each in found] == ["", "", "it has one rate, its own", "", "larger: its coarsest"]
    assert all(0.7 * bound < found[place].trial.num_bytes <= bound for place in (1, 3))
    assert found[4].trial.num_bytes > bound
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    with pytest.raises(ValueError, match="tick one"):
        compare({}, [], photo, 1.0)
    with pytest.raises(ValueError, match="1 channels"):
        compare({"garments": desk.codec("garments")}, [], photo, 1.0)


def test_a_file_arrives_in_sections(desk, photo):
    codec = desk.codec("default")
    file = compress_to(codec, photo, 0.4)
    assert len(file.data) <= 0.4 * 96 * 96 / 8
    assert space_of(file.data) == codec.space_fingerprint
    assert (
        stages(file.data)[-1] == len(file.data)
        and len(stages(file.data)) == unpack(file.data).header.num_layers == 4
    )
    images = [image for image, _ in arriving(codec, file.data)]
    errors = [np.square(np.asarray(image, float) - np.asarray(file.image, float)).mean() for image in images]
    assert all(late < early for early, late in pairwise(errors)) and errors[-1] == 0
    assert open_file(codec, file.data).image.tobytes() == file.image.tobytes()


def test_indices_have_one_rate(desk, photo):
    file = compress_to(desk.codec("default-vq"), photo, 0.05)
    assert "one rate" in file.figures["rate"]


def test_other_files_are_no_compressed_images(desk):
    for data, words in ((b"no", "not a compressed file"), (b"\x8cLCF\x01", "cut short")):
        with pytest.raises(ValueError, match=words):
            space_of(data)


def test_channels(desk, photo):
    found = channels(desk.codec("default"), photo)
    assert len(found.images) == 4 and found.images[0][1].startswith("0: mean ")
    assert min(found.images[0][0].size) >= 128 and found.histograms.width > 500
    assert found.note == "default-f8c4: 96x96 px -> 4 channels of 12x12"


def test_morph(desk, tmp_path):
    images = [garment(label).float() / 127.5 - 1 for label in ("sneaker", "boot")]
    found = morphed(desk.codec("garments"), *images, tmp_path / "morph.webp", steps=4)
    with Image.open(found.animation) as animation:
        assert animation.n_frames == 6
    assert found.strip.width > 4 * 80 and "one vector per image" in found.note


def test_dimensions_and_attributes_are_turned(desk):
    codec = desk.codec("garments")
    image = garment("dress").float() / 127.5 - 1
    start = vector(codec, image)
    strongest = strongest_dimensions(codec, image, 3)
    assert len(start) == 16 and len(set(strongest)) == 3
    as_it_is = turned(codec, start, {})
    again = turned(codec, start, {strongest[0]: start[strongest[0]]})
    assert as_it_is.tobytes() == again.tobytes() != turned(codec, start, {strongest[0]: 3.0}).tobytes()
    direction = fit_attribute(codec, Garments(), f"class={CLASSES.index('sandal')}")
    assert direction.auc > 0.8
    assert turned(codec, start, {}, direction, 1.0).tobytes() != as_it_is.tobytes()
    with pytest.raises(ValueError, match="one vector per image"):
        vector(desk.codec("default"), image)
    with pytest.raises(ValueError, match="not of tiny"):
        turned(one_vector_codec(), [0.0] * 4, {}, direction, 1.0)


def test_garments_are_of_every_class():
    assert len(Garments()) == len(CLASSES) * PER_CLASS
    assert Garments().label(PER_CLASS) == 1 and Garments().read(0).shape == (3, 28, 28)


def test_what_is_not_hidden_stays(desk):
    pipeline = load_pipeline("fashion-mnist")
    completion = Completion(pipeline, garment("boot").float() / 127.5 - 1)
    hidden = hidden_cells("top half", completion.rows, completion.columns)
    assert len(hidden) == 3 * 7
    told = []
    images = completion.drawn(hidden, ["boot"], num_images=2, on_progress=lambda *each: told.append(each))
    assert len(images) == 2 and told[-1] == (49, 49)
    as_it_is = np.asarray(completion.shown(set()), float)
    scale = as_it_is.shape[0] // 28
    bottom = slice(20 * scale, None)  # further from what was hidden than the decoder sees
    assert np.abs(np.asarray(images[0], float)[bottom] - as_it_is[bottom]).mean() < 6
    assert completion.cell_at(0, as_it_is.shape[0] - 1) == (6, 0)
    shown = np.asarray(completion.shown(hidden), float)
    assert shown[: 12 * scale].std() < as_it_is[: 12 * scale].std()


def test_parts_of_the_grid():
    assert hidden_cells("all", 7, 7) == {(row, column) for row in range(7) for column in range(7)}
    assert hidden_cells("top half", 7, 7) | hidden_cells("bottom half", 7, 7) < hidden_cells("all", 7, 7)
    assert all(hidden_cells(part, 3, 5) <= hidden_cells("all", 3, 5) for part in PARTS)


def test_watch_shows_every_step(desk):
    folder = desk.pipeline_folder(TINY)
    assert (folder / "vae" / "preview.safetensors").is_file()
    linear = list(watch(folder, "a cat", steps=3))
    assert [each.is_final for each in linear[-2:]] == [False, True]
    assert linear[-2].step == 3 and "x_0 by the linear preview, 16x16 px" in linear[-2].caption
    full = list(watch(folder, "a cat", steps=1, kind="full"))
    assert "128x128 px" in full[0].caption
    with pytest.raises(ValueError, match="no tiny decoder"):
        next(watch(folder, "a cat", kind="tiny"))
    with pytest.raises(ValueError, match="steps: expected 1 to 200, got 0"):
        next(watch(folder, "a cat", steps=0))


def test_watching_stops_when_nobody_watches(desk):
    watching = watch(desk.pipeline_folder(TINY), "a cat", steps=200)
    next(watching)
    watching.close()  # which waits for the pipeline, and would take minutes


def test_a_port_that_is_taken_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port
    with pytest.raises(OSError, match=r"203.0.113.1"):
        free_port("203.0.113.1", 7860)
