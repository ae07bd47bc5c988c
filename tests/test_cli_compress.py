"""The verbs `compress` and `decompress`: files, what is printed, and what is refused."""

import json
import re
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import processes
from helpers.commands import fails, without_progress
from PIL import Image
from test_bitstream import BLOCKS

from latent_codec import LatentCodec
from latent_codec.bitstream import compress, decompress, fit_static, read, unpack
from latent_codec.cli import main
from latent_codec.images.tensors import read_image, write_image
from latent_codec.latents.latent_files import load_latents
from latent_codec.metrics import psnr
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ


def build(kind: str, seed: int = 0) -> LatentCodec:
    torch.manual_seed(seed)
    if kind == "kl":
        return LatentCodec(diffusers.AutoencoderKL(**BLOCKS, latent_channels=3))
    if kind == "vq":
        codec = LatentCodec(AutoencoderVQ(**BLOCKS, latent_channels=3, num_vq_embeddings=24))
    else:
        codec = LatentCodec(
            HierarchicalVQ(
                strides=(2, 2),
                hidden_channels=8,
                num_residual_blocks=1,
                residual_channels=4,
                embed_dim=4,
                codebook_sizes=(6, 24),
            )
        )
    for level, quantizer in enumerate(
        codec.autoencoder.quantizers
    ):  # so that indices differ without training
        with torch.no_grad():
            vectors = codec.autoencoder.encode_quantized(make_image(64, 64, 100)[None])[level].latents
            vectors = vectors.movedim(1, -1).flatten(0, 2)
            size = quantizer.codebook_size
            quantizer.embedding.weight.copy_(vectors[:: len(vectors) // size][:size])
    codec.weights_changed()
    return codec


def make_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise, (3, H, W) in [-1, 1]."""
    noise = torch.randn(1, 3, height // 4 + 2, width // 4 + 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].clamp(-1, 1)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """Folders of tiny codecs: `kl`, `vq` and `levels` with entropy models; `bare` is `kl` without, `tuned` with another
    decoder; `other` has another space; `entropy2.safetensors` is another entropy model of `kl`."""
    folder = tmp_path_factory.mktemp("codecs")
    for name, kind, seed in (("kl", "kl", 0), ("other", "kl", 1), ("vq", "vq", 0), ("levels", "levels", 0)):
        codec = build(kind, seed)
        codec.save_pretrained(folder / name)
        fit_static(codec, [make_image(40, 48, number) for number in range(3)]).save(folder / name)
    codec = build("kl")
    codec.save_pretrained(folder / "bare")
    fit_static(codec, [make_image(40, 40, 9)]).save(folder / "entropy2.safetensors")
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias += 0.1
    codec.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two images of odd sizes, one in a subfolder, and the current folder next to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_image(make_image(33, 47, 1), "photos/cat.v2.png")
    write_image(make_image(24, 17, 2), "photos/trip/dog.png")
    return Path("photos")


def run(capsys, *argv, status: int = 0) -> tuple[str, str]:
    """What a command prints on stdout and stderr."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == status
    return capsys.readouterr()


def pixels(path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize("kind", ["kl", "vq", "levels"])
def test_there_and_back(kind, codecs, photos, capsys):
    codec = LatentCodec.from_pretrained(codecs / kind)
    at = ["--codec", codecs / kind]
    out, err = run(capsys, "compress", photos, *at, "--tile", "16")
    files = [Path("compressed/cat.v2.lcf"), Path("compressed/trip/dog.lcf")]
    assert [line.partition(":")[0] for line in out.splitlines()] == [*map(str, files), "2 images"]
    assert err == ""
    data = files[0].read_bytes()
    assert data == compress(codec, photos / "cat.v2.png", tile=16)
    assert unpack(data).header.num_tiles == 9

    Path("compressed/.half.lcf").write_bytes(b"")  # hidden, as what is being written
    out, err = run(capsys, "decompress", "compressed", *at, "--out", "seen")
    assert out.split() == [str(Path("seen/cat.v2.png")), str(Path("seen/trip/dog.png"))] and err == ""
    assert np.array_equal(pixels("seen/cat.v2.png"), np.asarray(decompress(codec, data)))

    run(capsys, "decompress", *files, *at, "--latents", "--out", "latents")
    found = load_latents("latents/cat.v2.safetensors", codec=codec)
    assert (found.names, found.sizes) == (["cat.v2.lcf"], [(33, 47)])
    assert (found.indices is None) == (kind == "kl")
    run(capsys, "decode", "latents/cat.v2.safetensors", "latents/dog.safetensors", *at)
    assert np.array_equal(pixels("decoded/cat.v2.png"), pixels("seen/cat.v2.png"))
    assert np.array_equal(pixels("decoded/dog.png"), pixels("seen/trip/dog.png"))


def test_figures_are_those_of_the_files(codecs, photos, capsys):
    at = ["--codec", codecs / "kl", "--quality", "60"]
    found = json.loads(run(capsys, "compress", photos, *at, "--psnr", "--json")[0])
    codec = LatentCodec.from_pretrained(codecs / "kl")
    assert found["space_fingerprint"] == codec.space_fingerprint and found["failed"] == []
    first, second = found["images"]
    assert (first["name"], first["size"], first["quality"], first["tiles"]) == ("cat.v2", [33, 47], 60, 1)
    for each in (first, second):
        data = Path(each["path"]).read_bytes()
        area = each["size"][0] * each["size"][1]
        assert each["bytes"] == len(data) and each["bits_per_pixel"] == 8 * len(data) / area
        decoded = read(codec, data)
        assert found["entropy_fingerprint"] == decoded.container.header.entropy_fingerprint
        assert each["bits_without_overhead"] == pytest.approx(decoded.code_length)
    total = found["total"]
    assert total["bytes"] == first["bytes"] + second["bytes"]
    assert total["bits_per_pixel"] == 8 * total["bytes"] / (33 * 47 + 24 * 17)
    assert total["psnr"] == (first["psnr"] + second["psnr"]) / 2

    run(capsys, "decompress", first["path"], "--codec", codecs / "kl")
    written = read_image("decompressed/cat.v2.png"), read_image("photos/cat.v2.png")
    assert psnr(*(each[None] for each in written)).item() == pytest.approx(first["psnr"], abs=1e-3)

    line, _ = run(capsys, "compress", photos / "trip", *at, "--psnr")
    assert line == (
        f"{Path('compressed/dog.lcf')}: {second['bytes']:,} bytes, {second['bits_per_pixel']:.4f} bits per pixel "
        f"({second['bits_per_pixel_without_overhead']:.4f} without overhead), PSNR {second['psnr']:.2f} dB, quality 60\n"
    )


@pytest.mark.parametrize("target", [180, 333, 700])
def test_a_target_is_never_exceeded(target, codecs, photos, capsys):
    at = ["--codec", codecs / "kl", "--json"]
    cat = photos / "cat.v2.png"
    (found,) = json.loads(run(capsys, "compress", cat, *at, "--target-bytes", target)[0])["images"]
    assert 0.8 * target < found["bytes"] == Path(found["path"]).stat().st_size <= target
    bits = (8 * target + 7) / (33 * 47)
    (other,) = json.loads(run(capsys, "compress", cat, *at, "--target-bpp", bits)[0])["images"]
    assert (other["bytes"], other["quality"]) == (found["bytes"], found["quality"])


def test_a_target_leaves_levels_of_indices_out(codecs, photos, capsys):
    at = ["--codec", codecs / "levels"]
    out, _ = run(capsys, "compress", photos / "cat.v2.png", *at, "--target-bytes", "120")
    assert out.endswith(", 1 of 2 levels\n")
    assert Path("compressed/cat.v2.lcf").stat().st_size <= 120
    run(capsys, "decompress", "compressed/cat.v2.lcf", *at)
    run(capsys, "decompress", "compressed/cat.v2.lcf", *at, "--latents", "--out", "latents")
    run(capsys, "decode", "latents/cat.v2.safetensors", *at)
    assert np.array_equal(pixels("decoded/cat.v2.png"), pixels("decompressed/cat.v2.png"))


def test_images_that_fail_are_named_and_the_others_written(codecs, photos, capsys):
    (photos / "a.png").write_text("hello")
    out, err = run(capsys, "compress", photos, "--codec", codecs / "kl", status=2)
    assert re.fullmatch(r"latent-codec compress: photos.a\.png: not an image in a known format .*\n", err)
    assert out.endswith("\n") and "2 images: " in out and not Path("compressed/a.lcf").exists()

    at = ["--codec", codecs / "kl", "--target-bytes", "180", "--out", "small"]
    found, err = run(capsys, "compress", photos, *at, "--json", status=2)
    found = json.loads(found)
    assert err.count("\n") == len(found["failed"]) == 1 and found["total"]["bytes"] <= 360
    assert fails(capsys, "compress", photos / "a.png", "--codec", codecs / "kl")

    err = fails(capsys, "compress", photos / "trip", "--codec", codecs / "kl", "--target-bpp", "0.2")
    assert re.search(
        r"dog\.png: --target-bpp: expected at least \d+ bytes for this image, got 0\.2.* allows 10", err
    )
    assert not Path("compressed/dog.lcf").exists()


def test_flags_that_fit_no_image_are_refused(codecs, photos, capsys):
    for codec, argv, message in [
        ("kl", ["--quality", "101"], r"--quality: expected 0 \(coarsest\) to 100 .*, got 101"),
        ("kl", ["--quality", "-1"], "--quality: expected at least 0, got -1"),
        (
            "vq",
            ["--quality", "3"],
            "--quality: expected none for vq, whose indices are stored without loss, got 3",
        ),
        ("kl", ["--target-bytes", "0"], "--target-bytes: expected at least 1, got 0"),
        ("kl", ["--target-bpp", "nan"], "--target-bpp: expected above 0, got nan"),
        ("kl", ["--tile", "33"], "--tile: expected a multiple of 2 pixels for kl, or 0 for no tiles, got 33"),
        ("levels", ["--tile", "-4"], "--tile: expected at least 0, got -4"),
        ("bare", [], "--entropy: expected one for latents of bare, .*fit-entropy`"),
        ("other", ["--entropy", codecs / "kl"], r"was fitted to codec .*, not to other"),
        ("kl", ["--entropy", "nowhere"], "No such file"),
        ("kl", ["--entropy", photos / "cat.v2.png"], "is no entropy model"),
    ]:
        assert re.search(message, fails(capsys, "compress", photos, "--codec", codecs / codec, *argv)), argv
    assert not Path("compressed").exists()
    with pytest.raises(SystemExit):
        main(["compress", "photos", "--quality", "3", "--target-bytes", "100"])
    assert "not allowed with" in capsys.readouterr().err


def test_an_entropy_model_may_lie_elsewhere(codecs, photos, capsys):
    entropy = ["--entropy", codecs / "entropy2.safetensors"]
    run(capsys, "compress", photos, "--codec", codecs / "bare", *entropy)
    run(capsys, "decompress", "compressed/cat.v2.lcf", "--codec", codecs / "bare", *entropy)
    err = fails(capsys, "decompress", "compressed/cat.v2.lcf", "--codec", codecs / "bare")
    assert re.search(r"cat\.v2\.lcf: expected the entropy model \w{16}, got none.* --entropy", err)
    err = fails(capsys, "decompress", "compressed/cat.v2.lcf", "--codec", codecs / "kl")
    assert re.search(r"coded with the entropy model \w{16}, not with \w{16}.* --entropy", err)
    # A folder stands for the model in it; indices need none.
    run(capsys, "compress", photos, "--codec", codecs / "bare", "--entropy", codecs / "kl", "--out", "two")
    run(
        capsys, "decompress", "two", "--codec", codecs / "tuned", "--entropy", codecs / "kl", "--out", "tuned"
    )
    (codecs / "vq" / "entropy.safetensors").rename("kept")
    try:
        out, _ = run(capsys, "compress", photos / "trip", "--codec", codecs / "vq", "--out", "fixed")
        assert out.endswith(", fixed length\n")
        run(capsys, "decompress", "fixed", "--codec", codecs / "vq")
    finally:
        Path("kept").rename(codecs / "vq" / "entropy.safetensors")


def test_a_region_is_cut_out(codecs, photos, capsys):
    at = ["--codec", codecs / "kl"]
    run(capsys, "compress", photos / "cat.v2.png", *at, "--tile", "16")
    run(capsys, "decompress", "compressed/cat.v2.lcf", *at, "--region", "17,20,10,12", "--format", "webp")
    codec = LatentCodec.from_pretrained(codecs / "kl")
    data = Path("compressed/cat.v2.lcf").read_bytes()
    found = pixels("decompressed/cat.v2.webp")
    assert found.shape == (10, 12, 3)
    assert np.array_equal(found, np.asarray(decompress(codec, data, region=(17, 20, 10, 12))))

    err = fails(capsys, "decompress", "compressed/cat.v2.lcf", *at, "--region", "30,0,10,10")
    assert "within the image of 33x47 pixels" in err
    err = fails(capsys, "decompress", "compressed/cat.v2.lcf", *at, "--latents", "--format", "png")
    assert "--format: expected none for latent files" in err
    for argv in (["--region", "1,2,3"], ["--region", "1,2,3,x"], ["--region", "0,0,1,1", "--latents"]):
        with pytest.raises(SystemExit) as end:
            main(["decompress", "compressed/cat.v2.lcf", *argv])
        assert end.value.code == 2


def test_damaged_files_are_refused_and_partial_ones_flagged(codecs, photos, capsys):
    at = ["--codec", codecs / "kl"]
    run(capsys, "compress", photos / "cat.v2.png", *at, "--tile", "16")
    whole = Path("compressed/cat.v2.lcf").read_bytes()
    container = unpack(whole)
    first = container.header_bytes + container.lengths[0]
    Path("cut.lcf").write_bytes(whole[: first + 3])
    Path("flipped.lcf").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for name, words in (("cut", "is cut short: it has"), ("flipped", r"tile 8\) is damaged")):
        err = fails(capsys, "decompress", f"{name}.lcf", *at)
        assert re.search(rf"{name}\.lcf: .*{words}.*decompress --partial. decodes the whole sections", err)
        out, err = run(capsys, "decompress", f"{name}.lcf", *at, "--partial")
        assert out.strip() == str(Path(f"decompressed/{name}.png"))
        assert f"{name}.lcf: decoded in part; missing or damaged: section " in err and err.count("\n") == 1
        run(capsys, "decompress", f"{name}.lcf", *at, "--partial", "--latents")
        assert load_latents(f"decompressed/{name}.safetensors").sizes == [(33, 47)]
    assert (pixels("decompressed/cut.png")[16:] == 128).all()
    out, err = run(capsys, "decompress", "compressed/cat.v2.lcf", *at, "--partial")
    assert err == ""

    newer = whole[:4] + b"\2" + whole[5 : container.header_bytes - 4]
    checksum = zlib.crc32(newer).to_bytes(4, "little")
    Path("newer.lcf").write_bytes(newer + checksum + whole[container.header_bytes :])
    Path("head.lcf").write_bytes(whole[:20])
    Path("first.lcf").write_bytes(whole[: first - 1])
    Path("header.lcf").write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    Path("text.lcf").write_text("hello")
    Path("empty.lcf").write_bytes(b"")
    again = "Get the file again: nothing of it can be decoded"
    for name, message in {
        "head": f"cut short: its 20 bytes end in the header. {again}",
        "first": again,
        "header": f"the header is damaged: its checksum is wrong. {again}",
        "newer": "expected version 1 of the file, got 2; update latent-codec",
        "text": "are not a compressed file of latent-codec",
        "empty": "are not a compressed file of latent-codec",
    }.items():
        for flags in ([], ["--partial"]):
            assert message in fails(capsys, "decompress", f"{name}.lcf", *at, *flags), name

    out, err = run(capsys, "decompress", "text.lcf", "compressed", *at, "--out", "rest", status=2)
    assert out.strip() == str(Path("rest/cat.v2.png")) and err.count("\n") == 1


def test_another_codecs_files_are_refused(codecs, photos, capsys):
    run(capsys, "compress", photos, "--codec", codecs / "kl")
    run(capsys, "encode", photos / "trip", "--codec", codecs / "kl")
    files = ["compressed/cat.v2.lcf", "--codec", codecs / "other"]
    err = fails(capsys, "decompress", *files)
    assert re.search(
        r"by another codec \(space \w{16}\), not by other \(space \w{16}\).*Pass --codec with the one that made it",
        err,
    )
    assert "by another codec" in fails(capsys, "decompress", *files, "--entropy", codecs / "kl")
    err = fails(capsys, "decompress", "latents/dog.safetensors", "--codec", codecs / "kl")
    assert "It is a latent file: `latent-codec decode` opens it" in err
    assert "no compressed files (.lcf) in photos" in fails(capsys, "decompress", "photos")
    assert "No such file" in fails(capsys, "decompress", "nowhere.lcf")
    run(capsys, "compress", photos, "--codec", codecs / "vq", "--out", "compressed/vq")
    Path("cat.v2.lcf").write_bytes(Path("compressed/cat.v2.lcf").read_bytes())
    err = fails(capsys, "decompress", "cat.v2.lcf", "compressed/cat.v2.lcf", "--codec", codecs / "kl")
    assert "would both be written as cat.v2" in err


def test_a_shipped_codecs_file_says_so(codecs, photos, capsys):
    run(capsys, "compress", photos / "trip", "--codec", "default-vq")
    err = fails(capsys, "decompress", "compressed/dog.lcf", "--codec", codecs / "vq")
    assert err.endswith("Pass --codec default-vq\n")


def test_files_of_shipped_codecs_find_theirs(photos, capsys):
    for name in ("default", "default-vq"):
        run(capsys, "compress", photos / "trip", "--codec", name, "--out", f"small/{name}")
    out, _ = run(capsys, "decompress", "small", "--out", "each")
    assert sorted(out.split()) == ["each/default-vq/dog.png", "each/default/dog.png"]
    for name in ("default", "default-vq"):
        run(capsys, "decompress", f"small/{name}", "--codec", name, "--out", f"named/{name}")
        assert Path(f"each/{name}/dog.png").read_bytes() == Path(f"named/{name}/dog.png").read_bytes()
    assert Path("each/default/dog.png").read_bytes() != Path("each/default-vq/dog.png").read_bytes()


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--target-bpp", "4"], "default-f8c16-rd"),
        (["--target-bpp", "0.2"], "default-f8c16-rd"),
        (["--target-bpp", "0.19"], "default-f8c4"),
        (["--quality", "0"], "default-f8c4"),
        (["--target-bpp", "4", "--codec", "default"], "default-f8c4"),
    ],
)
def test_the_codec_follows_from_the_rate_asked_for(argv, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (256, 192), "teal").save("flat.png")
    out, _ = run(capsys, "compress", "flat.png", "--json", *argv)
    assert json.loads(out)["codec"] == name
    run(capsys, "decompress", "compressed/flat.lcf")


def test_a_fresh_process_decodes_the_same(codecs, photos, capsys):
    run(capsys, "compress", photos / "cat.v2.png", "--codec", codecs / "kl")
    run(capsys, "decompress", "compressed/cat.v2.lcf", "--codec", codecs / "kl")
    options = ["--codec", codecs / "kl", "--out", "fresh"]
    for argv in (["compress", "photos/cat.v2.png"], ["decompress", "compressed/cat.v2.lcf"]):
        assert without_progress(processes.run_forked(processes.COMMAND, *argv, *options).stderr) == ""
    assert Path("fresh/cat.v2.lcf").read_bytes() == Path("compressed/cat.v2.lcf").read_bytes()
    assert np.array_equal(pixels("fresh/cat.v2.png"), pixels("decompressed/cat.v2.png"))


def test_full_disk_is_one_line_and_leaves_nothing_half_written(codecs, photos, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = ["compress", photos / "cat.v2.png", "--codec", codecs / "kl", "--out", "out"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        fails(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path("out").rglob("*"))
    run(capsys, *argv)
