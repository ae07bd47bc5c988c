"""Images of more than 8 bits: read with all their bits, latents that know their range, the same units back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.images.decoding import ImageError
from latent_codec.images.origins import GrayOrigin, UnknownOriginError, origin_from_json
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import read_image, to_image

RAMP = np.linspace(0, 65535, 20 * 24).reshape(20, 24)


def _written(folder, name, array):
    Image.fromarray(array).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "array", "value_range"),
    [
        ("a.png", RAMP.astype(np.uint16), None),
        ("a.png", (RAMP / 16).astype(np.uint16), (0, 4095)),
        ("a.tif", RAMP.astype(np.uint16), None),
        ("a.tif", RAMP.astype(np.int32) - 1024, (-1024, 64511)),
        ("a.tif", (RAMP / 2**16).astype(np.float32), None),
        ("a.tif", (RAMP - 1000.5).astype(np.float32), (-1000.5, 64534.5)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_of_more_than_8_bits_comes_back(tmp_path, name, array, value_range, channels):
    source = open_source(_written(tmp_path, name, array), value_range=value_range)
    origin = source.origin(0)
    image = source.image(0, channels)
    assert image.shape == (channels, 20, 24) and image.abs().max() <= 1
    out = tmp_path / f"out{origin.suffix}"
    origin_from_json(json.loads(json.dumps(origin.to_json()))).write(image, out)
    with Image.open(out) as written:
        found = np.array(written)
    if array.dtype == np.float32:  # whose last bits [-1, 1] in float32 cannot hold at every value
        assert np.abs(found - array).max() <= 2e-7 * (origin.high - origin.low)
        assert found.dtype == np.float32
    else:
        assert np.array_equal(found, array)
    assert out.suffix == f".{name[2:]}"


def test_8_bits_have_no_origin_and_the_same_pixels(tmp_path):
    path = _written(tmp_path, "a.png", (RAMP / 257).astype(np.uint8))
    for value_range in (None, (0, 100)):
        source = open_source(path, value_range=value_range)
        assert source.origin(0) is None
        assert torch.equal(source.read(0, 1), torch.from_numpy((RAMP / 257).astype(np.uint8))[None])


def test_arrays_of_any_type_take_a_range():
    image = to_image(np.array([[-1024, 3071], [1023, 9999]], np.int16), channels=1, value_range=(-1024, 3071))
    torch.testing.assert_close(image, torch.tensor([[[-1.0, 1.0], [2047 / 2047.5 - 1, 1.0]]]))
    with pytest.raises(ValueError, match="2 of 4 values are NaN or infinite: replace them"):
        to_image(np.array([[0, np.nan], [np.inf, 1]]), channels=1, value_range=(0, 1))
    for value_range in ((1, 1), (2, 1), (0, float("nan")), (0, "1"), (-1e308, 1e308)):
        with pytest.raises(ValueError, match="two finite numbers"):
            to_image(np.zeros((8, 8)), channels=1, value_range=value_range)


def test_volumes_without_their_package_say_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("latent_codec.images.volume_names.find_spec", lambda name: None)
    (tmp_path / "scans").mkdir()
    for name, package in (("a.dcm", "DICOM is read by pydicom"), ("b.nii.gz", "NIfTI is read by nibabel")):
        (tmp_path / "scans" / name).write_bytes(b"voxels")
        with pytest.raises(ImageError, match=rf'{package}: pip install "latent-codec\[medical\]"'):
            open_source(tmp_path / "scans" / name)
    (tmp_path / "scans" / "c").write_bytes(bytes(128) + b"DICM")
    _written(tmp_path / "scans", "d.png", RAMP.astype(np.uint16))
    assert len(open_source(tmp_path / "scans")) == 1
    assert "2 .dcm" not in caplog.text and caplog.text.count("latent-codec[medical]") == 2


def test_values_without_a_known_range_and_nan_say_what_to_do(tmp_path):
    path = _written(tmp_path, "a.tif", RAMP.astype(np.float32))
    with pytest.raises(ImageError, match="or state the value range"):
        read_image(path)
    hole = RAMP.astype(np.float32)
    hole[3, 4] = np.nan
    path = _written(tmp_path, "b.tif", hole)
    for value_range in (None, (0, 1)):
        with pytest.raises(ImageError, match="1 of 480 values are NaN or infinite: replace"):
            read_image(path, value_range=value_range)


@pytest.mark.parametrize(
    "found",
    [
        None,
        7,
        {},
        {"kind": 3},
        {"kind": "gray"},
        {"kind": "gray", "dtype": "uint16", "low": 0, "high": 1, "form": "png", "path": "/etc/passwd"},
        {"kind": "gray", "dtype": "uint16", "low": 1, "high": 0, "form": "png"},
        {"kind": "gray", "dtype": "uint16", "low": 0, "high": float("inf"), "form": "png"},
        {"kind": "gray", "dtype": "uint16", "low": 0, "high": 10**400, "form": "png"},
        {"kind": "gray", "dtype": "object", "low": 0, "high": 1, "form": "png"},
        {"kind": "gray", "dtype": ["uint16"], "low": 0, "high": 1, "form": "png"},
        {"kind": "gray", "dtype": "uint16", "low": 0, "high": 1, "form": "../../x"},
        {"kind": "gray", "dtype": "uint16", "low": True, "high": "x", "form": "png"},
    ],
)
def test_hostile_origins_are_refused(found):
    with pytest.raises(ValueError):
        origin_from_json(found)


def test_an_origin_of_a_later_version_says_so():
    with pytest.raises(UnknownOriginError, match="got 'hologram'; update latent-codec"):
        origin_from_json({"kind": "hologram"})


def test_three_channels_are_weighted_as_reading_weights_them():
    origin = GrayOrigin(dtype="uint16", low=0, high=1001)
    image = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 8, 8)
    gray = to_image(image, channels=1)
    assert np.array_equal(origin.restore(image), origin.restore(gray))
