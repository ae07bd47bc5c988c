import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.commands import fails, write_idx
from PIL import Image
from safetensors.torch import save_file

from latent_codec import LatentCodec, __version__
from latent_codec.cli import VERBS, main
from latent_codec.components.codec_folders import ASSETS
from latent_codec.latents.latent_files import load_latents


def build_codec(kind=diffusers.AutoencoderKL, seed=0, **config):
    torch.manual_seed(seed)
    return LatentCodec(
        kind(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            **config,
        )
    )


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """Folders of small codecs: `mine`, `tuned` (its decoder differs), `theirs` (all differs), `vq`."""
    folder = tmp_path_factory.mktemp("codecs")
    build_codec().save_pretrained(folder / "mine")
    build_codec(seed=1).save_pretrained(folder / "theirs")
    build_codec(diffusers.VQModel, num_vq_embeddings=16).save_pretrained(folder / "vq")
    tuned = build_codec()
    with torch.no_grad():
        tuned.autoencoder.decoder.conv_out.bias.add_(0.1)
    tuned.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two images, one in a subfolder, and the current folder next to them."""
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, size in (("cat.png", (33, 40)), ("trip/dog.png", (24, 16))):
        pixels = noise.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


# ------------------------------------------------------------------------------------------ the shell


def test_help_of_every_verb_answers_without_torch():
    """In one interpreter, because starting one for each verb costs more than what is tested."""
    code = (
        "import sys, io, contextlib\n"
        "from latent_codec.cli import VERBS, main\n"
        "for argv in [['--help'], ['--version'], *([verb, '--help'] for verb in VERBS)]:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text):\n"
        "        try:\n"
        "            main(argv)\n"
        "        except SystemExit as end:\n"
        "            assert end.code == 0, argv\n"
        "    heavy = {'torch', 'diffusers', 'numpy', 'PIL', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (argv, heavy)\n"
        "    if argv[0] in VERBS:\n"
        "        assert 'latent-codec ' + argv[0] in text.getvalue().partition('options:')[0]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_form_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "latent_codec.cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"latent-codec {__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["roundtrip", "--no-such-flag"],
        ["encode"],
        ["sample", ""],
        [""],
        ["encode", "a.png", "--out", ""],
    ],
)
def test_usage_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("latent-codec") and "--help`" in err and err.count("\n") == 1


def test_main_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{verb}\s", out, re.M) for verb in VERBS)


# ------------------------------------------------------------------------------------------ roundtrip


def test_roundtrip_without_argument_takes_the_sample_photograph(codecs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["roundtrip", "--codec", str(codecs / "mine")]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"grace_hopper: PSNR -?\d+\.\d\d dB, SSIM -?\d\.\d{4}, 512x512 -> latents 4x64x64, "
        r"encode \d+\.\d\d s, decode \d+\.\d\d s, see grace_hopper-roundtrip.png\n",
        out,
    )
    with Image.open("grace_hopper-roundtrip.png") as sheet:
        assert sheet.height == 512
        assert sheet.width >= 3 * 512


def test_roundtrip_shows_original_reconstruction_and_difference(codecs, photos, capsys):
    assert main(["roundtrip", str(photos / "cat.png"), "--codec", str(codecs / "mine"), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["images"]
    assert result["size"] == [33, 40]
    assert result["latent_shape"] == [4, 5, 5]

    codec = LatentCodec.from_pretrained(codecs / "mine")
    (reconstruction,) = codec.decode(codec.encode(photos / "cat.png"), size=(33, 40))
    original = np.asarray(Image.open(photos / "cat.png"))
    sheet = np.asarray(Image.open(result["path"]))
    # One level of slack: the command computes in the same precision, in another batch layout at most.
    assert np.array_equal(sheet[:, :40], original)
    assert np.abs(sheet[:, 44:84].astype(int) - np.asarray(reconstruction)).max() <= 1
    difference = np.clip(127.5 + np.asarray(reconstruction, float) - original, 0, 255)
    assert np.abs(sheet[:, 88:128] - difference).max() <= 2

    mse = np.square(np.asarray(reconstruction, float) - original).mean()
    assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.05)


def test_roundtrip_of_a_folder_prints_a_line_each(codecs, photos, capsys):
    assert main(["roundtrip", str(photos), "--codec", str(codecs / "mine"), "--out", "seen"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == ["cat", str(Path("trip/dog"))]
    assert Path("seen/trip/dog-roundtrip.png").is_file()
    assert err == ""  # no progress bar where nobody looks


def test_two_images_never_write_one_file(codecs, photos, capsys):
    (photos / "cat.jpg").write_bytes((photos / "cat.png").read_bytes())
    assert main(["encode", str(photos), "--codec", str(codecs / "mine"), "--out", "twins"]) == 0
    written = sorted(path.relative_to("twins").as_posix() for path in Path("twins").rglob("*.safetensors"))
    assert written == ["cat.jpg.safetensors", "cat.png.safetensors", "trip/dog.safetensors"]
    Path("other").mkdir()
    (photos / "cat.png").rename("other/cat.png")
    (photos / "cat.jpg").rename(photos / "cat.png")
    err = fails(capsys, "roundtrip", photos, "other", "--codec", codecs / "mine")
    assert "would both be written as cat" in err and "--out" in err


def test_a_image_named_twice_is_one_image(codecs, photos, capsys):
    assert (
        main(["roundtrip", "photos/cat.png", str(photos / "cat.png"), "--codec", str(codecs / "mine")]) == 0
    )
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("verb", ["roundtrip", "encode"])
def test_a_image_that_cannot_be_read_is_left_out_and_named(verb, codecs, photos, capsys):
    (photos / "bad.jpg").write_text("no image")
    assert main([verb, str(photos), "--codec", str(codecs / "mine"), "--out", "made"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert err.startswith(f"latent-codec {verb}: {photos / 'bad.jpg'}: not an image") and err.count("\n") == 1
    made = sorted(path.stem.partition("-")[0] for path in Path("made").rglob("*.*"))
    assert made == ["cat", "dog"]


def test_json_of_a_round_trip_names_what_failed(codecs, photos, capsys):
    Path("bad.jpg").write_text("no image")
    mine = ["--codec", str(codecs / "mine"), "--json"]
    assert main(["roundtrip", str(photos / "cat.png"), "bad.jpg", *mine]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [image["name"] for image in found["images"]] == ["cat"]
    (failed,) = found["failed"]
    assert failed.startswith("bad.jpg: not an image")


# ------------------------------------------------------------------------------------------ encode and decode


def test_encode_then_decode(codecs, photos, capsys):
    codec = LatentCodec.from_pretrained(codecs / "mine")
    assert main(["encode", str(photos), "--codec", str(codecs / "mine")]) == 0
    files = capsys.readouterr().out.split()
    assert files == [str(Path("latents/cat.safetensors")), str(Path("latents/trip/dog.safetensors"))]
    assert torch.equal(load_latents(files[0]).latents[0], codec.encode(photos / "cat.png"))

    assert main(["decode", *files, "--codec", str(codecs / "mine")]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(Path("decoded/cat.png")), str(Path("decoded/dog.png"))]
    assert err == ""
    (expected,) = codec.decode(codec.encode(photos / "cat.png"), size=(33, 40))
    assert np.array_equal(np.asarray(Image.open("decoded/cat.png")), np.asarray(expected))


def test_decode_takes_folders_and_keeps_their_subfolders(codecs, photos, capsys):
    (photos / "trip" / "cat.png").write_bytes((photos / "cat.png").read_bytes())
    mine = ["--codec", str(codecs / "mine")]
    assert main(["encode", str(photos), *mine]) == 0
    capsys.readouterr()
    assert main(["decode", "latents", "--out", "seen", *mine]) == 0
    names = {"cat.png", "trip/cat.png", "trip/dog.png"}
    assert set(capsys.readouterr().out.split()) == {str(Path("seen", name)) for name in names}
    assert all(Path("seen", name).is_file() for name in names)
    Path("bare").mkdir()
    assert "no latent files (.safetensors, .npy, .npz, .pt, .pth) in bare" in fails(
        capsys, "decode", "bare", *mine
    )


def test_one_file_of_all_leaves_out_what_cannot_be_read(codecs, photos, capsys):
    (photos / "bad.jpg").write_text("no image")
    mine = ["--codec", str(codecs / "mine")]
    assert main(["encode", str(photos), "--out", "all.safetensors", *mine]) == 2
    assert load_latents("all.safetensors").names == ["cat.png", "trip/dog.png"]
    err = fails(capsys, "encode", photos / "bad.jpg", "--out", "none.safetensors", *mine)
    assert "bad.jpg" in err and not Path("none.safetensors").exists()


def test_one_latent_file_for_all(codecs, photos, capsys):
    assert main(["encode", str(photos), "--out", "all.safetensors", "--codec", str(codecs / "mine")]) == 0
    found = load_latents("all.safetensors")
    assert found.names == ["cat.png", "trip/dog.png"]
    assert found.sizes == [(33, 40), (24, 16)]
    assert main(["decode", "all.safetensors", "--codec", str(codecs / "mine"), "--out", "back"]) == 0
    assert sorted(path.name for path in Path("back").iterdir()) == ["cat.png", "dog.png"]


def test_indices_of_a_discrete_codec(codecs, photos, capsys):
    codec = LatentCodec.from_pretrained(codecs / "vq")
    cat = str(photos / "cat.png")
    assert main(["encode", cat, "--indices", "--codec", str(codecs / "vq")]) == 0
    (grid,) = load_latents("latents/cat.safetensors").indices[0]
    assert torch.equal(grid, codec.encode_indices(cat)[0])
    assert main(["decode", "latents/cat.safetensors", "--codec", str(codecs / "vq")]) == 0
    (expected,) = codec.decode_indices(codec.encode_indices(cat), size=(33, 40))
    assert np.array_equal(np.asarray(Image.open("decoded/cat.png")), np.asarray(expected))

    err = fails(capsys, "encode", cat, "--indices", "--codec", codecs / "mine")
    assert "has no codebook" in err


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """An IDX folder, `digits`, of five training and two test images with labels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    noise = np.random.default_rng(0)
    for prefix, number in (("train", 5), ("t10k", 2)):
        images = noise.integers(0, 256, (number, 16, 16), dtype=np.uint8)
        write_idx(Path(f"digits/{prefix}-images-idx3-ubyte"), images)
        write_idx(Path(f"digits/{prefix}-labels-idx1-ubyte"), np.arange(number, dtype=np.uint8))
    return "digits"


def test_data_set_is_encoded_into_files_with_labels_and_taken_up_again(codecs, digits, capsys):
    argv = ["encode", digits, "--codec", str(codecs / "vq"), "--out", "codes", "--shard", "2"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    files = list(map(Path, out.split()))
    assert [(file.parent, file.name[:6]) for file in files] == [
        (Path("codes/shards"), f"0000{number}-") for number in range(3)
    ]
    assert err == ""
    found = list(map(load_latents, files))
    assert [name for each in found for name in each.names] == [f"train-0000{number}" for number in range(5)]
    assert [label for each in found for label in each.labels] == [0, 1, 2, 3, 4]
    assert all(each.indices for each in found)

    files[2].unlink()
    before = [file.stat().st_mtime_ns for file in files[:2]]
    assert main(argv) == 0
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert [file.stat().st_mtime_ns for file in files[:2]] == before
    assert load_latents(files[2]).names == ["train-00004"]

    assert main(["info", str(files[2]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["labelled"] == 1
    assert facts["images"] == [{"name": "train-00004", "size": [16, 16], "grids": [[2, 2]], "label": 4}]
    assert main(["info", str(files[2])]) == 0
    out = capsys.readouterr().out
    assert re.search("^labelled +1$", out, re.M) and "train-00004: 16x16 -> 2x2, label 4\n" in out

    other = [*argv[:2], "--codec", codecs / "mine", *argv[4:]]
    assert re.search(r"indices of vq \(space \w+\), not latents of mine", fails(capsys, *other))
    assert "give another folder" in fails(capsys, *argv, "--latents")


def test_split_mirror_images_and_default_number_in_a_file(codecs, digits, capsys):
    argv = ["encode", digits, "--codec", str(codecs / "mine"), "--split", "test"]
    assert main([*argv, "--flip", "--batch-size", "1"]) == 0
    (file,) = capsys.readouterr().out.split()
    assert file.startswith(str(Path("latents/shards/00000-")))
    found = load_latents(file)
    assert found.names == ["test-00000", "test-00000 (mirrored)", "test-00001", "test-00001 (mirrored)"]
    assert found.labels == [0, 0, 1, 1]

    assert main([*argv, "--mirrored"]) == 0
    assert capsys.readouterr() == (
        f"{file}\n",
        "Note: --mirrored is now --flip; the old name goes with latent-codec 0.3\n",
    )

    assert main(["decode", file, "--codec", str(codecs / "mine")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_tars_and_folders_are_encoded_into_files_of_n(codecs, photos, capsys):
    with tarfile.open("photos.tar", "w") as tar:
        tar.add(photos / "cat.png", "a.png")
        tar.add(photos / "trip" / "dog.png", "b.png")
    assert main(["encode", "photos.tar", "--codec", str(codecs / "mine"), "--out", "one"]) == 0
    one = capsys.readouterr().out.strip()
    found = load_latents(one)
    assert found.names == ["photos.tar/a.png", "photos.tar/b.png"]
    assert found.sizes == [(33, 40), (24, 16)]

    assert main(["encode", "photos", "--codec", str(codecs / "mine"), "--out", "two", "--shard", "1"]) == 0
    two = capsys.readouterr().out.split()
    assert [load_latents(file).names for file in two] == [["cat.png"], ["trip/dog.png"]]
    codec = LatentCodec.from_pretrained(codecs / "mine")
    for file in (one, two[0]):
        assert torch.equal(load_latents(file).latents[0], codec.encode(photos / "cat.png"))


def test_flags_that_do_not_go_together_are_refused(codecs, photos, digits, capsys):
    mine = ["--codec", codecs / "mine"]
    assert "--flip: expected none of images in a file each, got True; or a data set: add --format" in fails(
        capsys, "encode", photos, "--flip", *mine
    )
    assert "goes into a folder" in fails(capsys, "encode", digits, "--out", "all.safetensors", *mine)
    assert "--tile is for plain images" in fails(capsys, "encode", digits, "--tile", "64", *mine)
    assert "--shard: expected at least 1, got 0" in fails(capsys, "encode", photos, "--shard", "0", *mine)
    assert "--batch-size: expected at least 1, got -1" in fails(
        capsys, "encode", digits, "--batch-size", "-1", *mine
    )
    assert "leave --indices out" in fails(capsys, "encode", photos, "--indices", *mine)
    assert "has splits 'train' and 'test'" in fails(capsys, "encode", digits, "--split", "dev", *mine)
    assert "mine has no codebook" in fails(capsys, "encode", digits, "--indices", *mine)
    assert not Path("latents").exists()


def test_decode_refuses_another_latent_space_and_warns_of_another_decoder(codecs, photos, capsys):
    assert main(["encode", str(photos / "cat.png"), "--codec", str(codecs / "mine")]) == 0
    err = fails(capsys, "decode", "latents/cat.safetensors", "--codec", codecs / "theirs")
    assert re.search(r"cat.safetensors holds latents of mine \(space \w{16}\), not of theirs", err)
    assert not Path("decoded").exists()

    assert main(["decode", "latents/cat.safetensors", "--codec", str(codecs / "tuned")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(Path("decoded/cat.png"))
    assert "tuned" in err and "decoder of its own" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["default-vq", str(ASSETS / "fashion-mnist")])
def test_latents_of_shipped_codecs_find_theirs(name, photos, capsys):
    assert main(["encode", str(photos / "cat.png"), "--codec", name]) == 0
    for out, argv in (("found", []), ("named", ["--codec", name])):
        assert main(["decode", "latents/cat.safetensors", "--out", out, *argv]) == 0
    assert capsys.readouterr().err == ""
    assert Path("found/cat.png").read_bytes() == Path("named/cat.png").read_bytes()


def test_names_in_a_foreign_latent_file_stay_inside_the_folder(codecs, photos, tmp_path, capsys):
    from latent_codec.latents.latent_files import save_latents

    codec = LatentCodec.from_pretrained(codecs / "mine")
    names = ["../../escape.png", "/etc/passwd", "..\\..\\win.png", "..", "", "cat.png", "cat.jpg", "a\0b.png"]
    latents = codec.encode(torch.zeros(len(names), 3, 16, 16))
    save_latents("evil.safetensors", latents, codec=codec, names=names, sizes=[(16, 16)] * len(names))
    assert main(["decode", "evil.safetensors", "--codec", str(codecs / "mine"), "--out", "in/here"]) == 0
    written = [path for path in tmp_path.rglob("*.png") if photos not in path.parents]
    assert len(written) == len(names)
    assert {path.parent for path in written} == {tmp_path / "in" / "here"}


# ------------------------------------------------------------------------------------------ info


def test_info_of_a_codec(codecs, capsys):
    codec = LatentCodec.from_pretrained(codecs / "mine")
    assert main(["info", str(codecs / "mine"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"] == "AutoencoderKL"
    assert facts["parameters"] == sum(p.numel() for p in codec.autoencoder.parameters())
    assert (facts["downsampling_factor"], facts["scaling_factor"]) == (8, 0.18215)
    assert facts["space_fingerprint"] == codec.space_fingerprint
    assert facts["fingerprint"] == codec.fingerprint

    assert main(["info", str(codecs / "mine")]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^space fingerprint +{codec.space_fingerprint}$", out, re.M)
    assert re.search(r"^class +AutoencoderKL$", out, re.M)


def test_info_of_a_latent_file_and_a_checkpoint(codecs, photos, capsys):
    assert main(["encode", str(photos / "cat.png"), "--codec", str(codecs / "mine")]) == 0
    capsys.readouterr()
    assert main(["info", "latents/cat.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["codec"]) == ("latents", "mine")
    assert facts["images"] == [{"name": "cat.png", "size": [33, 40], "shape": [4, 5, 5]}]

    save_file({"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(4).half()}, "other.safetensors")
    assert main(["info", "other.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["tensors"], facts["parameters"]) == ("checkpoint", 2, 10)
    assert facts["prefixes"] == ["a", "b"]


# ------------------------------------------------------------------------------------------ what goes wrong


def test_bad_input_gives_one_line_and_exit_code_2(codecs, photos, capsys):
    mine = ["--codec", codecs / "mine"]
    Path("text.png").write_text("hello")
    Path("empty.png").write_bytes(b"")
    Path("half.png").write_bytes((photos / "cat.png").read_bytes()[:200])
    Path("bare").mkdir()
    Path("pickle.ckpt").write_bytes(b"\x80\x02")
    Path("text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(1)}, "foreign.safetensors")
    for argv, message in [
        (("roundtrip", "nowhere.png", *mine), "nowhere.png: no such file"),
        (("roundtrip", "text.png", *mine), "text.png: not an image"),
        (("encode", "empty.png", *mine), "empty.png: the file is empty"),
        (("encode", "half.png", *mine), "half.png: damaged or cut short"),
        (("encode", "bare", *mine), "no images in bare"),
        (("roundtrip", photos / "cat.png", "--codec", "nowhere"), "nowhere does not exist"),
        (("roundtrip", photos / "cat.png", "--codec", "bare"), "bare is no codec"),
        (
            ("roundtrip", photos / "cat.png", *mine, "--tile", "0"),
            "tile is 0; expected an integer of pixels",
        ),
        (("roundtrip", photos / "cat.png", *mine, "--device", "abacus"), "abacus"),
        (("roundtrip", photos / "cat.png", *mine, "--device", "meta"), "device meta is not available here"),
        (("decode", "nowhere.safetensors", *mine), "nowhere.safetensors: No such file"),
        (("roundtrip", photos / "cat.png", *mine, "--out", "text.png"), "text.png is a file, where a folder"),
        (("encode", photos / "cat.png", *mine, "--out", "text.png/in"), "text.png is a file, where a folder"),
        (("encode", "text.png/in", *mine), "text.png/in: no such file"),
        (("decode", "foreign.safetensors", *mine), "not a latent file"),
        (("decode", photos / "cat.png", *mine), "is no latent file"),
        (("info", "nowhere"), "nowhere does not exist"),
        (("info", "pickle.ckpt"), "pickle.ckpt begins with"),
        (("info", "text.safetensors"), "text.safetensors begins with"),
    ]:
        assert message in fails(capsys, *argv), argv
    assert not [path for path in Path().iterdir() if path.name in ("latents", "decoded")]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--list"], ["info", "default"]])
def test_a_reader_that_leaves_early_hears_no_complaint(argv):
    """As in `latent-codec ... | head`: the pipe's reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "latent_codec.cli", *argv]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    finally:
        os.close(writing)
    assert (
        "Error" not in done.stderr and "latent-codec" not in done.stderr
    )  # progress only, on a busy machine
    assert done.returncode in (0, 141)  # argparse takes no notice where stdout is not buffered


def test_short_memory_is_one_line_that_names_tiles(codecs, photos, capsys, monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nframe 0"
        )

    monkeypatch.setattr(torch.nn.Conv2d, "forward", no_memory)
    err = fails(capsys, "roundtrip", photos / "cat.png", "--codec", codecs / "mine")
    assert "--tile 512" in err and "DefaultCPUAllocator" in err


def test_wrong_dtype_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["roundtrip", "--dtype", "int8"])
    assert end.value.code == 2
    assert "invalid choice: 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["encode", "roundtrip"])
def test_full_disk_is_one_line_and_leaves_nothing_half_written(verb, codecs, photos, capsys):
    """A limit on the size of files stands for a full disk: the system refuses the write half way."""
    resource = pytest.importorskip("resource")
    argv = [verb, photos / "cat.png", "--codec", codecs / "mine", "--out", "out"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        fails(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path("out").rglob("*"))
    assert main(list(map(str, argv))) == 0


def test_a_warning_is_one_line_without_a_place_in_the_code(codecs, photos, monkeypatch, capsys):
    def show(*warning):  # as Python does; pytest keeps warnings for its own report
        sys.stderr.write(warnings.formatwarning(*warning[:4]))

    monkeypatch.setattr(warnings, "showwarning", show)
    Image.open(photos / "cat.png").save("odd.png", icc_profile=b"no profile" * 20)
    before = warnings.formatwarning
    assert main(["encode", "odd.png", "--codec", str(codecs / "mine"), "--out", "z"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latent-codec encode: Note: ") and "odd.png: its color profile is ignored" in line
    assert warnings.formatwarning is before
