"""The verb `fit-entropy`: what it writes, what it says, what it refuses; and `info` of what it wrote."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from helpers.commands import fails, files_in
from helpers.processes import COMMAND, run_two
from test_bitstream import build, make_image

from latent_codec import LatentCodec
from latent_codec.bitstream import WrongEntropyModelError, compress, decompress, load_entropy_model
from latent_codec.bitstream.static_entropy import StaticEntropy
from latent_codec.cli import main
from latent_codec.components.codec_folders import ASSETS, WEIGHTS
from latent_codec.images.tensors import write_image

SMALL = [
    "--set=run.steps=2",
    "--set=run.log_every=1",
    "--set=data.height=32",
    "--set=optimizer.batch_size=2",
    "--set=model.arguments.hidden=8",
]
KINDS = {
    "kl": "latent context",
    "vq": "index context",
    "hierarchical": "index context",
    "plain": "index context",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """10 images in `photos`, and codecs of all KINDS without entropy models."""
    folder = tmp_path_factory.mktemp("made")
    for seed in range(10):
        write_image(make_image(32, 40, seed), folder / f"photos/{seed}.png")
    for kind in KINDS:
        build("vq" if kind == "plain" else kind).save_pretrained(folder / kind)
        (folder / kind / "README.md").write_text("# the model card\n")
    VQModel.from_pretrained(folder / "plain").save_pretrained(folder / "plain")  # diffusers' own class
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The current folder, a copy of `made`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def fit(capsys, kind: str, *argv) -> dict:
    """What `fit-entropy --json` says of a codec."""
    capsys.readouterr()
    small = [] if "--static" in argv else SMALL
    assert main(["fit-entropy", "photos", "--codec", kind, "--json", *small, *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_compress_decompress_and_info_find_what_it_wrote(place, capsys, kind, static):
    before = files_in(kind)
    found = fit(capsys, kind, *(["--static"] if static else []))
    after = files_in(kind)
    sidecar = after.pop("entropy.safetensors")
    assert after == before
    assert (found["path"], found["bytes"]) == (f"{kind}/entropy.safetensors", len(sidecar))
    model = load_entropy_model(kind, codec=LatentCodec.from_pretrained(kind))
    assert model.kind == ("static" if static else KINDS[kind])
    assert (found["codec"], found["images"], found["kept"]) == (kind, 10, None)
    assert (found["fingerprint"], found["space_fingerprint"]) == (model.fingerprint, model.space_fingerprint)
    if not static:
        assert (found["run"], found["step"], found["finished"]) == (f"runs/{kind}-entropy", 2, True)
        assert found["bits_per_position"] > 0 and found["held_out_bits_per_position"] > 0

    assert main(["compress", "photos/0.png", "--codec", kind]) == 0
    assert main(["decompress", "compressed/0.lcf", "--codec", kind]) == 0
    assert Path("decompressed/0.png").is_file()

    capsys.readouterr()
    path = f"{kind}/entropy.safetensors"
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["model"]) == ("entropy model", "static" if static else KINDS[kind])
    for key in ("codec", "space_fingerprint", "fingerprint", "bytes"):
        assert facts[key] == found[key]
    assert facts["tables"] == len(model.tables)
    if kind == "kl":
        assert facts["values"] == "latents" and facts["num_steps"] == 101
        assert len(facts["coarsest_steps"]) == len(facts["finest_steps"]) == 3
        ratios = [a / b for a, b in zip(facts["coarsest_steps"], facts["finest_steps"])]
        assert ratios == pytest.approx([2 ** (100 / 16)] * 3, rel=1e-5)
    else:
        assert facts["values"] == "indices" and not facts.keys() & {"num_steps", "coarsest_steps"}
        assert facts["codebook_sizes"] == list(LatentCodec.from_pretrained(kind).codebook_sizes)
    # five phases of each level; of latents each of the four with neighbors for each of three channels
    networks = {"kl": 1 + 4 * 3, "vq": 5, "plain": 5, "hierarchical": 10}[kind]
    assert facts["networks"] == (0 if static else networks)
    assert (facts["weights"] == 0) == isinstance(model, StaticEntropy) == static
    assert main(["info", path]) == 0
    out = capsys.readouterr().out
    assert facts["fingerprint"] in out and f"{facts['bytes']:,}" in out


def test_it_goes_on_from_a_trained_context_model(place, capsys):
    before = fit(capsys, "kl", "--run", "first")
    argv = ["--run", "second", "--set", "model.pretrained=first/entropy", *SMALL[:-1]]
    capsys.readouterr()
    assert main(["fit-entropy", "photos", "--codec", "kl", "--json", *argv]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["held_out_bits_per_position"] != before["held_out_bits_per_position"]
    assert main(["compress", "photos/0.png", "--codec", "kl"]) == 0


def test_it_says_what_it_did(place, capsys):
    assert main(["fit-entropy", "photos", "--codec", "vq", "--limit", "8", *SMALL]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "vq: fitted to 8 images"
    assert re.fullmatch(
        r"\d+\.\d{3} bits per position of training windows, \d+\.\d{3} of held-out images", second
    )
    size = Path("vq/entropy.safetensors").stat().st_size
    assert re.fullmatch(
        rf"Entropy model: .*vq/entropy.safetensors, {size:,} bytes, fingerprint [0-9a-f]{{16}}", last
    )
    assert main(["fit-entropy", "photos", "--codec", "kl", "--static"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "kl: fitted to 10 images" and last.startswith("Entropy model: ")


def test_images_that_cannot_be_read_are_named_and_not_counted(place, capsys, caplog):
    Path("photos/0.png").write_bytes(b"no image")
    for argv in (["--static"], SMALL):
        assert main(["fit-entropy", "photos", "--codec", "vq", *argv]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("vq: fitted to 9 images\n")
        said = err + caplog.text
        assert "skipped: " in said and "0.png" in said


def test_a_codec_of_gray_images_is_counted(place, capsys):
    import diffusers
    from test_bitstream import BLOCKS

    torch.manual_seed(0)
    gray = diffusers.AutoencoderKL(**BLOCKS, in_channels=1, out_channels=1, latent_channels=2)
    LatentCodec(gray).save_pretrained("gray")
    assert fit(capsys, "gray", "--static")["images"] == 10
    assert fit(capsys, "gray")["finished"]


def test_a_codec_is_copied_with_all_that_is_next_to_it(place, capsys):
    Path("kl/preview.safetensors").write_bytes(b"whatever is there")
    before = files_in("kl")
    found = fit(capsys, "kl", "--out", "copy")
    assert files_in("kl") == before
    copied = files_in("copy")
    assert copied.pop("entropy.safetensors") and copied == before
    assert Path(found["path"]) == place / "copy/entropy.safetensors"
    again = fit(capsys, "kl", "--out", "copy")  # the same training, which is at its end
    assert (again["fingerprint"], again["kept"]) == (found["fingerprint"], None)
    assert "copy holds another codec" in fails(
        capsys, "fit-entropy", "photos", "--codec", "vq", "--static", "--out", "copy"
    )


def test_a_shipped_codec_stays_as_it_is(place, capsys):
    before = files_in(ASSETS / "default-f8c4")
    message = fails(capsys, "fit-entropy", "photos", "--codec", "default", "--static")
    assert "default is a shipped codec" in message and "give --out DIR" in message
    assert main(["fit-entropy", "photos", "--codec", "default", "--static", "--out", "copy"]) == 0
    assert files_in(ASSETS / "default-f8c4") == before
    copied = files_in("copy")
    for name in ("config.json", "README.md", WEIGHTS):
        assert copied[name] == before[name]
    assert load_entropy_model("copy", codec=LatentCodec.from_pretrained("default")).kind == "static"


def test_the_same_command_goes_on_to_the_same_model(place, capsys):
    """tests/test_entropy_training.py compares the weights of other kinds."""
    kind = "vq"
    whole = fit(capsys, kind, "--set=run.steps=4", "--run", "whole", "--out", "a")
    stopped = fit(capsys, kind, "--set=run.steps=4", "--run", "again", "--out", "b", "--minutes", "1e-9")
    assert (stopped["step"], stopped["finished"]) == (1, False) and "path" not in stopped
    assert not Path("b/entropy.safetensors").exists()
    on = fit(capsys, kind, "--set=run.steps=4", "--run", "again", "--out", "b")
    assert on["fingerprint"] == whole["fingerprint"]
    assert load_entropy_model("b").fingerprint == whole["fingerprint"]
    assert main(["fit-entropy", "photos", "--codec", kind, *SMALL, "--run", "c", "--minutes", "1e-9"]) == 0
    assert "stopped at step 1; the same command resumes there" in capsys.readouterr().out


def test_a_killed_run_goes_on(place, capsys):
    options = ["--set=run.steps=4", "--set=run.checkpoint_every=2"]
    whole = fit(capsys, "vq", *options, "--run", "whole")
    shutil.copytree("whole", "killed")
    shutil.rmtree("killed/checkpoints/4")
    Path("killed/checkpoints/.4.x.partial").mkdir()
    assert fit(capsys, "vq", *options, "--run", "killed")["fingerprint"] == whole["fingerprint"]


def test_files_of_an_older_model_are_refused_and_opened_by_what_is_kept(place, capsys):
    codec = LatentCodec.from_pretrained("kl")
    older = fit(capsys, "kl", "--static")["fingerprint"]
    assert main(["compress", "photos/0.png", "--codec", "kl"]) == 0
    data = Path("compressed/0.lcf").read_bytes()

    newer = fit(capsys, "kl", "--set=run.seed=1")
    assert newer["fingerprint"] != older
    with pytest.raises(WrongEntropyModelError, match=rf"{older}, not with {newer['fingerprint']}"):
        decompress(LatentCodec.from_pretrained("kl"), data)
    message = fails(capsys, "decompress", "compressed/0.lcf", "--codec", "kl")
    assert older in message and newer["fingerprint"] in message and "Pass that one by --entropy" in message

    assert newer["kept"] == f"kl/entropy-{older}.safetensors"
    assert main(["decompress", "compressed/0.lcf", "--codec", "kl", "--entropy", newer["kept"]]) == 0
    assert load_entropy_model(newer["kept"], codec=codec).fingerprint == older

    # another seed is another model, which is kept, too; a damaged one is not
    assert main(["fit-entropy", "photos", "--codec", "kl", *SMALL, "--run", "more"]) == 0
    assert f"is kept as kl/entropy-{newer['fingerprint']}.safetensors" in capsys.readouterr().out
    Path("kl/entropy.safetensors").write_bytes(b"cut short")
    assert fit(capsys, "kl", "--static")["kept"] is None
    assert len(list(Path("kl").glob("entropy-*"))) == 2


def test_the_fingerprint_follows_from_the_values_and_the_codec(place, capsys):
    found = [
        fit(capsys, "kl", "--static", "--out", name, "--limit", limit)
        for name, limit in (("a", "9"), ("b", "9"), ("c", "8"))
    ]
    assert found[0]["fingerprint"] == found[1]["fingerprint"] != found[2]["fingerprint"]
    build("kl", seed=1).save_pretrained("kl2")
    other = fit(capsys, "kl2", "--static")
    assert other["space_fingerprint"] != found[0]["space_fingerprint"]
    with pytest.raises(ValueError, match="was fitted to kl2"):
        load_entropy_model("kl2", codec=LatentCodec.from_pretrained("kl"))


def test_a_bfloat16_codec_gets_a_model_for_its_space(place, capsys):
    found = fit(capsys, "vq", "--dtype", "bfloat16")
    codec = LatentCodec.from_pretrained("vq")
    assert found["space_fingerprint"] == codec.space_fingerprint
    assert len(compress(codec, make_image(32, 32))) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--minutes", "0"], "--minutes: expected a number above 0, got 0.0"),
        (
            ["--static", "--minutes", "3"],
            "--minutes: expected none without training, got 3.0; leave it or --static out",
        ),
        (["--static", "--set", "run.steps=3"], "--set: expected none without training"),
        (["--static", "--run", "r"], "--run: expected none without training"),
        (["--codec", "nowhere"], "nowhere does not exist"),
        (["--out", "photos"], "photos holds other files and no codec"),
        (["--set", "run.step=3"], "did you mean 'steps'"),
        (["--set", "data.height=64"], "a window that one of the 9 images holds, got '64x64'"),
        (["--set", "model.class_name=IndexContext"], "model.class_name: expected LatentContext for kl"),
        (["--limit", "3"], "trains on all"),
    ],
)
def test_wrong_flags_write_no_model(place, capsys, argv, message):
    small = [] if "--static" in argv else SMALL[2:]
    assert message in fails(capsys, "fit-entropy", "photos", "--codec", "kl", *small, *argv)
    assert not Path("kl/entropy.safetensors").exists() and not list(Path("photos").glob("*.safetensors"))


def test_what_is_wrong_with_a_run_folder_is_said_with_the_flags_of_this_verb(place, capsys):
    argv = ["fit-entropy", "photos", "--codec", "kl", *SMALL]
    assert main([*argv, "--minutes", "1e-9"]) == 0
    message = fails_after_progress(capsys, *argv, "--set=optimizer.learning_rate=1e-4")
    assert "optimizer.learning_rate (0.003 -> 0.0001); give another" in message
    assert "--out" not in message
    assert "nowhere: no such file" in fails(capsys, "fit-entropy", "nowhere", "--codec", "kl")


def fails_after_progress(capsys, *argv) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_two_processes_write_one_model(place, capsys):
    command = ["fit-entropy", "photos", "--codec", "vq", "--out", "copy", "--json", *SMALL]
    process = run_two(COMMAND, *command, ACCELERATE_USE_CPU="true")
    found = json.loads(process.stdout)
    assert "4 images a step, 2 process(es) on cpu" in process.stderr
    assert load_entropy_model("copy").fingerprint == found["fingerprint"]
    assert sorted(files_in("copy")) == ["README.md", "config.json", WEIGHTS, "entropy.safetensors"]


def test_info_of_a_damaged_entropy_model_and_decode_of_a_compressed_file(place, capsys):
    fit(capsys, "vq", "--static")
    path = Path("vq/entropy.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    fails(capsys, "info", str(path))
    path.unlink()
    assert main(["compress", "photos/0.png", "--codec", "vq"]) == 0
    message = fails(capsys, "decode", "compressed/0.lcf", "--codec", "vq")
    assert "compressed/0.lcf is a compressed file: `latent-codec decompress` opens it" in message
    Path("compressed/0.lcf").rename("renamed.bin")
    assert "`latent-codec decompress` opens it" in fails(capsys, "decode", "renamed.bin")
