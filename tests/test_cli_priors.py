"""The verbs of priors: `pipeline` joins, `sample` draws, `evaluate --prior` measures, `info` tells."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import fails, without_progress, write_idx
from helpers.processes import COMMAND, run_forked
from PIL import Image
from test_likelihood import cnn, kl, latents_prior, snail, vq

from latent_codec import ImageClassifier, LatentCodec
from latent_codec.cli import main
from latent_codec.cli.work import sample as sample_verb
from latent_codec.cli.work.summaries import SUMMARIES
from latent_codec.components.prior_folders import load_prior
from latent_codec.evaluation.likelihood import measure_likelihood
from latent_codec.images.sources import open_source
from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipeline

NAMES = ["sandal", "boot", "bag"]
CARD = """---
training_steps: 7
---

# trained

Trained for {steps} steps on garments.

- Last terms: loss {steps}.5

## Configuration

secret
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Codecs, priors and a classifier in folders, `data` of six 16x16 test images, and what is joined of them."""
    folder = tmp_path_factory.mktemp("made")
    codec, levels = vq(), vq((4, 2), (11, 9), name="levels")
    codec.save_pretrained(folder / "mine")
    levels.save_pretrained(folder / "levels")
    kl().save_pretrained(folder / "kl")
    classes = {"num_classes": 3, "sample_size": (4, 4)}
    told = {"space_fingerprint": codec.space_fingerprint, "most_frequent": (5,)}
    snail(codebook_size=12, **classes, **told).save_pretrained(folder / "run/prior")
    snail(codebook_size=11, **classes | {"sample_size": (2, 2)}).save_pretrained(folder / "top")
    cnn(codebook_size=9, condition_channels=4, num_classes=3).save_pretrained(folder / "bottom")
    cnn(data="pixels", sample_size=(8, 6)).save_pretrained(folder / "pixels")
    latents_prior(sample_size=(8, 8)).save_pretrained(folder / "latents")
    torch.manual_seed(1)
    judge = ImageClassifier(1, 3, block_out_channels=(8,), norm_num_groups=4)
    judge.linear.weight.data.mul_(20)  # sure of itself
    judge.save_pretrained(folder / "judged/classifier")
    for steps, part in enumerate(["mine", "run/prior", "judged/classifier"], 1):
        (folder / part / "README.md").write_text(CARD.format(steps=steps))
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    write_idx(folder / "data/t10k-images-idx3-ubyte", rng.integers(0, 256, (6, 16, 16), dtype=np.uint8))
    write_idx(folder / "data/t10k-labels-idx1-ubyte", np.array([0, 1, 2, 2, 1, 0], dtype=np.uint8))
    here = Path.cwd()
    try:
        os.chdir(folder)
        for argv in [
            "--codec mine --prior run --classifier judged --class-names sandal,boot,bag --out joined/pipeline",
            "--codec levels --prior top bottom --out deep",
            "--prior pixels --out plain",
            "--codec kl --prior latents --out smooth",
        ]:
            assert main(["pipeline", *argv.split()]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A folder to write to, with those of `made` in it by links."""
    for entry in made.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts_of(capsys, *argv) -> dict:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def cells(path, height=16, width=16) -> np.ndarray:
    """The images of a grid with gaps of 4 px, (rows, columns, height, width, RGB), as small as they were before they were
    enlarged to 96 px a side or more."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    factor = -(-96 // min(height, width))
    height, width = factor * height, factor * width
    rows, columns = (pixels.shape[0] + 4) // (height + 4), (pixels.shape[1] + 4) // (width + 4)
    assert pixels.shape[:2] == (rows * (height + 4) - 4, columns * (width + 4) - 4)
    pixels = np.pad(pixels, ((0, 4), (0, 4), (0, 0))).reshape(rows, height + 4, columns, width + 4, 3)
    pixels = pixels.transpose(0, 2, 1, 3, 4)[:, :, :height, :width]
    small = pixels[:, :, ::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 2).repeat(factor, 3), pixels)
    return small


# ------------------------------------------------------------------------------------------ pipeline


def test_a_joined_pipeline_has_its_parts_and_their_cards(made):
    folder = made / "joined/pipeline"
    pipe = PriorPipeline.from_pretrained(folder)
    assert LatentCodec(pipe.vae).fingerprint == LatentCodec.from_pretrained(made / "mine").fingerprint
    assert pipe.prior.config.most_frequent == [5]
    assert pipe.config.class_names == NAMES
    grid = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels = torch.tensor([1])
    with torch.no_grad():
        expected = load_prior(made / "run").log_prob(grid, class_labels=labels)
        torch.testing.assert_close(pipe.prior.eval().log_prob(grid, class_labels=labels), expected)

    card = (folder / "README.md").read_text()
    assert "\n# pipeline\n" in card and "sandal, boot, bag" in card
    assert "[`prior`](prior) | PixelSNAIL |" in card and "4x4 codes of 12, 3 classes" in card
    for steps, part in enumerate(["vae", "prior", "classifier"], 1):
        section = card.partition(f"\n## {part}\n")[2].partition("\n## ")[0]
        assert f"Trained for {steps} steps on garments.\n\n- Last terms: loss {steps}.5" in section
        assert (folder / part / "README.md").read_text() == CARD.format(steps=steps)
    assert "secret" not in card and "training_steps" not in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(snippet, "card", "exec")
    assert 'PriorPipeline.from_pretrained("pipeline")' in snippet and 'class_labels="sandal"' in snippet
    for path in folder.rglob("*"):
        assert path.is_dir() or str(made).encode() not in path.read_bytes(), path
    assert not list(made.rglob("*.partial"))


def test_levels_pixels_and_latents_are_joined(made):
    deep = HierarchicalPriorPipeline.from_pretrained(made / "deep")
    assert deep.top_prior.num_values == 11 and deep.bottom_prior.config.condition_channels == 4
    assert deep.middle_prior is None
    assert "It has no model card of its own." in (made / "deep/README.md").read_text()
    assert PriorPipeline.from_pretrained(made / "plain").vae is None
    smooth = PriorPipeline.from_pretrained(made / "smooth")
    assert smooth.prior.config.data == "latents" and smooth.config.class_names is None


def test_half_precision_is_stored_and_its_prior_follows(place, capsys, caplog):
    assert main(["pipeline", "--codec", "mine", "--prior", "run", "--dtype", "float16", "--out", "half"]) == 0
    assert capsys.readouterr().out.splitlines() == ["PriorPipeline of vae, prior", "half"]
    sizes = [
        Path(each, "prior/diffusion_pytorch_model.safetensors").stat().st_size
        for each in ("half", "joined/pipeline")
    ]
    assert sizes[0] < 0.7 * sizes[1]
    half = PriorPipeline.from_pretrained("half")
    assert half.vae.dtype == torch.float32  # loaded as such, in any case
    fingerprint = LatentCodec(half.vae).space_fingerprint
    assert half.prior.config.space_fingerprint == fingerprint
    assert fingerprint != LatentCodec.from_pretrained("mine").space_fingerprint
    assert caplog.text == ""
    assert main(["sample", "half", "--num", "1", "--label", "0"]) == 0
    assert "another" not in caplog.text and "learned the indices" not in caplog.text


def test_a_pipeline_is_replaced_and_nothing_else_is(place, capsys):
    shutil.copytree("plain", "again")
    Path("again/stray.txt").write_text("old")
    assert main(["pipeline", "--prior", "pixels", "--out", "again"]) == 0
    assert Path("again/stray.txt").read_text() == "old", "what else is in the folder stays"
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine")
    Path("file").write_text("mine")
    judge = "judged/classifier"
    before = sorted(path for path in place.rglob("*") if "again" not in str(path))
    for argv, message in [
        ("--prior pixels --out notes", "holds other files and no pipeline"),
        ("--prior pixels --out file", "is a file"),
        ("--prior run --out new", "vae is None; give the autoencoder"),
        ("--codec mine --prior pixels --out new", "leave vae out"),
        (
            "--codec mine --prior top --out new",
            "codebook_size 11, and vae, a HierarchicalVQ, has a codebook of 12",
        ),
        ("--codec levels --prior top --out new", "2 levels; HierarchicalPriorPipeline samples them"),
        ("--codec levels --prior bottom top --out new", "top_prior is a PixelCNN with codebook_size 9"),
        ("--codec mine --prior top bottom --out new", "1 levels, and there are 2 priors"),
        ("--prior top bottom --out new", "expected --codec, since 2 priors"),
        ("--codec levels --prior top top top top --out new", "expected 1 to 3 folders after --prior"),
        ("--codec kl --prior run --out new", "which has no codebook"),
        ("--codec mine --prior run --class-names a,b --out new", "2 class_names"),
        (
            "--codec mine --prior run --classifier run/prior --out new",
            "expected ImageClassifier as classifier, got PixelSNAIL",
        ),
        ("--codec mine --prior run --classifier notes --out new", "notes is no classifier"),
        (f"--codec mine --prior {judge} --out new", "as prior, got ImageClassifier"),
        ("--codec mine --prior nowhere --out new", "nowhere does not exist"),
        ("--codec nowhere --prior run --out new", "nowhere does not exist"),
    ]:
        assert message in fails(capsys, "pipeline", *argv.split()), argv
    assert sorted(path for path in place.rglob("*") if "again" not in str(path)) == before


# ------------------------------------------------------------------------------------------ sample


def test_rows_are_the_classes_and_every_class_is_drawn(place, capsys):
    assert main(["sample", "joined", "--num", "2"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"6 samples of 16x16 from 4x4 indices, seed 0, \d+\.\d s, see samples.png\nrows: sandal, boot, bag\n",
        out,
    )
    assert err == ""
    grid = cells("samples.png")
    assert grid.shape[:2] == (3, 2)

    pipe = PriorPipeline.from_pretrained("joined/pipeline")
    pipe.set_progress_bar_config(disable=True)
    for label, number in [(0, 0), (2, 1)]:
        seed = int(np.random.default_rng((0, label, number)).integers(2**63))
        (image,) = pipe(label, 1, generator=torch.Generator().manual_seed(seed)).images[:1]
        assert image.size == (16, 16)
    assert len({grid[row, column].tobytes() for row in range(3) for column in range(2)}) == 6


def test_a_image_follows_from_seed_label_and_number_alone(place, capsys):
    for name, options in {
        "all": "--num 2",
        "again": "--num 2",
        "more": "--num 5",
        "some": "--num 2 --label bag 0",
        "other": "--num 2 --seed 9",
        "cold": "--num 2 --temperature 0",
        "narrow": "--num 2 --top-k 1",
    }.items():
        assert main(f"sample joined --out {name}.png {options}".split()) == 0
    assert Path("all.png").read_bytes() == Path("again.png").read_bytes()
    every, more, some, other, cold, narrow = (
        cells(f"{name}.png").astype(int) for name in ("all", "more", "some", "other", "cold", "narrow")
    )
    assert np.abs(more[:, :2] - every).max() <= 1  # batches of other sizes round differently
    assert np.abs(some - every[[2, 0]]).max() <= 1
    assert np.abs(other - every).max() > 10
    assert np.array_equal(cold[:, 0], cold[:, 1]) and np.array_equal(cold, narrow)


def test_one_label_and_none_fill_a_square(place, capsys):
    facts = facts_of(
        capsys, *["sample", "joined/pipeline", "--label", "boot", "--num", "5", "--out", "one.png"]
    )
    assert (facts["labels"], facts["class_names"], facts["kept"]) == ([1], ["boot"], 5)
    assert cells("one.png").shape[:2] == (2, 3)
    facts = facts_of(capsys, *["sample", "plain", "--num", "4", "--out", "none.png"])
    assert (facts["labels"], facts["class_names"], facts["size"], facts["grids"]) == (
        None,
        None,
        [8, 6],
        [[8, 6]],
    )
    assert cells("none.png", 8, 6).shape[:2] == (2, 2)
    facts = facts_of(capsys, *["sample", "smooth", "--num", "1", "--size", "8x12", "--out", "s.png"])
    assert (facts["size"], facts["grids"], facts["class"]) == ([8, 12], [[4, 6]], "PriorPipeline")


def test_levels_are_sampled_together(place, capsys):
    facts = facts_of(
        capsys, *["sample", "deep", "--num", "2", "--label", "2", "0", "--size", "16x24", "--top-p", "0.9"]
    )
    assert (facts["class"], facts["grids"]) == ("HierarchicalPriorPipeline", [[2, 3], [4, 6]])
    assert (facts["labels"], facts["class_names"], facts["top_p"]) == ([2, 0], None, 0.9)
    assert cells("samples.png", 16, 24).shape[:2] == (2, 2)


@pytest.mark.parametrize("keep, kept", [("0.25", 2), ("3", 3), ("1.0", 8), ("1", 1)])
def test_keep_returns_the_most_probable_of_each_label(keep, kept, place, capsys):
    facts = facts_of(capsys, *f"sample joined --num 8 --keep {keep} --label 0 2".split())
    assert facts["kept"] == kept and facts["num"] == 8
    assert cells("samples.png").shape[:2] == (2, kept)
    each = facts["probabilities"]
    assert [len(row) for row in each] == [kept] * 2
    assert all(row == sorted(row, reverse=True) for row in each)
    assert main(f"sample joined --num 8 --keep {keep} --label 0 2".split()) == 0
    assert f"kept {kept} of 8 for each label" in capsys.readouterr().out


def test_kept_images_are_among_the_drawn(place, capsys):
    assert main(["sample", "joined", "--num", "8", "--label", "1", "--out", "all.png"]) == 0
    assert main(["sample", "joined", "--num", "8", "--label", "1", "--keep", "2", "--out", "kept.png"]) == 0
    drawn = cells("all.png").reshape(-1, 16 * 16 * 3).tolist()
    kept = cells("kept.png").reshape(-1, 16 * 16 * 3).tolist()
    assert len(kept) == 2
    assert all(image in drawn[:8] for image in kept)


def test_the_preview_ends_as_the_result(place, capsys):
    facts = facts_of(
        capsys, *["sample", "deep", "--num", "3", "--preview", "a/growing.png", "--out", "b/grid.png"]
    )
    assert (facts["preview"], facts["path"]) == ("a/growing.png", "b/grid.png")
    assert Path("a/growing.png").read_bytes() == Path("b/grid.png").read_bytes()
    assert [path.name for path in Path("a").iterdir()] == ["growing.png"]


def test_the_preview_grows_batch_by_batch(place, monkeypatch):
    """Four images in batches of two: the first two stay as they are when the others begin."""
    monkeypatch.setattr(sample_verb, "BATCH_SIZE", 2)
    pipe = PriorPipeline.from_pretrained("joined/pipeline")
    pipe.set_progress_bar_config(disable=True)
    preview = sample_verb.Preview(pipe, Path("growing.png"), num_drawn=4, columns=4)
    sheets = []

    def callback(*progress):
        preview.pace.due = 0.0
        preview(*progress)
        sheets.append(cells("growing.png")[0])

    images = pipe(
        [0, 1], 2, batch_size=2, generator=torch.Generator().manual_seed(0), callback=callback
    ).images
    final = np.stack([np.asarray(image.convert("RGB")) for image in images])
    assert len(sheets) == 2 * 16
    blank = np.full((16, 16, 3), 211)  # light gray
    assert np.array_equal(sheets[0][2], blank) and np.array_equal(sheets[15][3], blank)
    assert not np.array_equal(sheets[0][0], sheets[15][0])
    assert np.array_equal(sheets[15][:2], final[:2]) and np.array_equal(sheets[16][:2], final[:2])
    assert not np.array_equal(sheets[16][2], blank)
    assert np.array_equal(sheets[31], final)


def test_the_preview_is_written_at_most_twice_a_second(place, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sample_verb.time, "monotonic", lambda: now[0])
    pipe = PriorPipeline.from_pretrained("joined/pipeline")
    pipe.set_progress_bar_config(disable=True)
    preview = sample_verb.Preview(pipe, Path("growing.png"), num_drawn=1, columns=1)
    written = []

    def callback(step, *rest):
        Path("growing.png").unlink(missing_ok=True)
        preview(step, *rest)
        if Path("growing.png").exists():
            written.append(step)
        now[0] += 0.125

    pipe(0, 1, callback=callback)
    assert written == [1, 5, 9, 13]


def test_a_fresh_process_samples_what_was_joined(place):
    """The same images as here, and nothing on stderr."""
    done = run_forked(COMMAND, "sample", "joined", "--num", "1", "--out", "fresh.png")
    assert without_progress(done.stderr) == ""
    assert main(["sample", "joined", "--num", "1", "--out", "here.png"]) == 0
    assert Path("fresh.png").read_bytes() == Path("here.png").read_bytes()


def test_sample_refuses_what_it_cannot_do(place, capsys, monkeypatch):
    Path("other").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    shutil.copytree("joined/pipeline", "broken")
    Path("broken/prior/config.json").write_text("{}")
    for argv, message in [
        ("joined --codec kl", "the pipeline joined samples from a prior and --codec kl decodes"),
        ("--codec kl --label 3", "--label samples from a prior and --codec kl decodes"),
        ("--codec kl --preview p.png", "--preview samples from a prior"),
        ("--codec mine", "join the two by `latent-codec pipeline`"),
        ("joined --label bog", "none of the 3 class_names; there are bag"),
        ("joined --label 3", "class_labels are [3]; prior has classes 0 to 2"),
        ("deep --label boot", "expected a number, as the pipeline has no class_names, got 'boot'"),
        ("plain --label 0", "prior has no classes; leave them out"),
        ("deep --keep 2", "the pipeline has none; give it one"),
        ("joined --keep 17", "keep is 17; give how many of the 16"),
        ("joined --keep 1.5", "keep is 1.5"),
        ("joined --size 10", "give multiples of 4"),
        ("joined --size 10x", "expected HEIGHTxWIDTH"),
        ("joined --num 0", "--num: expected at least 1, got 0"),
        ("joined --seed -1", "--seed: expected at least 0, got -1"),
        ("joined --temperature -1", "--temperature: expected a number of at least 0"),
        ("joined --top-k 0", "expected an integer of at least 1"),
        ("joined --top-p 2", "expected a probability above 0"),
        ("joined --out grid.xyz", "sample: grid.xyz: cannot write a .xyz"),
        ("joined --preview other", "other is a folder"),
        ("joined --device nonsense", "device nonsense is not available here"),
        ("nowhere", "nowhere does not exist; give a pipeline's folder or a shipped one (fashion-mnist)"),
        ("mine", "mine is no pipeline"),
        (
            "other",
            "holds a StableDiffusionPipeline; a PriorPipeline or a HierarchicalPriorPipeline is needed",
        ),
        (
            "broken",
            "broken/prior/config.json is not the config of a diffusers model: it names no _class_name",
        ),
    ]:
        assert message in fails(capsys, "sample", *argv.split()), argv
    assert not Path("samples.png").exists()
    with pytest.raises(SystemExit):
        main(["sample", "joined", "--keep", "some"])
    assert "neither a share such as 0.25 nor a number" in capsys.readouterr().err

    monkeypatch.setattr("latent_codec.pipelines.loading.ASSETS", place / "assets")
    for argv in ([], ["fashion-mnist"]):
        assert "fashion-mnist is missing from this installation; reinstall it" in fails(
            capsys, "sample", *argv
        )
    shutil.copytree("joined/pipeline", "assets/fashion-mnist")
    assert facts_of(capsys, "sample", "--num", "1")["pipeline"] == "fashion-mnist"


# ------------------------------------------------------------------------------------------ evaluate, info


def test_evaluate_prints_the_likelihood_and_writes_it(place, capsys):
    argv = ["evaluate", "data", "--prior", "run", "--codec", "mine", "--device", "cpu", "--out", "report"]
    facts = facts_of(capsys, *argv)
    expected = measure_likelihood(
        [load_prior("run")], open_source("data", split="test"), LatentCodec.from_pretrained("mine")
    )
    assert facts["levels"] == expected.to_dict()["levels"]
    assert (facts["bits_per_dim"], facts["num_images"]) == (expected.bits_per_dim, 6)
    assert (facts["data"], facts["prior"], facts["kind"]) == (["data"], "run", "codes")
    assert facts.pop("files") == [f"report/{name}" for name in ("likelihood.json", *SUMMARIES)]
    assert json.loads(Path("report/likelihood.json").read_text()) == facts

    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "run, codes of mine, on data: 6 images" in out
    level = facts["levels"][0]
    for figure in (level["bits_per_index"], level["order_0_bits_per_index"], level["uniform_bits_per_index"]):
        assert f"{figure:.4f}" in out
    assert f"Bits per dim: {facts['bits_per_dim']:.5f}, given 'class' of the label" in out


def test_evaluate_takes_a_pipeline_with_its_own_codec(place, capsys):
    with_codec = facts_of(
        capsys, *["evaluate", "data", "--prior", "run", "--codec", "mine", "--out", "report"]
    )
    joined = facts_of(capsys, *["evaluate", "data", "--prior", "joined/pipeline", "--out", "report"])
    assert joined["levels"] == with_codec["levels"]
    assert joined["space_fingerprint"] == with_codec["space_fingerprint"]

    deep = facts_of(capsys, *["evaluate", "data", "--prior", "deep", "--limit", "4", "--out", "report"])
    assert [level["level"] for level in deep["levels"]] == [0, 1]
    assert deep["bits_per_dim"] == pytest.approx(sum(level["bits_per_dim"] for level in deep["levels"]))
    assert deep["num_images"] == 4
    assert main(["evaluate", "data", "--prior", "deep", "--out", "report"]) == 0
    assert re.search(r"\n +all +\d\.\d{5}", capsys.readouterr().out)

    plain = facts_of(capsys, *["evaluate", "data", "--prior", "plain", "--out", "report"])
    assert (plain["kind"], plain["codec"], plain["num_dims"]) == ("pixels", None, 6 * 256)
    assert (
        facts_of(capsys, *["evaluate", "data", "--prior", "smooth", "--out", "report"])["kind"] == "latents"
    )


def test_evaluate_takes_latent_files(place, capsys):
    assert main(["encode", "data", "--split", "test", "--codec", "levels", "--out", "codes"]) == 0
    files = facts_of(capsys, *["evaluate", "codes", "--prior", "deep", "--out", "report"])
    images = facts_of(capsys, *["evaluate", "data", "--prior", "deep", "--out", "report"])
    assert files["num_dims"] == images["num_dims"]
    for one, other in zip(files["levels"], images["levels"]):
        assert one["bits_per_index"] == pytest.approx(other["bits_per_index"], rel=1e-5)
    assert "which has 2 codebook(s)" not in fails(
        capsys, *["evaluate", "codes", "--prior", "deep", "--codec", "mine"]
    )


def test_evaluate_notes_another_codec_on_stderr(place, capsys):
    tuned = vq()
    with torch.no_grad():
        tuned.autoencoder.encoders[0].downsampling[0].weight.mul_(1.1)
    LatentCodec(tuned.autoencoder).save_pretrained("tuned")
    capsys.readouterr()
    assert main(["evaluate", "data", "--prior", "run", "--codec", "tuned", "--out", "report", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "Note: the prior of level 0 learned the indices of a codec with space" in " ".join(err.split())
    assert len(json.loads(out)["notes"]) == 1


def test_evaluate_refuses_what_does_not_fit(place, capsys):
    for argv, message in [
        ("data --prior run", "expected the codec that the prior, a PixelSNAIL over codes was trained with"),
        ("data --prior run --codec levels", "knows 12 codewords on level 0, and levels has 11"),
        ("data --prior pixels --codec mine", "codec: expected none for the prior"),
        (
            "data --prior run --codec mine --label Smiling",
            'label is "Smiling", and test-00000 has the label 0',
        ),
        ("data --codec mine --label class", "there is no --prior"),
        ("data --prior mine --codec mine", "as prior, got HierarchicalVQ"),
        ("data --prior nowhere", "nowhere does not exist"),
        ("data --prior pixels --device nonsense", "device nonsense is not available here"),
        ("nowhere --prior pixels", "nowhere"),
    ]:
        assert message in fails(capsys, "evaluate", *argv.split()), argv


def test_info_tells_what_priors_and_pipelines_are(place, capsys):
    facts = facts_of(capsys, "info", "run")
    assert (facts["kind"], facts["class"], facts["values_per_index"]) == ("prior", "PixelSNAIL", 12)
    assert (facts["num_classes"], facts["sample_size"]) == (3, [4, 4])
    assert facts["space_fingerprint"] == LatentCodec.from_pretrained("mine").space_fingerprint
    assert facts["parameters"] == sum(each.numel() for each in load_prior("run").parameters())
    facts = facts_of(capsys, "info", "deep")
    assert (facts["kind"], facts["class"]) == ("pipeline", "HierarchicalPriorPipeline")
    assert facts["bottom_prior"]["condition"] == "features (B, 4, h', w')"
    assert facts["vae"]["codebook_sizes"] == [11, 9]
    assert main(["info", "joined/pipeline"]) == 0
    out = capsys.readouterr().out
    assert "sandal, boot, bag" in out and "ImageClassifier" in out and "values per index  12" in out
