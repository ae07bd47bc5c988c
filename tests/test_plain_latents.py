"""Latents that other programs saved, and tensors whose values cannot be read: decoded, or refused in one line."""

import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.latents import plain_latents
from latent_codec.latents.latent_files import load_latents, save_indices, save_latents
from latent_codec.latents.plain_latents import read_plain_latents
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.tensors import check_dense, check_floating

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}


def complaints(err: str) -> list[str]:
    """Lines of standard error, without notes and without progress, which a busy machine shows."""
    return [line for line in err.splitlines() if line.startswith("latent-codec ") and "Note: " not in line]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codecs") / "mine"
    LatentCodec(diffusers.AutoencoderKL(**BLOCKS, latent_channels=4)).save_pretrained(folder)
    return LatentCodec.from_pretrained(folder)


@pytest.fixture
def z():
    return torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def write(path: Path, z: torch.Tensor) -> Path:
    """Latents `z`, (1, 4, 6, 8), as a file of the kind that the suffix, or the stem, names."""
    if path.suffix == ".npz":
        save = np.savez_compressed if path.stem == "compressed" else np.savez
        save(path, latents=z[0].numpy(), original_size=[128, 96], mask=np.ones((2, 4, 3, 3), np.float32))
    elif path.suffix == ".npy":
        array = z.numpy()
        array = {"columns": np.asfortranarray, "big": lambda a: a.astype(">f4")}.get(path.stem, np.asarray)(
            array
        )
        np.save(path, array[0] if path.stem == "single" else array)
    elif path.stem == "dict":
        torch.save({"latents": z, "step": 3}, path)
    elif path.stem == "legacy":
        torch.save(z, path, _use_new_zipfile_serialization=False)
    else:
        torch.save([z] if path.stem == "list" else z, path)
    return path


FILES = [
    "trainer.npz",
    "compressed.npz",
    "array.npy",
    "single.npy",
    "columns.npy",
    "big.npy",
    "tensor.pt",
    "dict.pt",
    "list.pt",
    "legacy.pth",
]


@pytest.mark.parametrize("name", FILES)
def test_a_plain_file_decodes_with_the_codec_that_is_named(name, codec, z, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, z)
    assert main(["decode", name, "--codec", str(codec.folder)]) == 0
    out, err = capsys.readouterr()
    (path,) = out.splitlines()
    expected = codec.decode(z)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(expected))
    assert "Note: " in err and name in err and "cannot be checked" in err

    assert main(["decode", name]) == 2
    err = capsys.readouterr().err
    assert len(complaints(err)) == 1 and name in err and "--codec" in err and "4, 6, 8" in err


def test_a_folder_of_another_program_is_walked_and_batches_are_numbered(codec, z, tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write(tmp_path / "in" / "sub" / "a.npz", z)
    torch.save(torch.cat([z, z]), tmp_path / "in" / "b.pt")
    (tmp_path / "in" / "notes.txt").write_text("notes")
    out = str(tmp_path / "out")
    assert main(["decode", str(tmp_path / "in"), "--out", out, "--codec", str(codec.folder)]) == 0
    written = sorted(Path(each).relative_to(out).as_posix() for each in capsys.readouterr().out.splitlines())
    assert written == ["b-2.png", "b.png", "sub/a.png"]


def header_of(shape, dtype="<f4") -> bytes:
    """The start of a .npy file that claims an array of this shape."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive_of(member: bytes, method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        archive.writestr("latents.npy", member)
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


LIMIT = 2**20  # in place of MAX_BYTES
HOSTILE = {
    "wrong.npy": (lambda: header_of((1, 3, 6, 8)) + bytes(4 * 144), "with C = 4"),
    "integers.npy": (lambda: header_of((1, 4, 6, 8), "<i4") + bytes(4 * 192), "int32"),
    "huge.npy": (lambda: header_of((1, 4, 2**20, 2**20)), f"at most {LIMIT}"),
    "negative.npy": (lambda: header_of((1, -4, 6, 8)), "negative.npy"),
    "cut.npy": (lambda: header_of((1, 4, 6, 8)) + bytes(9), "cut short"),
    "objects.npy": (lambda: header_of((3,), "|O") + bytes(24), "without numbers"),
    "deep.npy": (lambda: header_of((1,)).replace(b"(1,)", b"(" * 40), "damaged"),
    "bomb.npz": (
        lambda: archive_of(header_of((1, 4, 2**9, 2**8)) + bytes(LIMIT)),
        f"of {LIMIT} bytes",
    ),
    "lying.npz": (lambda: archive_of(header_of((1, 4, 2**8, 2**8))), "cut short"),
    "damaged.npz": (lambda: archive_of(header_of((1, 4, 6, 8)) + bytes(768))[:-30], "zip file"),
    "flipped.npz": (
        lambda: archive_of(header_of((1, 4, 6, 8)) + bytes(768), zipfile.ZIP_STORED).replace(
            b"\0" * 50, b"\1" * 50, 1
        ),
        "CRC",
    ),
    "text.npy": (lambda: b"hello", "no latent file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_one_line(name, codec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plain_latents, "MAX_BYTES", LIMIT)
    make, message = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    assert main(["decode", str(tmp_path / name), "--codec", str(codec.folder)]) == 2
    err = capsys.readouterr().err
    assert message in err and name in err
    assert len(complaints(err)) == 1


def test_a_pickle_that_would_run_code_is_refused(codec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"latents": torch.zeros(1, 4, 2, 2), "more": Payload()}, "evil.pt")
    assert main(["decode", "evil.pt", "--codec", str(codec.folder)]) == 2
    assert len(complaints(capsys.readouterr().err)) == 1
    assert not Path("was-run").exists()


def test_what_is_no_plain_file_is_left_to_others(tmp_path, codec, z):
    save_latents(tmp_path / "own.safetensors", z, codec=codec, names=["a"], sizes=[(12, 16)])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty").touch()
    assert all(read_plain_latents(path) is None for path in tmp_path.iterdir() if path.name != "codecs")


def quantized(z):
    return torch.quantize_per_tensor(z, 0.1, 0, torch.qint8)


ODD = {
    "nested": (lambda z: torch.nested.nested_tensor([z[0], z[0]]), "nested"),
    "sparse": (lambda z: z.to_sparse(), "sparse"),
    "meta": (lambda z: z.to("meta"), "meta"),
    "quantized": (quantized, "quantized"),
    "complex": (lambda z: z.to(torch.complex64), "complex64"),
    "integers": (lambda z: z.to(torch.int32), "int32"),
    "numpy": (lambda z: z.numpy(), "ndarray"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_without_values_to_read_are_refused(kind, codec, z, tmp_path):
    make, message = ODD[kind]
    odd = make(z)
    with pytest.raises(ValueError, match=message):
        codec.decode(odd if kind != "numpy" else [odd])
    with pytest.raises(ValueError, match=message):
        save_latents(tmp_path / "a.safetensors", [odd], codec=codec, names=["a"], sizes=[(12, 16)])
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nested", "sparse", "meta", "quantized"])
def test_a_file_with_such_a_tensor_is_refused_with_its_name(kind, codec, z, tmp_path, capsys):
    torch.save(ODD[kind][0](z), tmp_path / "odd.pt")
    assert main(["decode", str(tmp_path / "odd.pt"), "--codec", str(codec.folder)]) == 2
    err = capsys.readouterr().err
    assert len(complaints(err)) == 1 and "odd.pt" in err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_floats_of_other_precision_decode_as_what_they_are(dtype, codec, z, tmp_path):
    rounded = z.to(dtype)
    expected = codec.decode(rounded.float(), output_type="pt")
    torch.testing.assert_close(codec.decode(rounded, output_type="pt"), expected)
    save_latents(tmp_path / "a.safetensors", rounded, codec=codec, names=["a"], sizes=[(12, 16)])
    found = load_latents(tmp_path / "a.safetensors", codec=codec)
    assert found.latents[0].dtype == dtype
    torch.testing.assert_close(codec.decode(found.latents[0], output_type="pt"), expected)


def test_odd_indices_are_refused(tmp_path):
    codec = LatentCodec(AutoencoderVQ(**BLOCKS, latent_channels=3, num_vq_embeddings=24))
    grid = torch.zeros(1, 4, 4, dtype=torch.int64)
    for odd, message in (
        (grid.to_sparse(), "sparse"),
        (grid.to("meta"), "meta"),
        (grid.int(), "int32"),
        (grid[0], "4, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode_indices([odd])
        with pytest.raises(ValueError, match=message):
            save_indices(tmp_path / "a.safetensors", [odd], codec=codec, names=["a"], sizes=[(8, 8)])


def test_dense_tensors_pass():
    check_dense(torch.zeros(2, dtype=torch.int8), "indices")
    check_floating(torch.zeros(2, 3)[:, 1], "latents")
    check_floating(torch.zeros(0), "latents")


@pytest.mark.parametrize("verb", ["roundtrip", "info", "convert"])
@pytest.mark.parametrize("name", ["array.npy", "trainer.npz", "tensor.pt"])
def test_every_other_verb_says_what_the_file_is(verb, name, codec, z, tmp_path, capsys):
    write(tmp_path / name, z)
    more = {"roundtrip": ["--codec", str(codec.folder)], "convert": [str(tmp_path / "new")]}.get(verb, [])
    assert main([verb, str(tmp_path / name), *more]) == 2
    (line,) = complaints(capsys.readouterr().err)
    kind = {".npy": "a NumPy array", ".npz": "a NumPy archive", ".pt": "a file of torch.save|holds a Tensor"}
    assert name in line and re.search(kind[Path(name).suffix], line) and "unpack" not in line


def test_wrong_channels_are_one_line(codec, z, tmp_path, capsys):
    np.save(tmp_path / "two.npy", z[:, :2].numpy())
    assert (
        main(["decode", str(tmp_path / "two.npy"), "--codec", str(codec.folder), "--out", str(tmp_path)]) == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-codec ")]
    assert len(lines) == 1 and "C = 4" in lines[0]


def test_a_latent_file_of_very_many_empty_tensors_is_refused_before_they_are_made(tmp_path):
    number = 2000
    metadata = {"format": "latent-codec", "version": "1", "codec": "x", "names": "[]", "sizes": "[]"}
    header = {
        f"latents.{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(number)
    }
    text = json.dumps({"__metadata__": metadata} | header).encode()
    (tmp_path / "many.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=r"many\.safetensors is damaged: 2000 tensors in 0 bytes"):
        load_latents(tmp_path / "many.safetensors")
