"""DICOM and NIfTI: the same voxels, values and geometry back, and nothing else of the headers."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.commands import fails, files_in
from PIL import Image

from latent_codec.cli import main
from latent_codec.images.decoding import ImageError
from latent_codec.images.origins import Wholes, origin_from_json
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import write_image
from latent_codec.images.volumes import SliceOrigin, upright
from latent_codec.images.windows import window_range

OBLIQUE = np.array([[-1.9, 0.3, 0.2, 90], [0.25, 1.8, -0.9, -126], [0.2, 0.8, 2.9, -72], [0, 0, 0, 1]])
SECRETS = ("Doe^Jane", "19700101", "1.2.826.0.1.3680043", "St. Elsewhere", "MRN-4711")


@pytest.fixture(scope="module")
def nibabel():
    return pytest.importorskip("nibabel", reason="needs latent-codec[medical]")


@pytest.fixture(scope="module")
def pydicom():
    return pytest.importorskip("pydicom", reason="needs latent-codec[medical]")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks
    ).save_pretrained(folder)
    return folder


def _random(shape, dtype="int16", low=-1000, high=3000):
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def _nifti(nibabel, path, voxels, affine=OBLIQUE, slope=None, inter=None, **header):
    path.parent.mkdir(exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.header["descrip"] = SECRETS[0]
    image.header["aux_file"] = SECRETS[4]
    image.header.set_slope_inter(slope, inter)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def _dicom(pydicom, path, pixels, syntax="1.2.840.10008.1.2.1", **entries):
    is_big = syntax == "1.2.840.10008.1.2.2"
    meta = pydicom.dataset.FileMetaDataset()
    dataset = pydicom.dataset.FileDataset(
        str(path), {}, file_meta=meta, preamble=bytes(128), is_implicit_VR=False, is_little_endian=not is_big
    )
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{SECRETS[2]}.1"
    frames = pixels.shape[0] if pixels.ndim == 3 else 1
    known = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": f"{SECRETS[2]}.1",
        "SeriesInstanceUID": f"{SECRETS[2]}.2",
        "PatientName": SECRETS[0],
        "PatientBirthDate": SECRETS[1],
        "PatientID": SECRETS[4],
        "InstitutionName": SECRETS[3],
        "Modality": "MR",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "HighBit": pixels.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelSpacing": [0.7, 0.5],
        "SliceThickness": 3,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-10, -20, 30],
    } | ({"NumberOfFrames": frames} if frames > 1 else {})
    for name, value in (known | entries).items():
        if value is not None:
            setattr(dataset, name, value)
    data = pixels.astype(pixels.dtype.newbyteorder(">" if is_big else "<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def _written_again(source, tmp_path):
    """The volume of a source's slices, through their origins as JSON, as a file."""
    wholes, parts = Wholes(), None
    for index in range(len(source)):
        origin = origin_from_json(json.loads(json.dumps(source.origin(index).to_json())))
        assert parts is None
        parts = wholes.add(origin, origin.part(source.image(index, 3)))
    parts[0][0].write_parts(parts, tmp_path / "again.nii.gz")
    return tmp_path / "again.nii.gz"


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "scale"),
    [
        ("a.nii.gz", (9, 11, 8), "int16", (None, None)),
        ("a.nii", (9, 11, 8), "uint16", (0.25, -100)),
        ("a.nii", (9, 11, 8), ">i2", (-2, 7)),
        ("a.nii.gz", (9, 11, 8, 3), "uint8", (None, None)),
        ("a.nii", (8, 10, 9, 2), "float32", (None, None)),
        ("a.nii", (9, 12, 10), "int32", (None, None)),
    ],
)
def test_nifti_volumes_come_back(tmp_path, nibabel, name, shape, dtype, scale, axis):
    voxels = _random(shape, dtype, 0 if "u" in dtype else -1000, 250 if dtype == "uint8" else 3000)
    original = nibabel.load(_nifti(nibabel, tmp_path / name, voxels, slope=scale[0], inter=scale[1]))
    source = open_source(tmp_path / name, axis=axis)
    assert len(source) == shape[axis] * int(np.prod(shape[3:]))
    assert source.image(0, 1).shape[1:] == source.size(0)
    again = nibabel.load(_written_again(source, tmp_path))
    assert again.shape == original.shape and again.get_data_dtype() == np.dtype(dtype).newbyteorder("=")
    if dtype == "float32":
        np.testing.assert_allclose(again.get_fdata(), original.get_fdata(), atol=4000 * 2e-7)
    else:
        assert np.array_equal(again.dataobj.get_unscaled(), original.dataobj.get_unscaled())
        np.testing.assert_allclose(again.get_fdata(), original.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(again.affine, original.affine, rtol=1e-6)
    assert again.header.get_zooms()[3:] == original.header.get_zooms()[3:]


def test_nifti_of_two_sides_and_one_slice(tmp_path, nibabel):
    flat = _random((9, 12))
    assert len(open_source(_nifti(nibabel, tmp_path / "flat.nii", flat))) == 1
    again = nibabel.load(_written_again(open_source(tmp_path / "flat.nii"), tmp_path))
    assert np.array_equal(again.get_fdata()[:, :, 0], flat)
    _nifti(nibabel, tmp_path / "thin.nii.gz", np.full((9, 12, 1), 7, np.int16))
    again = nibabel.load(_written_again(open_source(tmp_path / "thin.nii.gz"), tmp_path))
    assert (again.get_fdata() == 7).all() and again.shape == (9, 12, 1)


def test_slices_are_shown_as_radiologists_look_at_them(tmp_path, nibabel):
    voxels = np.zeros((10, 11, 12), np.int16)
    voxels[9, :, :] = 1  # right
    voxels[:, 10, :] = 2  # front
    voxels[:, :, 11] = 3  # head
    for flips in ((1, 1, 1), (-1, 1, 1), (1, -1, -1)):
        turned = voxels[:: flips[0], :: flips[1], :: flips[2]].transpose(2, 0, 1)
        affine = np.diag([*flips, 1.0])[:, [2, 0, 1, 3]]
        _nifti(nibabel, tmp_path / "a.nii", np.ascontiguousarray(turned), affine)
        for axis, (rows, columns), (top, left) in (
            (0, (11, 10), (2, 1)),  # axial: face up, right hand left
            (1, (12, 11), (3, 2)),  # sagittal: head up, face left
            (2, (12, 10), (3, 1)),  # coronal: head up, right hand left
        ):
            source = open_source(tmp_path / "a.nii", axis=axis)
            image = source.origin(5).restore(source.image(5, 1))
            assert image.shape == (rows, columns)
            assert (image[0, 1:-1] == top).all() and (image[1:, 0] == left).all()


@pytest.fixture
def series(tmp_path, pydicom):
    """Five slices of computed tomography, their files in no order, and their values in Hounsfield units."""
    folder, values = tmp_path / "chest", _random((5, 10, 12), "int16", -1000, 1000)
    folder.mkdir()
    for place, name in enumerate(("e", "a", "d", "c", "b")):
        _dicom(
            pydicom,
            folder / name,
            (values[place] + 1024).astype(np.uint16),
            Modality="CT",
            RescaleSlope=1,
            RescaleIntercept=-1024,
            InstanceNumber=9 - place,
            ImagePositionPatient=[-10, -20, 30 + 2.5 * place],
            BitsStored=12,
            HighBit=11,
        )
    return folder, values


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_series_becomes_a_volume_in_the_order_of_its_places(series, nibabel, tmp_path, axis):
    folder, values = series
    if axis != 2:
        values = np.concatenate([values, values[::-1]])
        for place in range(5, 10):  # at least eight slices, for images of eight rows
            found = values[place] + 1024
            _dicom(
                pytest.importorskip("pydicom"),
                folder / f"x{place}",
                found.astype(np.uint16),
                Modality="CT",
                RescaleSlope=1,
                RescaleIntercept=-1024,
                ImagePositionPatient=[-10, -20, 30 + 2.5 * place],
                BitsStored=12,
                HighBit=11,
            )
    source = open_source(folder, axis=axis)
    assert source.origin(0).describe() == "-1024 to 3071 HU" and source.origin(0).volume == "chest"
    again = nibabel.load(_written_again(source, tmp_path))
    assert np.array_equal(again.get_fdata(), values.transpose(2, 1, 0))
    expected = [[-0.5, 0, 0, 10], [0, -0.7, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(again.affine, expected)
    if axis == 2:  # as it is stored
        assert np.array_equal(source.origin(3).restore(source.image(3, 1)), values[3])


def test_a_gap_and_several_times_make_several_volumes(series, pydicom, caplog):
    folder, _ = series
    (folder / "d").unlink()
    names = [open_source(folder).origin(index).volume for index in range(4)]
    assert names == ["chest", "chest", "chest-2", "chest-2"] and "is 2 volumes" in caplog.text
    for name in ("e", "a"):
        dataset = pydicom.dcmread(folder / name)
        dataset.InstanceNumber += 100
        dataset.save_as(folder / f"{name}-later")
    assert sorted(len(found[0]) for found in open_source(folder).slices) == [2] * 6


@pytest.mark.parametrize(
    ("pixels", "entries"),
    [
        (_random((9, 10), "uint16", 0, 4000), {"PhotometricInterpretation": "MONOCHROME1"}),
        (_random((9, 10), "int16"), {"RescaleSlope": "0.684", "RescaleIntercept": "200.5"}),
        (_random((9, 10), "int16"), {"RescaleSlope": "-3", "PhotometricInterpretation": "MONOCHROME1"}),
        (_random((9, 10), "int16"), {"syntax": "1.2.840.10008.1.2.2"}),
        (_random((9, 10), "uint8", 0, 250), {}),
        (_random((4, 9, 10), "uint16", 0, 4000), {"GridFrameOffsetVector": [0, 2, 4, 6]}),
        (_random((3, 9, 10), "uint32", 0, 10**6), {"Modality": "RTDOSE", "DoseGridScaling": "1e-6"}),
        (_random((9, 10), "int16"), {"PixelSpacing": None, "ImageOrientationPatient": None}),
        (_random((9, 10), "int16"), {"ImageOrientationPatient": [0.8, 0.6, 0, 0, 0, -1]}),
        (_random((9, 10), "int16"), {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}),
    ],
)
def test_dicom_comes_back_to_the_last_bit(tmp_path, pydicom, nibabel, pixels, entries):
    path = _dicom(pydicom, tmp_path / "a.dcm", pixels, **entries)
    source = open_source(path)
    again = nibabel.load(_written_again(source, tmp_path))
    stacked = pixels if pixels.ndim == 3 else pixels[None]
    assert np.array_equal(again.dataobj.get_unscaled(), stacked.transpose(2, 1, 0))
    slope = float(entries.get("RescaleSlope", entries.get("DoseGridScaling", 1)))
    values = pixels * slope + float(entries.get("RescaleIntercept", 0))
    low = 0 if pixels.dtype == np.uint8 else values.min()
    np.testing.assert_allclose(source.origin(0).low, low, rtol=1e-9)
    brightest = np.unravel_index(values.argmax(), values.shape)[-2:]
    dark = entries.get("PhotometricInterpretation") == "MONOCHROME1"
    if pixels.ndim == 2 and low and np.abs(entries.get("ImageOrientationPatient") or [1, 0])[0] == 1:
        assert source.image(0, 1)[0][brightest] == (-1 if dark else 1)


def test_frames_have_their_places_and_scale_in_functional_groups(tmp_path, pydicom, nibabel):
    def group(**entries):
        dataset = pydicom.Dataset()
        for name, value in entries.items():
            setattr(dataset, name, [value] if isinstance(value, pydicom.Dataset) else value)
        return dataset

    shared = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        PixelMeasuresSequence=group(PixelSpacing=[2, 1.5], SliceThickness=9),
        PixelValueTransformationSequence=group(RescaleSlope="0.5", RescaleIntercept="-10"),
    )
    frames = [
        group(PlanePositionSequence=group(ImagePositionPatient=[4 * place, 5, 6])) for place in range(3)
    ]
    pixels = _random((3, 9, 10), "int16")
    unknown = dict.fromkeys(("PixelSpacing", "SliceThickness", "ImageOrientationPatient"))
    path = _dicom(
        pydicom,
        tmp_path / "enhanced.dcm",
        pixels,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
        ImagePositionPatient=None,
        **unknown,
    )
    again = nibabel.load(_written_again(open_source(path), tmp_path))
    assert np.array_equal(again.get_fdata(), pixels.transpose(2, 1, 0) * 0.5 - 10)
    expected = [[0, 0, -4, 0], [-1.5, 0, 0, -5], [0, -2, 0, 6], [0, 0, 0, 1]]
    np.testing.assert_allclose(again.affine, expected)


def test_padding_does_not_stretch_the_range(tmp_path, pydicom):
    pixels = _random((9, 10), "int16", 0, 1000)
    pixels[0] = -30000
    path = _dicom(pydicom, tmp_path / "a.dcm", pixels, PixelPaddingValue=-30000)
    source = open_source(path)
    assert source.origin(0).low == pixels[1:].min()
    assert (source.origin(0).restore(source.image(0, 1))[0] == pixels[1:].min()).all()
    assert open_source(path, value_range=("min", "max")).origin(0).low == -30000
    assert open_source(path, value_range=(0, "max")).origin(0).low == 0


def test_values_of_another_scale_in_each_file_are_in_their_unit(tmp_path, pydicom, nibabel):
    (tmp_path / "pet").mkdir()
    pixels = _random((3, 9, 10), "uint16", 0, 4000)
    for place, slope in enumerate((0.5, 2, 3.25)):
        where = {"ImagePositionPatient": [0, 0, 3 * place], "Modality": "PT", "RescaleSlope": slope}
        _dicom(pydicom, tmp_path / "pet" / f"{place}.dcm", pixels[place], **where)
    again = nibabel.load(_written_again(open_source(tmp_path / "pet"), tmp_path))
    values = pixels * np.array([0.5, 2, 3.25])[:, None, None]
    np.testing.assert_allclose(again.get_fdata(), values.transpose(2, 1, 0), atol=13000 * 2e-7)


def test_computed_tomography_beyond_its_usual_range_is_clamped_with_a_note(tmp_path, pydicom, caplog):
    path = _dicom(pydicom, tmp_path / "a.dcm", np.full((9, 10), 9000, np.int16), Modality="CT")
    assert (open_source(path).image(0, 1) == 1).all()
    assert "those beyond -1024 and 3071 are clamped: state another value range" in caplog.text


def test_files_of_pydicom_come_back_to_the_last_bit(pydicom, tmp_path):
    names = ("CT_small", "MR_small_bigendian", "MR_small_RLE", "rtdose", "examples_overlay", "liver_1frame")
    for name in names:
        path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        source = open_source(path, value_range=("min", "max"))
        for index in range(len(source)):
            volume, number = source.slice(index)
            assert np.array_equal(source.origin(index).stored(source.image(index, 3)), volume.stored(number))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("examples_rgb_color", r"DICOM in color \(RGB\), and only gray is read: save its frames as PNG"),
        ("examples_palette", r"DICOM in color \(PALETTE COLOR\)"),
        ("JPEGLSNearLossless_16", r"packed as JPEG-LS .* needs a plugin of pydicom: pip install pylibjpeg"),
        ("MR_truncated", "damaged or cut short"),
    ],
)
def test_dicom_that_cannot_be_read_says_what_to_do(pydicom, name, message):
    source = open_source(pydicom.data.get_testdata_file(f"{name}.dcm", download=False))
    with pytest.raises(ImageError, match=message) as caught:
        source.image(0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="no images: DICOM without an image"):
        open_source(pydicom.data.get_testdata_file("rtplan.dcm", download=False))


def test_nifti_that_cannot_be_read_says_what_to_do(tmp_path, nibabel):
    holes = np.ones((9, 10, 8), np.float32)
    holes[0, 0, :2] = np.nan
    path = _nifti(nibabel, tmp_path / "holes.nii", holes)
    with pytest.raises(ImageError, match="1 of 90 voxels are NaN or infinite: replace them"):
        open_source(path).image(4)
    bad = {
        "text.nii": b"no volume",
        "empty.nii.gz": b"",
        "short.nii.gz": gzip.compress(path.read_bytes()[:600]),
        "short.nii": path.read_bytes()[:-9],
        "bomb.nii.gz": gzip.compress(path.read_bytes()[:42] + b"\x30\x75" * 3 + path.read_bytes()[48:]),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name}: .*(damaged or cut short|no file)"):
            open_source(tmp_path / name).image(0)
    small = _nifti(nibabel, tmp_path / "small.nii", np.ones((4, 9, 9), np.int16))
    with pytest.raises(ImageError, match=r"slices of 4x9 voxels .* are too few"):
        open_source(small).image(0)
    color = np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ImageError, match=r"its voxels are color, and uint8, .* are read: convert them"):
        open_source(_nifti(nibabel, tmp_path / "color.nii", color)).image(0)


def test_commands_keep_units_and_geometry_and_no_secret(series, codec, nibabel, pydicom, tmp_path, capsys):
    folder, values = series
    volume = _nifti(nibabel, tmp_path / "brain.nii.gz", _random((9, 11, 8)))
    Image.fromarray(np.full((9, 9), 700, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "brain.json").write_text(json.dumps({"PatientName": SECRETS[0]}))
    data = list(map(str, (folder, volume, tmp_path / "deep.png")))
    out = tmp_path / "out"
    names = "--codec", str(codec)
    assert main(["encode", *data, *names, "--out", str(out / "latents")]) == 0
    assert main(["decode", str(out / "latents"), *names, "--out", str(out / "decoded")]) == 0
    assert sorted(files_in(out / "latents")) == ["brain.safetensors", "chest.safetensors", "deep.safetensors"]
    assert sorted(files_in(out / "decoded")) == ["brain.nii.gz", "chest.nii.gz", "deep.png"]
    for name, original in (("brain", nibabel.load(volume)), ("chest", None)):
        decoded = nibabel.load(out / "decoded" / f"{name}.nii.gz")
        assert decoded.shape == (original.shape if original else (12, 10, 5))
        if original:
            np.testing.assert_allclose(decoded.affine, original.affine, rtol=1e-6)
    with Image.open(out / "decoded" / "deep.png") as written:
        assert np.array(written).dtype == np.uint16

    one = str(out / "all.safetensors")
    assert main(["encode", *data, *names, "--limit", "5", "--out", one]) == 0
    assert main(["decode", one, *names, "--out", str(out / "some")]) == 0
    assert "of 8 slices of brain: written one by one" in capsys.readouterr().err
    assert {name[:5] for name in files_in(out / "some")} == {"brain", "chest"}

    shown = ["decode", str(out / "latents" / "chest.safetensors"), *names, "--window", "lung"]
    assert main([*shown, "--out", str(out / "shown")]) == 0
    assert sorted(files_in(out / "shown")) == [f"{name}.png" for name in "abcde"]
    capsys.readouterr()
    assert main(["roundtrip", str(folder), *names, "--json", "--out", str(out / "rt")]) == 0
    (found, *_) = results = json.loads(capsys.readouterr().out)["images"]
    assert (
        found["unit"] == "HU"
        and found["value_range"] == [-1024, 3071]
        and found["rmse"] < found["largest_error"]
    )
    assert found["psnr"] == pytest.approx(20 * np.log10(4095 / found["rmse"]), abs=1e-3)
    again = nibabel.load(results[-1]["decoded_path"]).get_fdata()
    errors = again[:, :, 0].T - values[0]
    assert np.sqrt((errors**2).mean()) == pytest.approx(found["rmse"])

    for name, content in files_in(out).items():
        unpacked = gzip.decompress(content) if name.endswith(".gz") else content
        assert not any(secret.encode() in unpacked for secret in SECRETS), name


@pytest.mark.parametrize("container", ["webdataset", "parquet", "safetensors"])
def test_data_sets_of_latents_keep_units_and_places(codec, nibabel, tmp_path, container):
    _nifti(nibabel, tmp_path / "scans" / "brain.nii", _random((16, 16, 3), "int16", 0, 4000))
    write_image(torch.zeros(3, 16, 16), tmp_path / "scans" / "photo.png")
    names, out = ("--codec", str(codec)), tmp_path / "latents"
    encode = ["encode", str(tmp_path / "scans"), *names, "--format", container, "--shard", "2"]
    assert main([*encode, "--out", str(out)]) == 0
    decode = ["decode", str(out), *names, "--out"]
    assert main([*decode, str(tmp_path / "whole")]) == 0
    assert sorted(files_in(tmp_path / "whole")) == ["brain.nii.gz", "photo.png"]
    found = nibabel.load(tmp_path / "whole" / "brain.nii.gz")
    alone = main(["encode", str(tmp_path / "scans" / "brain.nii"), *names, "--out", str(tmp_path / "alone")])
    assert alone == main(["decode", str(tmp_path / "alone"), *names, "--out", str(tmp_path / "again")]) == 0
    expected = nibabel.load(tmp_path / "again" / "brain.nii.gz")
    assert np.abs(found.get_fdata() - expected.get_fdata()).max() <= 1 and found.shape == (16, 16, 3)

    assert main([*encode, "--size", "8", "--value-range", "0", "max", "--out", str(tmp_path / "small")]) == 0
    assert main(["decode", str(tmp_path / "small"), *names, "--out", str(tmp_path / "tiles")]) == 0
    assert sorted(files_in(tmp_path / "tiles")) == [
        "brain-0.tif",
        "brain-1.tif",
        "brain-2.tif",
        "photo.png",
    ]


def test_compressed_series_are_off_by_no_more_than_their_bound(series, nibabel, pydicom, tmp_path, capsys):
    folder, values = series
    dataset = pydicom.dcmread(folder / "a")
    pixels = dataset.pixel_array.copy()
    pixels[0, :3] = 4095 + 500  # beyond the usual range, which is clamped
    dataset.BitsStored, dataset.HighBit, dataset.PixelData = 16, 15, pixels.tobytes()
    dataset.save_as(folder / "a")
    values = values.copy()
    values[1, 0, :3] = 4095 + 500 - 1024
    for bound in ("4", "0"):
        out = tmp_path / bound
        assert main(["compress", str(folder), "--max-error", bound, "--out", str(out / "small")]) == 0
        assert f"errors at most {bound} HU" in capsys.readouterr().out
        assert main(["decompress", str(out / "small"), "--out", str(out / "large")]) == 0
        assert list(files_in(out / "large")) == ["chest.nii.gz"]
        found = nibabel.load(out / "large" / "chest.nii.gz")
        assert np.abs(found.get_fdata() - values.transpose(2, 1, 0)).max() <= int(bound)
    (tmp_path / "photo").mkdir()
    write_image(torch.zeros(3, 16, 16), tmp_path / "photo" / "a.png")
    err = fails(capsys, "compress", tmp_path / "photo", "--max-error", "1", "--out", tmp_path / "no")
    assert "--max-error: expected none of an image of 8 bits, which has no unit, got 1.0" in err

    one, correction = tmp_path / "4" / "small" / "chest-0.lcf", tmp_path / "4" / "small" / "chest-0.lcr"
    content = correction.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for damage, message in (
        (content[:-9], "its correction is damaged"),
        (b"nothing", "its correction is damaged"),
        (content[:end] + bytes(len(content) - end), "residuals of no known size"),
        (content.replace(b"float", b"float").replace(b"slice", b"slike"), "update latent-codec"),
        ((tmp_path / "0" / "small" / "chest-1.lcr").read_bytes(), "corrects another file"),
    ):
        correction.write_bytes(damage)
        assert main(["decompress", str(one), "--out", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_training_sees_all_bits(nibabel, tmp_path):
    from latent_codec.training.data import TrainingCrops

    path = _nifti(nibabel, tmp_path / "a.nii", _random((16, 16, 3), "int16", 0, 4000))
    source = open_source(path)
    crops = TrainingCrops(source, size=(16, 16), channels=1, flip=False, seed=0)
    crop, image = crops[0], source.image(crops.image_index(0), 1)
    torch.testing.assert_close(crop, image, atol=1e-6, rtol=0)
    assert len(crop.unique()) > len(source.read(crops.image_index(0), 1).unique())


def test_a_window_of_a_photograph_is_refused(codec, tmp_path, capsys):
    write_image(torch.zeros(3, 16, 16), tmp_path / "a.png")
    main(["encode", str(tmp_path / "a.png"), "--codec", str(codec), "--out", str(tmp_path)])
    err = fails(capsys, "decode", tmp_path / "a.safetensors", "--codec", codec, "--window", "lung")
    assert "--window: expected none: a.png has no unit, got 'lung'" in err
    for window in ("lungs", "1", "1,2,3", "1,0", "nan,1"):
        with pytest.raises(ValueError, match="expected CENTER,WIDTH or one of abdomen"):
            window_range(window)


ORIGIN = SliceOrigin(
    volume="brain",
    number=0,
    shape=(9, 11, 8),
    axis=2,
    affine=tuple(OBLIQUE[:3].ravel().tolist()),
    steps=(),
    dtype="int16",
    slope=1,
    intercept=0,
    unit="",
    inverted=False,
    low=0,
    high=1,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [9, 11]},
        {"shape": [9, 11, 0]},
        {"shape": [9, 11, 2**40]},
        {"shape": [9, 11, 8.0]},
        {"shape": 7},
        {"number": 8},
        {"number": -1},
        {"number": True},
        {"axis": 3},
        {"affine": [0] * 12},
        {"affine": [1] * 12},
        {"affine": [float("nan")] * 12},
        {"affine": [1, 0, 0]},
        {"affine": ["1"] * 12},
        {"dtype": "object"},
        {"slope": 0},
        {"slope": float("inf")},
        {"slope": 10**400},
        {"steps": [1]},
        {"unit": "<script>"},
        {"volume": 7},
        {"inverted": 1},
        {"low": 1},
    ],
)
def test_hostile_places_of_slices_are_refused(changes):
    with pytest.raises(ValueError):
        origin_from_json(ORIGIN.to_json() | changes)


def test_hostile_names_and_sizes_stay_in_their_folder(codec, tmp_path, nibabel, capsys):
    _nifti(nibabel, tmp_path / "a.nii", _random((9, 11, 8)))
    latents = tmp_path / "a.safetensors"
    main(["encode", str(tmp_path / "a.nii"), "--codec", str(codec), "--limit", "1", "--out", str(latents)])
    content = latents.read_bytes()
    changed = content.replace(rb"\"volume\": \"a\"", rb"\"volume\": \"/\"", 1)
    assert changed != content and len(changed) == len(content)
    latents.write_bytes(changed)
    out = tmp_path / "out"
    assert main(["decode", str(latents), "--codec", str(codec), "--out", str(out)]) == 0
    assert list(files_in(out)) == ["image-0.nii.gz"]
    latents.write_bytes(content.replace(b"[9, 11, 8]", b"[8, 11, 9]", 1))
    capsys.readouterr()
    assert main(["decode", str(latents), "--codec", str(codec), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "a: expected slices of 11x8 voxels, got 11x9" in err


def test_a_mixed_folder_keeps_its_images_and_their_classes(tmp_path, nibabel):
    for name in ("ill", "well"):
        (tmp_path / name).mkdir()
        write_image(torch.zeros(3, 16, 16), tmp_path / name / "scan.png")
        _nifti(nibabel, tmp_path / name / "scan.nii", _random((9, 11, 8)))
    source = open_source(tmp_path)
    assert len(source) == 18 and [source.label(index) for index in range(18)] == [0] * 9 + [1] * 9
    assert {source.origin(index).volume for index in range(18) if source.slice(index)} == {
        "ill/scan-2",
        "well/scan-2",
    }
    part = source.part([17, 0, 9])
    assert [part.name(index) for index in range(3)] == [source.name(index) for index in (17, 0, 9)]
    assert torch.equal(part.image(1), source.image(0)) and part.origin(2) == source.origin(9)
    assert len({source.key(index) for index in range(18)}) == 18
    assert source.read(0).dtype == torch.uint8


def test_the_way_to_look_at_a_slice_depends_on_its_place_only():
    moved = replace(ORIGIN, affine=tuple(np.array(ORIGIN.affine) + [0, 0, 0, 5] * 3))
    assert upright(moved.affine, 2) == upright(ORIGIN.affine, 2) == ((1, 0), (True, False))
