"""Names of version 0.1 work until 0.3, each warning of its new name."""

import json
import shutil
import sys
from importlib import import_module

import pytest
import torch
from helpers.processes import run_forked

from latent_codec import LatentCodec, bitstream, deprecated
from latent_codec.cli import build_parser
from latent_codec.components.codec_folders import ASSETS
from latent_codec.families.latent_space import LatentSpace
from latent_codec.models.context_network import LatentContext
from latent_codec.pipelines import PriorPipeline
from latent_codec.training.checkpoints import load_checkpoint, save_checkpoint
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.report import read_metrics


@pytest.mark.parametrize("old", deprecated.MODULES)
def test_old_module_paths_import_and_give_what_is_at_the_new_ones(old):
    sys.modules.pop(old, None)
    new = import_module(deprecated.MODULES[old])
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new.__name__}"):
        module = import_module(old)
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(new, name) for name in public)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_every_old_name_leads_to_one_that_exists():
    modules = [import_module(name) for name in (*deprecated.MODULES.values(), *deprecated.ELSEWHERE.values())]
    modules += [
        import_module(f"latent_codec.{name}")
        for name in (
            "bitstream.compression",
            "codec",
            "evaluation.codes",
            "evaluation.comparison",
            "evaluation.reconstruction",
            "models.autoregressive",
            "models.classifier",
            "models.context_network",
        )
    ]
    for old, new in deprecated.NAMES.items():
        assert any(hasattr(module, new) for module in modules), old


def test_old_names_come_out_of_old_modules():
    from latent_codec.images import files, sources, tensors

    for module in ("latent_codec.picture_sources", "latent_codec.pictures"):
        sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning):
        from latent_codec.picture_sources import FolderPictures, PictureSource
    with pytest.warns(DeprecationWarning):
        from latent_codec.pictures import SUFFIXES, find_pictures, read_picture
    assert (FolderPictures, PictureSource) == (sources.FolderImages, sources.ImageSource)
    assert (find_pictures, read_picture) == (files.find_images, tensors.read_image)
    assert ".png" in SUFFIXES


def test_convert_is_also_under_its_old_name():
    from latent_codec import conversion, convert

    with pytest.warns(DeprecationWarning, match=r"conversion.convert is now latent_codec.converting.convert"):
        assert conversion.convert is convert


def test_the_face_and_its_modules_know_the_classifiers_old_name():
    import latent_codec
    from latent_codec.models import classifier

    for module in (latent_codec, classifier):
        with pytest.warns(DeprecationWarning, match="PictureClassifier is now .*ImageClassifier"):
            assert module.PictureClassifier is latent_codec.ImageClassifier
    with pytest.raises(AttributeError, match="no attribute 'WholeNumberPicture'"):
        _ = latent_codec.WholeNumberPicture


def test_space_is_read_and_written_through_its_old_name():
    codec = LatentCodec.from_pretrained()
    with pytest.warns(DeprecationWarning, match=r"LatentCodec\.space is now latent_space"):
        assert codec.space is codec.latent_space
    changed = LatentSpace(4, 8, scaling_factor=0.5, mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.warns(DeprecationWarning):
        codec.space = changed
    assert codec.latent_space == changed and codec.autoencoder.config.scaling_factor == 0.5


def test_step_sizes_and_code_lengths_are_read_by_their_old_names():
    codec = LatentCodec.from_pretrained()
    model = bitstream.sidecar(codec)
    data = bitstream.compress(codec, torch.zeros(3, 16, 16), quality=7)
    decoded = bitstream.read(codec, data)
    with pytest.warns(DeprecationWarning, match="is now step_sizes"):
        assert model.steps is model.step_sizes
    with pytest.warns(DeprecationWarning, match="is now num_step_sizes"):
        assert model.num_steps == 101
    with pytest.warns(DeprecationWarning, match=r"Header\.steps_index is now step_size_index"):
        assert decoded.container.header.steps_index == 7
    with pytest.warns(DeprecationWarning, match=r"ideal_bits\(decoded\) is now decoded\.code_length"):
        assert bitstream.ideal_bits(decoded, model) == decoded.code_length > 0
    with pytest.warns(DeprecationWarning, match=r"LatentContext\.steps is now step_sizes"):
        assert LatentContext([1.0], [0.5], num_steps=2).steps()[0].tolist() == [0.5]


def test_runs_and_presets_of_0_1_are_read():
    table = {"model": {"class_name": "PictureClassifier"}, "run": {"calibration_pictures": 3}}
    with pytest.warns(DeprecationWarning, match=r"run\.calibration_pictures is now run\.calibration_images"):
        config = TrainingConfig.from_dict(table)
    assert config.kind.name == "classifier" and config.run.calibration_images == 3
    assert table["run"] == {"calibration_pictures": 3}, "what was given stays as it is"
    with pytest.warns(DeprecationWarning):
        assert load_config("default-f8c4", ["run.calibration_pictures=5"]).run.calibration_images == 5


def test_checkpoints_and_metrics_of_0_1_are_read(tmp_path):
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    save_checkpoint(
        tmp_path, 7, {"model": module}, {"optimizer": optimizer}, keep=1, state={"pictures_per_step": 4}
    )
    state = load_checkpoint(tmp_path / "checkpoints" / "7", {"model": module}, {"optimizer": optimizer})
    assert state["images_per_step"] == 4 and "pictures_per_step" not in state
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "pictures_per_second": 2.5}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "images_per_second": 2.5}]


def test_pipelines_that_hold_a_classifier_under_its_old_name_open(tmp_path):
    shutil.copytree(ASSETS / "fashion-mnist", tmp_path / "old")
    for name in ("model_index.json", "classifier/config.json"):
        path = tmp_path / "old" / name
        text = path.read_text()
        assert "ImageClassifier" in text
        path.write_text(text.replace("ImageClassifier", "PictureClassifier"))
    pipe = PriorPipeline.from_pretrained(tmp_path / "old")
    assert type(pipe.classifier).__name__ == "ImageClassifier"
    pipe.save_pretrained(tmp_path / "new")
    assert (
        json.loads((tmp_path / "new" / "model_index.json").read_text())["classifier"][1] == "ImageClassifier"
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fit-preview", "--pictures", "a", "b"], ["a", "b"]),
        (["info", "default", "--against", "default", "--pictures", "a"], ["a"]),
        (["info", "--against", "default", "--images", "a"], ["a"]),
        (["fit-preview", "--images", "a"], ["a"]),
    ],
)
def test_old_flags_are_taken_and_hidden(argv, expected, capsys):
    parser = build_parser(argv[0])
    assert parser.parse_args(argv).data == expected
    assert f"Note: {argv[-len(expected) - 1]} is now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args([argv[0], "--help"])
    assert "--pictures" not in capsys.readouterr().out


def test_importing_the_package_warns_of_nothing():
    run_forked(
        "import warnings\n"
        "warnings.filterwarnings('error', category=DeprecationWarning, module='latent_codec')\n"
        "import latent_codec, latent_codec.codec, latent_codec.cli, latent_codec.pipelines.prior_pipeline"
    )
