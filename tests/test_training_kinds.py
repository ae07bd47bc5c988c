"""The registry of what can be trained: a new kind is one file, here this one, and one row."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from helpers.training import tiny_config, weights, write_images
from safetensors.torch import load_file
from torch import nn

from latent_codec.cli import main
from latent_codec.images.sources import open_source
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.kinds import KINDS, TrainingKind
from latent_codec.training.loop import train
from latent_codec.training.report import Journal, NonFiniteLossError, read_metrics
from latent_codec.training.task import Task


class Denoiser(ModelMixin, ConfigMixin):
    """One convolution that removes noise."""

    @register_to_config
    def __init__(self, kernel_size: int = 3):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, kernel_size, padding="same")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)


def build_denoiser(config, source, codec=None) -> Denoiser:
    return construct(Denoiser, dict(config.model.arguments), config.run.seed)


class DenoiserTask(Task):
    def __init__(self, config, network, inputs, accelerator):
        super().__init__(config, network, TrainingCrops.configured(config, inputs.source, 3), accelerator)

    def loss(self, batch, step):
        image = self.to_device(batch)
        error = (self.model(image + 0.1 * torch.randn(image.shape).to(image)) - image).float()
        return error.square().mean(), {"mean_error": error.abs().mean()}


ROW = TrainingKind(
    name="denoiser",
    model_classes=("Denoiser",),
    sections=frozenset(),
    build=f"{__name__}:build_denoiser",
    task=f"{__name__}:DenoiserTask",
)


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "denoiser", ROW)
    path = tmp_path / "denoiser.toml"
    path.write_text(
        '[model]\nclass_name = "Denoiser"\n\n[model.arguments]\nkernel_size = 5\n\n[data]\nheight = 16\n\n'
        "[optimizer]\nbatch_size = 2\nlearning_rate = 1e-3\nwarmup_steps = 0\n\n"
        '[run]\nsteps = 2\nlog_every = 1\ncheckpoint_every = 1\nprecision = "fp32"\n'
    )
    return path


def test_a_kind_of_ones_own_trains_resumes_and_is_written_by_the_command_line(preset, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    argv = ["train", str(preset), "--data", str(images), "--out"]
    assert main([*argv, str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "denoiser")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and "mean_error" in lines[0]
    folder = tmp_path / "run" / "denoiser"
    assert json.loads((folder / "config.json").read_text())["kernel_size"] == 5
    written, averaged = (
        load_file(folder / "diffusion_pytorch_model.safetensors"),
        weights(tmp_path / "run" / "checkpoints" / "2", "ema"),
    )
    assert all(torch.equal(tensor, averaged[f"module.{key}"]) for key, tensor in written.items())
    assert "tags: [denoiser, latent-codec]" in (folder / "README.md").read_text()

    assert main([*argv, str(tmp_path / "again"), "--minutes", "1e-9"]) == 0
    assert main([*argv, str(tmp_path / "again")]) == 0
    again = weights(tmp_path / "again" / "checkpoints" / "2", "ema")
    assert all(torch.equal(tensor, again[key]) for key, tensor in averaged.items())


def test_a_kind_refuses_settings_of_others_streams_and_networks_of_others(preset, tmp_path):
    model = {"class_name": "Denoiser", "arguments": {}}
    with pytest.raises(ValueError, match=r"objective\.kl_weight: expected none for Denoiser"):
        TrainingConfig.from_dict({"model": model, "objective": {"kl_weight": 1.0}})
    config, source = tiny_config(model=model), open_source(write_images(tmp_path / "images"))
    with pytest.raises(ValueError, match="stream: expected none for Denoiser"):
        train(config, build_denoiser(config, source), source, tmp_path / "run", stream=source)
    with pytest.raises(ValueError, match="expected one, got a Denoiser"):
        train(tiny_config(), build_denoiser(config, source), source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_row_names_what_there_is():
    classes = [name for kind in KINDS.values() for name in kind.model_classes]
    assert len(classes) == len(set(classes))
    for name, kind in KINDS.items():
        assert kind.name == name and issubclass(kind.load("task"), Task)
        assert callable(kind.load("build")) and callable(kind.load("finish"))


def journal(tmp_path, **run) -> Journal:
    """One whose terms wait on the device until they are read, as on a GPU."""
    return Journal(
        Accelerator(cpu=True),
        tmp_path,
        tiny_config(run=run),
        start=0,
        images_per_step=2,
        headline=lambda terms: f"loss {terms['loss']:.4f}",
        state=None,
        waits=True,
    )


def test_terms_wait_until_a_line_is_due_and_give_the_mean_of_their_steps(tmp_path):
    book = journal(tmp_path, steps=4, log_every=2)
    for step in range(1, 5):
        book.record(step, {"loss": torch.tensor(float(step)), "used_codes": 2.0}, 1e-3)
    assert [(line["step"], line["loss"], line["used_codes"]) for line in read_metrics(tmp_path)] == [
        (2, 1.5, 2.0),
        (4, 3.5, 2.0),
    ]


def test_a_step_that_was_not_finite_is_named_before_anything_is_kept_of_it(tmp_path):
    book = journal(tmp_path, steps=10, log_every=5)
    for step, loss in enumerate((1.0, 2.0, float("nan"), float("nan")), 1):
        book.record(step, {"loss": torch.tensor(loss)}, 1e-3)
    with pytest.raises(NonFiniteLossError, match="step 2: loss is not finite"):
        book.settle()  # as the loop does before every checkpoint
    assert read_metrics(tmp_path) == []
