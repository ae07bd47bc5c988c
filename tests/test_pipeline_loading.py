"""A pipeline's folder is opened by what is known here: nothing that it names or holds is run, and every part is whole."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec import ImageClassifier, PixelCNN
from latent_codec.cli import main
from latent_codec.components.codec_folders import WEIGHTS
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipeline
from latent_codec.pipelines.folders import load_pipeline

TRACE = "open({!r}, 'w').close()\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline of all parts."""
    torch.manual_seed(0)
    vae = HierarchicalVQ(strides=(4,), hidden_channels=8, residual_channels=4, embed_dim=4, codebook_sizes=5)
    prior = PixelCNN(codebook_size=5, hidden_channels=8, num_layers=2, num_classes=2, sample_size=(4, 4))
    judge = ImageClassifier(in_channels=3, num_classes=2, block_out_channels=(8,))
    pipe = PriorPipeline(prior, vae, judge, class_names=["cat", "dog"])
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def change_index(folder: Path, **entries) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def test_a_folder_opens_as_it_was_saved(folder):
    pipe = load_pipeline(folder)
    assert [type(each).__name__ for each in (pipe.vae, pipe.prior, pipe.classifier)] == [
        "HierarchicalVQ",
        "PixelCNN",
        "ImageClassifier",
    ]
    assert pipe.config.class_names == ["cat", "dog"] and not pipe.vae.training
    half = PriorPipeline.from_pretrained(folder, torch_dtype=torch.float16, classifier=None)
    assert half.classifier is None and half.prior.dtype == torch.float16
    half.save_pretrained(folder.parent / "again")
    assert PriorPipeline.from_pretrained(folder.parent / "again").prior.dtype == torch.float32


def test_a_shipped_pipeline_opens_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = PriorPipeline.from_pretrained("fashion-mnist")
    assert pipe.config._name_or_path == "fashion-mnist" and len(pipe.config.class_names) == 10
    with pytest.raises(ValueError, match="fashion-mnist holds a PriorPipeline; expected a Hierarchical"):
        HierarchicalPriorPipeline.from_pretrained("fashion-mnist")


def test_nothing_of_a_folder_is_run(folder):
    """Whether the index names a module, the folder holds one of that name, or of the true class's module."""
    ran = folder.parent / "ran"
    code = TRACE.format(str(ran))
    for name in ("evil.py", "prior/evil.py", "pipeline.py", "prior/latent_codec.models.pixelcnn.py"):
        (folder / name).write_text(code)
    load_pipeline(folder)
    for entries in (
        {"prior": ["evil", "PixelCNN"]},
        {"prior": ["evil", "Evil"]},
        {"prior": ["subprocess", "Popen"]},
        {"classifier": ["evil", "Evil"]},
        {"classifier": ["transformers", "Evil"]},
        {"vae": ["diffusers", "Evil"]},
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": "Evil"},
        {"scheduler": ["evil", "Evil"]},
    ):
        before = (folder / "model_index.json").read_text()
        change_index(folder, **entries)
        try:
            load_pipeline(folder)
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            assert entries == {"prior": ["evil", "PixelCNN"]}  # the library's name is not looked at
        (folder / "model_index.json").write_text(before)
    assert not ran.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("part", ["vae", "prior", "classifier"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "nan"])
def test_a_part_that_is_not_whole_is_refused_by_every_verb(part, damage, folder, capsys):
    weights = folder / part / WEIGHTS
    stored = load_file(weights)
    key = next(key for key, tensor in stored.items() if tensor.is_floating_point() and tensor.numel())
    if damage == "missing":
        del stored[key]
    elif damage == "unexpected":
        stored["more"] = torch.zeros(2)
    else:
        stored[key] = torch.full_like(stored[key], float("nan"))
    save_file(stored, weights)
    out = folder.parent / "out"
    judge = ["pipeline", "--prior", folder, "--codec", folder, "--classifier", folder, "--out", out]
    for argv in (["sample", folder], judge, ["info", folder]):
        assert main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert str(weights) in error and error.count("\n") == 1, argv
        assert ("more" if damage == "unexpected" else key) in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"class_names": "cat"}, "expected class_names to be a list of strings, got 'cat'"),
        ({"class_names": [1, 2]}, "expected class_names to be a list of strings"),
        ({"prior": "PixelCNN"}, "expected prior to be a library and a class, got 'PixelCNN'"),
        ({"prior": [None, "PixelCNN"]}, "expected prior to be a library and a class"),
        ({"vae": [["a"], {}]}, "expected vae to be a library and a class"),
        ({"vae": ["diffusers", "VQModel"]}, "has a 'VQModel' as vae, and .* holds a HierarchicalVQ"),
        (
            {"unet": ["diffusers", "UNet"]},
            "expected class_names, classifier, for_pipeline, prior, vae, got 'unet'",
        ),
    ],
)
def test_an_index_is_what_the_pipeline_takes_or_refused(entries, message, folder):
    change_index(folder, **entries)
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


def test_arguments_are_components(folder):
    with pytest.raises(ValueError, match=r"from_pretrained: expected .*prior, vae, got 'scheduler'"):
        PriorPipeline.from_pretrained(folder, scheduler=None)


def test_a_classifier_of_transformers_is_whole_too(folder):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    config.num_labels = 2
    judge = ViTForImageClassification(config).eval()
    pipe = load_pipeline(folder)
    pipe.classifier = judge
    pipe.save_pretrained(folder)
    image = torch.rand(1, 3, 16, 16)
    again = load_pipeline(folder).classifier
    assert torch.equal(again(image).logits, judge(image).logits)
    path = folder / "classifier" / "model.safetensors"
    stored = load_file(path)
    del stored["classifier.weight"]
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier is damaged.*classifier\.weight is missing"):
        load_pipeline(folder)


def test_a_pipeline_opens_from_the_hub(folder):
    snapshot = folder.parent / "models--owner--pipe" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, snapshot)
    pipe = PriorPipeline.from_pretrained("owner/pipe", cache_dir=folder.parent, local_files_only=True)
    assert pipe.config.class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="owner/none is neither a folder here nor could it be had"):
        PriorPipeline.from_pretrained("owner/none", cache_dir=folder.parent, local_files_only=True)
