"""The verb `rd`: what it prints, what it leaves, what it refuses."""

import csv
import json
from pathlib import Path

import pytest
from helpers.commands import fails
from PIL import Image
from test_bitstream import build, make_image

from latent_codec import LatentCodec
from latent_codec.bitstream import decompress, fit_static, load_entropy_model
from latent_codec.cli import main
from latent_codec.cli.work.summaries import SUMMARIES
from latent_codec.components.codec_folders import ASSETS
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.tensors import to_image, write_image
from latent_codec.metrics import psnr


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with two images in `photos`, and codecs `kl` (with its entropy model), `bare` and `vq`."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for seed, size in enumerate(((40, 48), (33, 50))):
        write_image(make_image(*size, seed), f"photos/{seed}.png")
    for name, folder in (("kl", "kl"), ("kl", "bare"), ("vq", "vq")):
        build(name).save_pretrained(folder)
    fit_static(LatentCodec.from_pretrained("kl"), [make_image(64, 64, 9)]).save("kl")
    return tmp_path


def test_figures_are_those_of_the_files_it_keeps(place, capsys):
    argv = ["rd", "photos", "--codec", "kl", "--qualities", "40,5", "--against", "jpeg", "--bpp", "0.5,3"]
    assert main([*argv, "--out", "o", "--keep-files", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(Path("o/rd.json").read_text()) == {key: found[key] for key in found if key != "files"}
    assert {Path(path).name for path in found["files"]} == {
        "rd.png",
        "grid.png",
        "rd.json",
        "rd.csv",
        "summary.md",
        "summary.tex",
        "files",
    }
    assert [each["quality"] for each in found["curves"]["kl"]] == [5, 40]
    assert list(found["equal_bytes"]) == ["0.5 bpp", "3 bpp"]

    codec, entropy = LatentCodec.from_pretrained("kl"), load_entropy_model("kl")
    ours = [trial for trial in found["trials"] if trial["compressor"] == "kl"]
    for trial in ours:
        data = Path("o/files", trial["file"]).read_bytes()
        original = to_image(Path(trial["image"]))
        assert trial["num_bytes"] == len(data)
        decoded = to_image(decompress(codec, data, entropy_model=entropy))
        assert trial["psnr"] == pytest.approx(psnr(decoded[None], original[None]).item())
    with Path("o/rd.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["num_bytes"]) for row in rows] == [each["num_bytes"] for each in found["trials"]]

    ceilings = [
        psnr(reconstruct(codec, image), image).item()
        for image in (to_image(Path(f"photos/{seed}.png"))[None] for seed in range(2))
    ]
    assert found["ceiling"]["psnr"] == pytest.approx(sum(ceilings) / 2)
    for name in ("rd.png", "grid.png"):
        with Image.open(Path("o", name)) as image:
            image.load()


def test_tables(place, capsys):
    assert main(["rd", "photos", "--codec", "kl", "--qualities", "5,40", "--against", "jpeg, webp"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("kl on photos: 2 images")
    assert "Note: of 2 images even our coarsest file takes more than 0.15 bpp." in out
    assert "Note: no MS-SSIM, which needs 176 px per side." in out
    assert "kl minus each format, at 0.15 bpp, paired by image" in out and " of 2 " in out
    for expected in ("unquantized", "BD-rate of kl", "Equal bytes, at 0.15 bpp", "jpeg", "webp"):
        assert expected in out
    assert sorted(path.name for path in Path("latent-codec-out/rd").iterdir()) == [
        "grid.png",
        "rd.csv",
        "rd.json",
        "rd.png",
        "summary.md",
        "summary.tex",
    ]
    page, paper = (Path("latent-codec-out/rd", name).read_text() for name in ("summary.md", "summary.tex"))
    assert "\n| jpeg | " in page and "needs 4 rates, ours has 2" in page and "| bpp | bytes |" in page
    assert page.count("\n|---|") == paper.count(r"\begin{tabular}{l") == paper.count(r"\end{table}") == 4
    assert r"95 \% interval" in paper and " & jpeg & webp \\\\\n" in paper


def test_no_curves(place, capsys):
    argv = ["rd", "photos", "--codec", "kl", "--no-curves", "--against", "jpeg", "--out", "o"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "BD-rate" not in out and "Equal bytes, at 0.15 bpp" in out and "unquantized" in out
    assert sorted(path.name for path in Path("o").iterdir()) == ["grid.png", "rd.csv", "rd.json", *SUMMARIES]
    assert "leave it or --no-curves out" in fails(
        capsys, "rd", "photos", "--codec", "kl", "--no-curves", "--qualities", "5"
    )


def test_indices_have_one_rate_and_need_no_entropy_model(place, capsys):
    assert main(["rd", "photos", "--codec", "vq", "--against", "webp", "--out", "o", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["quality"] for each in found["curves"]["vq"]] == [None]
    assert list(found["equal_bytes"]) == ["its own rate"] and found["ceiling"] is None
    fixed = LatentCodec.from_pretrained("vq")
    fit_static(fixed, [make_image(64, 64, 9)]).save("vq.safetensors")
    argv = ["rd", "photos", "--codec", "vq", "--entropy", "vq.safetensors", "--limit", "1", "--out", "p"]
    assert main([*argv, "--json"]) == 0
    coded = json.loads(capsys.readouterr().out)
    assert coded["num_images"] == 1
    for flag, given in (("--bpp", "0.2"), ("--qualities", "3")):
        message = f"{flag}: expected none for vq, which has one rate, its own"
        assert message in fails(capsys, "rd", "photos", "--codec", "vq", flag, given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "gif"], "no format 'gif'"),
        (["--qualities", "5,101"], "--qualities: expected 0 (coarsest) to 100, those of"),
        (["--qualities", "five"], "--qualities: expected integers, separated by commas, got 'five'"),
        (["--bpp", "0"], "--bpp: expected numbers above 0, separated by commas, got '0'"),
        (["--bpp", "nan"], "--bpp: expected numbers above 0, separated by commas, got 'nan'"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--entropy", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--codec", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_arguments_measure_nothing(place, capsys, argv, message):
    assert message in fails(capsys, "rd", "photos", "--codec", "kl", "--out", "o", *argv)
    assert not Path("o").exists() or not any(Path("o").iterdir())


def test_latents_without_an_entropy_model_or_with_anothers(place, capsys):
    message = fails(capsys, "rd", "photos", "--codec", "bare")
    assert "--entropy: expected one for latents of bare, whose folder has no entropy.safetensors" in message
    build("kl", seed=1).save_pretrained("other")
    message = fails(capsys, "rd", "photos", "--codec", "other", "--entropy", "kl")
    assert "was fitted to kl" in message
    assert "nowhere" in fails(capsys, "rd", "nowhere", "--codec", "kl")
    assert ASSETS.is_dir()
