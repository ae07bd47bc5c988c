"""What a finished run leaves: a codec that plain diffusers loads, its model card, and the curves."""

import json
import resource
import tomllib

import diffusers
import pytest
import torch
from helpers.training import run_tiny, tiny_config, write_images
from safetensors.torch import load_file

from latent_codec import LatentCodec
from latent_codec.images.sources import open_source
from latent_codec.metrics import lpips_available
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.finish import is_finished
from latent_codec.training.finish_codec import finish_codec, num_calibration_images


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def finished(make_images, out, **sections):
    """Train and finish a tiny run; returns the codec's folder."""
    result = run_tiny(make_images, out, **sections)
    config = tiny_config(**sections)
    return finish_codec(config, result.network, open_source(make_images), out, data_name="images")


def card_of(folder) -> tuple[dict[str, str], str]:
    """The model card's front matter and the rest."""
    head, body = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    return dict(line.split(": ", 1) for line in head.splitlines()), body


def test_the_codec_folder_is_plain_diffusers_with_calibrated_latents(tmp_path, make_images):
    folder = finished(make_images, tmp_path / "mine", objective={"kl_weight": 1e-4}, run={"steps": 2})

    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert diffusers.AutoencoderKL.from_pretrained(folder).config.latent_channels == 2
    config = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in config and config["force_upcast"] is False
    codec = LatentCodec.from_pretrained(tmp_path / "mine")
    latents = torch.cat([codec.encode(path, sample=True) for path in sorted(make_images.iterdir())[:4]])
    # four images were measured, posterior noise included; the sample's noise is another draw
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.15)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.15)
    assert (tmp_path / "mine" / "curves.png").is_file()


def test_the_card_says_what_was_done_without_this_machine(tmp_path, make_images):
    run = {"steps": 2, "log_every": 2}
    folder = finished(make_images, tmp_path / "mine", run=run)
    head, body = card_of(folder)

    assert (head["library_name"], head["lpips_trained"], head["training_steps"]) == (
        "diffusers",
        "false",
        "2",
    )
    assert "# mine\n" in body and "for 2 steps on images." in body
    assert "float16" in body and "Largest activation" in body and "variance is untrained" not in body
    assert str(tmp_path) not in body and str(make_images) not in body
    toml = body.split("```toml\n")[1].split("```")[0]
    assert TrainingConfig.from_dict(tomllib.loads(toml)) == tiny_config(run=run)
    assert is_finished(tiny_config(), tmp_path / "mine", 2) and not is_finished(
        tiny_config(), tmp_path / "mine", 20
    )


def test_the_card_says_that_lpips_was_trained_on(tmp_path, make_images):
    if not lpips_available("squeeze"):
        pytest.skip("needs the LPIPS weights, which are absent")
    sections = {"objective": {"lpips_weight": 0.1}, "data": {"height": 24}, "run": {"steps": 1}}
    assert card_of(finished(make_images, tmp_path / "mine", **sections))[0]["lpips_trained"] == "true"


@pytest.mark.parametrize("quant_conv", [True, False])
def test_a_plain_autoencoder_samples_its_mean_and_says_that_its_variance_is_untrained(
    tmp_path, make_images, quant_conv
):
    arguments = tiny_config().model.arguments
    arguments = arguments | {"use_quant_conv": quant_conv, "use_post_quant_conv": quant_conv}
    folder = finished(
        make_images,
        tmp_path / "mine",
        model={"arguments": arguments},
        objective={"posterior": "mean"},
        run={"steps": 1},
    )

    codec = LatentCodec.from_pretrained(folder)
    image = sorted(make_images.iterdir())[0]
    # the standard deviation left is 3e-7 of a raw latent
    torch.testing.assert_close(codec.encode(image, sample=True), codec.encode(image), rtol=0, atol=1e-4)
    assert "The posterior's variance is untrained" in card_of(folder)[1]


def test_the_stored_precision_is_the_runs(tmp_path, make_images):
    folder = finished(make_images, tmp_path / "mine", run={"codec_dtype": "float16", "steps": 1})
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_calibration_can_be_switched_off(tmp_path, make_images):
    folder = finished(make_images, tmp_path / "mine", run={"calibration_images": 0, "steps": 1})
    config = json.loads((folder / "config.json").read_text())
    assert config["scaling_factor"] == 1, "what was not measured is not claimed"
    assert "Largest activation" not in card_of(folder)[1]


def test_a_short_run_measures_fewer_images_and_never_none():
    def asked(steps, **data):
        config = load_config(
            "default-f8c4", [f"run.steps={steps}", *(f"data.{k}={v}" for k, v in data.items())]
        )
        return num_calibration_images(config)

    assert asked(20) == 8  # encoding 256 images of 512 px would take several times as long as these steps
    assert 8 < asked(500) < 256 == asked(10**6)
    assert asked(500, height=256, width=256) > asked(500)


def test_a_full_disk_leaves_no_half_codec(tmp_path, make_images):
    result = run_tiny(make_images, tmp_path / "mine", run={"steps": 1})
    source = open_source(make_images)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            finish_codec(tiny_config(), result.network, source, tmp_path / "mine", data_name="images")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # What the checkpoint left stays as it is.
    assert [path.name for path in (tmp_path / "mine").iterdir() if "codec" in path.name] == ["codec"]
    assert "unfinished: true" in (tmp_path / "mine" / "codec" / "README.md").read_text()
