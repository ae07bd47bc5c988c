"""`--limit N` takes the same images in every verb: items floor(i * total / N) of the listing."""

from pathlib import Path

import pytest
from test_bitstream import build, make_image

from latent_codec.cli import main
from latent_codec.images.sources import spread
from latent_codec.images.tensors import write_image


@pytest.mark.parametrize(
    ("count", "limit", "chosen"),
    [
        (10, 3, [0, 3, 6]),
        (7, 5, [0, 1, 2, 4, 5]),
        (4, 1, [0]),
        (3, 3, [0, 1, 2]),
        (3, 10, [0, 1, 2]),
        (3, None, [0, 1, 2]),
        (0, 2, []),
    ],
)
def test_items_are_evenly_spread(count, limit, chosen):
    assert spread(count, limit) == chosen


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="limit of 0"):
        spread(10, 0)


@pytest.mark.parametrize(
    "verb",
    [
        ["evaluate", "photos", "--out", "report"],
        ["rd", "photos", "--against", "jpeg", "--out", "rd"],
        ["calibrate", "photos", "--out", "calibrated"],
        ["fit-preview", "photos"],
        ["fit-entropy", "photos", "--static"],
    ],
    ids=lambda verb: verb[0],
)
def test_every_verb_takes_the_same_images(verb, tmp_path, monkeypatch, capsys):
    """Of ten files three can be read, and they are those that a limit of 3 takes: no other one is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    build("vq").save_pretrained("vq")
    for number in range(10):
        path = Path(f"photos/{number}.png")
        write_image(make_image(32, 40, number), path)
        if number not in (0, 3, 6):
            path.write_bytes(path.read_bytes()[:100])

    assert main([*verb, "--codec", "vq", "--limit", "3"]) == 0

    complaints = capsys.readouterr().err
    assert "photos/" not in complaints and "skipped" not in complaints
