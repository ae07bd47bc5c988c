"""Folders and tars as people have them: every image is read, the rest is counted and named, nothing hangs."""

import argparse
import gzip
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import run_forked
from PIL import Image

from latent_codec.cli.work.opening import NamedImages
from latent_codec.images.decoding import FORMATS, SUFFIXES
from latent_codec.images.files import find_images
from latent_codec.images.sources import LabelError, open_source
from latent_codec.images.tensors import ImageError, read_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def encoded(form: str = "PNG", seed: int = 0, **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(paths, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


# Folders


def test_an_image_is_known_by_its_content_whatever_its_suffix(tmp_path, caplog):
    files = {
        "a.jfif": encoded("JPEG"),
        "b": encoded("PNG"),
        "c.dat": encoded("WEBP"),
        "d.jp2": encoded("JPEG2000"),
        "e.tga": encoded("TGA"),
        "f.ico": encoded("ICO"),
        "g.txt": encoded("TIFF"),
        "h.backup": encoded("BMP"),
    }
    write(tmp_path, files)

    found = find_images(tmp_path)

    assert names(found, tmp_path) == sorted(files)
    for path in found:
        assert read_image(path).shape == (3, 16, 16), path
    assert not caplog.messages


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path, caplog):
    write(
        tmp_path,
        {f"sub/IMG_{n}.HEIC": HEIC for n in range(7)}
        | {
            "phone.backup": HEIC,
            "notes.txt": b"not an image",
            "more.txt": b"",
            "plan.PDF": b"%PDF-1.7",
            "x.png": encoded(),
        },
    )

    assert names(find_images(tmp_path), tmp_path) == ["x.png"]

    (message,) = caplog.messages
    assert message.startswith(f"Note: {tmp_path}: left out ") and "\n" not in message
    assert "7 .heic, 1 .backup (" in message and "sub/IMG_0.HEIC" in message and "...)" in message
    assert "not supported: save as JPEG, PNG or AVIF" in message
    assert "2 .txt, 1 .pdf: no image" in message


def test_a_folder_without_images_says_what_it_has(tmp_path):
    write(tmp_path, {"a.heic": HEIC, "b.txt": b"x"})
    with pytest.raises(
        ImageError, match=r"no images in .*1 \.heic \(a\.heic\): an image format.*1 \.txt: no image"
    ):
        find_images(tmp_path)


def test_formats_are_a_fixed_list_that_starts_no_program(tmp_path, caplog):
    assert not {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FITS"}.intersection(FORMATS)
    assert {form for form in FORMATS if form in Image.OPEN or Image.init()} <= set(Image.OPEN)
    assert {".jpeg", ".mpo", ".png", ".avif", ".tif", ".j2k"} <= SUFFIXES and not {".eps", ".fits"} & SUFFIXES
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    write(tmp_path, {"a.png": drawing, "b.eps": drawing, "c": drawing, "d.png": encoded()})
    assert names(find_images(tmp_path), tmp_path) == ["a.png", "d.png"]
    assert "1 .eps, 1 without suffix (b.eps, c): an image format" in caplog.text
    with pytest.raises(ImageError, match="not an image in a known format"):
        read_image(tmp_path / "a.png")


def test_the_first_of_several_frames_is_taken_and_said_once(tmp_path, caplog):
    frames = [Image.new("RGB", (16, 16), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        path = tmp_path / f"{form}.{form.lower()}"
        frames[0].save(path, form, save_all=True, append_images=frames[1:])
        caplog.clear()
        for _ in range(2):
            assert read_image(path)[0].mean() > 0.9
        assert caplog.messages in (
            [f"Note: {path} has several frames; the first is taken"],
            [f"Note: {path} has several frames; the first is taken; so it is with further images"],
            [],  # after six of them
        )
    caplog.clear()
    frames[0].save(tmp_path / "one.gif")
    read_image(tmp_path / "one.gif")
    assert not caplog.messages


def test_a_thumbnail_in_a_cameras_raw_data_is_not_its_photograph(tmp_path):
    tags = {254: 1}  # NewSubfileType: an image of reduced resolution
    Image.new("RGB", (160, 120)).save(tmp_path / "a.tif", tiffinfo=tags)
    with pytest.raises(ImageError, match="only a thumbnail can be read"):
        read_image(tmp_path / "a.tif")


def test_pipes_links_and_locked_folders_are_named_and_never_waited_for(tmp_path, caplog):
    write(tmp_path, {"good.png": encoded(), "linked/b.png": encoded()})
    os.mkfifo(tmp_path / "p.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "to-good.png").symlink_to("good.png")

    assert names(find_images(tmp_path), tmp_path) == ["good.png", "to-good.png", "linked/b.png"]

    for part in (
        "1 .png (p.png): a named pipe",
        "1 .png (device.png): a device",
        "2 .png (gone.png, self.png): a symbolic link that leads nowhere",
        "1 without suffix (again): a symbolic link to a folder, which is not followed",
    ):
        assert part in caplog.text
    for name, reason in (
        ("p.png", "a named pipe, not a file"),
        ("device.png", "a device, not a file"),
        ("self.png", "a symbolic link that leads"),
    ):
        with pytest.raises(ImageError, match=rf"{name}: {reason}"):
            read_image(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            open_source(tmp_path / name).read(0)
    os.mkfifo(tmp_path / "photos.tar")
    with pytest.raises(OSError, match="a named pipe, not a file"):
        open_source(tmp_path / "photos.tar")


# Names of what is written


def named_images(*paths: Path) -> list[tuple[Path, str]]:
    """Images with the names of what verbs make of them."""
    source = open_source([str(path) for path in paths])
    names = NamedImages(source, argparse.Namespace(verb="encode", limit=None)).names
    return [(source.paths[index], name.as_posix()) for index, name in names.items()]


def test_twins_keep_their_suffixes_and_the_others_do_not(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "a.png.webp", "sub/a.png"):
        write(tmp_path, {name: encoded()})

    named = {path.relative_to(tmp_path).as_posix(): name for path, name in named_images(tmp_path)}

    assert named == {
        "a.png": "a.png",
        "a.jpg": "a.jpg",
        "a.png.webp": "a.png.webp",  # else it would be a.png, too
        "b.png": "b",
        "sub/a.png": "sub/a",
    }
    assert named_images(tmp_path / "b.png", tmp_path / "b.png") == [(tmp_path / "b.png", "b")]
    with pytest.raises(ValueError, match="would both be written as a; name them in separate calls"):
        named_images(tmp_path / "a.png", tmp_path / "sub/a.png")


# Tars


def tar_of(members: list, path: Path) -> Path:
    """Members: (name, content), or a TarInfo without content."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, int]:
    """A tar of 20 images, and how many bytes each takes with its header."""
    path = tar_of(
        [(f"{n:03d}.png", encoded()) for n in range(20)], tmp_path_factory.mktemp("tar") / "whole.tar"
    )
    assert len(open_source(path)) == 20
    return path.read_bytes(), 512 + -(-len(encoded()) // 512) * 512


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda tar, step: tar[: 5 * step] + bytes(512) + tar[5 * step + 512 :],
            "more follows the end-of-archive",
        ),
        (
            lambda tar, step: tar[: 5 * step + 150] + b"~" + tar[5 * step + 151 :],
            "the header at byte .* cannot be",
        ),
        (lambda tar, step: tar[: 10 * step], "without an end-of-archive block"),
        (lambda tar, step: tar[: 10 * step + 100], "without an end-of-archive block"),
        (lambda tar, step: tar[: 10 * step + 700], "no whole, uncompressed tar"),
        (lambda tar, step: tar[: 10 * step] + bytes(2**21), "zeros follow its last member"),
        (lambda tar, step: tar + tar, "several tars joined"),
    ],
)
def test_a_tar_that_does_not_end_well_is_refused(whole, tmp_path, damage, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(damage(*whole))
    with pytest.raises(ValueError, match=reason) as caught:
        open_source(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_end_of_archive_of_one_block_will_do(whole, tmp_path):
    tar, step = whole
    path = tmp_path / "x.tar"
    path.write_bytes(tar[: 20 * step + 512])
    assert len(open_source(path)) == 20


def test_links_in_tars_are_read_and_the_rest_is_named(tmp_path, caplog):
    first, second = encoded(seed=1), encoded(seed=2)
    path = tar_of(
        [
            ("sub/a.png", encoded(seed=3)),
            ("sub/a.png", first),
            ("b.png", second),
            link("hard.png", "b.png", tarfile.LNKTYPE),
            link("sub/soft.png", "../b.png"),
            link("twice.png", "sub/soft.png"),
            link("loop.png", "loop.png"),
            link("gone.png", "elsewhere.png"),
            link("pipe.png", "", tarfile.FIFOTYPE),
            ("IMG_1.HEIC", HEIC),
            ("photo", first),
            ("scan.dat", second),
            ("readme.txt", b"x"),
            ("._b.png", b"hidden"),
        ],
        tmp_path / "x.tar",
    )

    source = open_source(path)

    expected = {
        "sub/a.png": 1,
        "b.png": 2,
        "hard.png": 2,
        "sub/soft.png": 2,
        "twice.png": 2,
        "photo": 1,
        "scan.dat": 2,
    }
    assert [source.name(n) for n in range(len(source))] == [f"x.tar/{name}" for name in expected]
    for number, seed in enumerate(expected.values()):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        assert np.array_equal(source.read(number).permute(1, 2, 0), pixels)
    for part in (
        "1 .png (sub/a.png): a name that is in the tar again",
        "2 .png (loop.png, gone.png): a link to a member that is not in the tar",
        "1 .png (pipe.png): a named pipe",
        "1 .heic (IMG_1.HEIC): an image format",
        "1 .txt: no image",
    ):
        assert part in caplog.text


def test_the_second_image_of_a_sample_is_named(tmp_path, caplog):
    path = tar_of(
        [("a.png", encoded(seed=1)), ("a.jpg", encoded("JPEG")), ("b.png", encoded())], tmp_path / "x.tar"
    )
    assert len(open_source(path)) == 2
    assert "1 .jpg (a.jpg): a further image of its sample, of which the first is read" in caplog.text


def header(name: str, kind: bytes, size: int) -> bytes:
    """A tar header that announces any size, negative ones in GNU's base 256."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = (b"\xff" + size.to_bytes(11, "big", signed=True)) if size < 0 else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return header("pax", tarfile.XHDTYPE, len(records)) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "content",
    [
        header("a.png", tarfile.REGTYPE, -512) + bytes(1024),
        header("a.png", tarfile.REGTYPE, 2**32) + bytes(1024),
        pax(b"32 size=99999999999999999999999\n") + header("a.png", tarfile.REGTYPE, 0) + bytes(1024),
        pax(b"14 size=-5120\n") + header("a.png", tarfile.REGTYPE, 0) + bytes(1024),
        header("pax", tarfile.XHDTYPE, 2**32) + bytes(1024),
        header("pax", tarfile.XHDTYPE, -(2**40)) + bytes(1024),
        header("name", tarfile.GNUTYPE_LONGNAME, 2**21) + bytes(2**21 + 1024),
        pax(b"11 a=12345\n") * 3000 + bytes(1024),
    ],
    ids=[
        "negative",
        "huge",
        "pax-huge",
        "pax-negative",
        "huge-pax",
        "negative-pax",
        "long-name",
        "pax-of-pax",
    ],
)
def test_absurd_sizes_in_tars_are_one_line(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar is no whole, uncompressed tar") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


# Labels


@pytest.mark.parametrize("label", ["[1, 2]", '"cat"', "1.5", "true"])
def test_labels_of_other_types_are_refused_by_name(tmp_path, label):
    source = open_source(tar_of([("a.png", encoded()), ("a.json", label.encode())], tmp_path / "x.tar"))
    with pytest.raises(
        LabelError, match=r"x\.tar/a\.png: its \.json label is .*expected an integer or an object"
    ):
        source.label(0)


def test_encode_stops_at_such_a_label_and_can_leave_labels_out(tmp_path, capsys):
    from test_bitstream import build

    from latent_codec.cli import main
    from latent_codec.latents.latent_files import load_latents

    build("vq").save_pretrained(tmp_path / "vq")
    members = [("a.png", encoded()), ("a.json", b"[1, 2]"), ("b.png", encoded()), ("b.json", b"3")]
    tar_of(members, tmp_path / "x.tar")
    verb = [
        "encode",
        str(tmp_path / "x.tar"),
        "--codec",
        str(tmp_path / "vq"),
        "--out",
        str(tmp_path / "codes"),
    ]

    assert main(verb) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.tar/a.png: its .json label is [1, 2]" in line and "leave labels out by --no-labels" in line
    assert not list(tmp_path.glob("codes/*"))
    assert main([*verb, "--no-labels"]) == 0
    (shard,) = tmp_path.glob("codes/shards/*.safetensors")
    found = load_latents(shard)
    assert (found.names, found.labels) == (["x.tar/a.png", "x.tar/b.png"], [None, None])


def test_nested_labels_are_one_line(tmp_path):
    label = b'{"a":' * 100_000
    source = open_source(tar_of([("a.png", encoded()), ("a.json", label)], tmp_path / "x.tar"))
    with pytest.raises(ValueError, match=r"a\.png: its \.json label cannot be read"):
        source.label(0)


# IDX


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape) + content


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the same bytes in every process, which names of tests come from


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (packed(idx((60_000, 300, 300), bytes(10))), r"announces 5\.0 GiB, .* unpack it by gunzip"),
        (packed(idx((1, 8, 8), bytes(10**6))), "is damaged: 64 values announced, more are there"),
        (packed(idx((2**32 - 1,) * 3, bytes(10))), "announces"),
        (packed(idx((2, 8, 8), bytes(100))), "is cut short: 128 values announced, 100 there"),
        (packed(idx((2, 8, 8), bytes(128)))[:-9], "cannot be read"),
        (
            packed(idx((1, 100, 100), np.random.default_rng(0).bytes(9999)))[:99] + bytes(999),
            "cannot be read",
        ),
        (packed(b"\0\0\x08\3\0"), "its header ends after 5 of 16 bytes"),
        (packed(idx((0, 28, 28), b"")), "is empty: it announces 0x28x28 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_packed_idx_files_are_bounded_and_named(tmp_path, content, reason):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz .*{reason}|.*{reason}") as caught:
        open_source(tmp_path)
    assert "train-images-idx3-ubyte.gz" in str(caught.value)
    assert not isinstance(caught.value, zlib.error)


def test_unpacked_idx_files_are_not_read_into_memory(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx((1000, 100, 100), b""))
    with path.open("r+b") as file:
        file.truncate(16 + 10**7)
    assert isinstance(open_source(tmp_path).images, np.memmap)


# Names that are no UTF-8


def test_names_that_are_no_utf8_go_through_every_verb(tmp_path):
    """In a process of its own: what is tested is how names are written to its output."""
    from test_bitstream import build

    build("vq").save_pretrained(tmp_path / "vq")
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / "photos", {f"{name}.png": encoded(seed=1), "plain.png": encoded(seed=2)})
    tar_of([(f"{name}.png", encoded())], tmp_path / "x.tar")
    verbs = [
        ["encode", "photos"],
        ["decode", "latents"],
        ["compress", "photos"],
        ["decompress", "compressed"],
        ["encode", "x.tar", "--out", "codes"],
        ["decode", "codes", "--out", "of-tar"],
        ["evaluate", "photos", "--out", "report"],
        ["roundtrip", "photos", "--out", "seen", "--json"],
    ]
    program = (
        "import sys, json; from latent_codec.cli import main\n"
        "sys.stdout.reconfigure(encoding='utf-8', errors='strict')\n"  # as with most locales
        "sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps([[*verb, "--codec", "vq"] for verb in verbs])
    done = run_forked(program, arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    for path in (
        "latents/{}.safetensors",
        "decoded/{}.png",
        "compressed/{}.lcf",
        "decompressed/{}.png",
        "of-tar/{}.png",
    ):
        assert (tmp_path / path.format(name)).is_file(), path
        assert path.format(name) in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert [each["name"] for each in found["images"]] == [name, "plain"]


def test_texts_that_go_with_images_are_not_said_to_be_left_out(tmp_path, caplog):
    write(tmp_path, {"a.png": encoded("PNG"), "a.txt": b"a caption", "a.json": b"{}"})
    assert len(find_images(tmp_path)) == 1
    assert not caplog.records
    (tmp_path / "more.pdf").write_bytes(b"x")
    find_images(tmp_path)
    assert "1 .pdf" in caplog.text
