"""Fine-tuning the decoder of every class that opens: nothing that latents depend on changes."""

import shutil

import pytest
import torch
from helpers.autoencoders import CONFIGS, build
from helpers.training import tiny_config, write_images

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.families import FAMILIES
from latent_codec.training.config import ObjectiveConfig, dump_toml
from latent_codec.training.objective import AutoencoderObjective, ObjectiveTerms

UNTRAINED = "ConsistencyDecoderVAE"
FINETUNED = ("AutoencoderKLFlux2", "AutoencoderKLWan 2.2", "PaellaVQModel")


def test_every_class_has_a_tiny_build():
    assert {name.partition(" ")[0].partition(",")[0] for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != UNTRAINED])
def test_a_step_changes_the_decoder_only(name):
    """Batch norms and codebooks included; the last layer is the one that computes last."""
    autoencoder = build(name)
    codec = LatentCodec(autoencoder)
    family, before = codec.family, {key: each.clone() for key, each in autoencoder.state_dict().items()}
    fingerprint = codec.space_fingerprint
    objective = AutoencoderObjective(autoencoder, ObjectiveConfig(posterior="mean"), train_encoder=False)
    objective.train()
    image = torch.rand(1, family.channels, *(family.only_size or (32, 32))) * 2 - 1
    computed = []
    for layer in autoencoder.modules():
        if getattr(getattr(layer, "weight", None), "ndim", 0) > 1:
            layer.register_forward_hook(lambda layer, *_: computed.append(layer))

    outputs = objective(image, None)
    ObjectiveTerms(objective).autoencoder_loss(image, outputs, 0)[0].backward()
    torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], 0.1).step()

    changed = {key for key, each in autoencoder.state_dict().items() if not torch.equal(each, before[key])}
    assert changed and all(map(codec.is_of_decoder, changed))
    assert computed[-1] is family.last_layer and outputs["reconstruction"].shape == image.shape
    codec.weights_changed()
    assert codec.space_fingerprint == fingerprint


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 3, size=(32, 32))


def finetune(folder, photos, **sections) -> list[str]:
    """A command that trains folder/noisy for four steps."""
    table = tiny_config(
        data={"height": 32},
        run={"steps": 4, "checkpoint_every": 2, "log_every": 4, "calibration_images": 1},
        objective={"posterior": "sample"},
        optimizer={"learning_rate": 1e-2},
        **sections,
    ).to_dict()
    del table["model"]["arguments"]
    table["model"] |= {"train": "decoder", "pretrained": "given by --codec"} | sections.get("model", {})
    (folder / "tiny.toml").write_text(dump_toml(table))
    codec = str(folder / "noisy")
    return [
        "train",
        str(folder / "tiny.toml"),
        "--codec",
        codec,
        "--data",
        str(photos),
        "--out",
        str(folder / "run"),
    ]


@pytest.mark.parametrize("name", FINETUNED)
def test_a_finetuned_decoder_keeps_its_space_and_resumes_exactly(name, photos, tmp_path, capsys):
    before = LatentCodec(build(name))
    before.save_pretrained(tmp_path / "noisy")
    command = finetune(tmp_path, photos)

    assert main(command) == 0, capsys.readouterr().err

    after = LatentCodec.from_pretrained(tmp_path / "run")
    old, new = before.autoencoder.state_dict(), after.autoencoder.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old if not before.is_of_decoder(key))
    assert after.space_fingerprint == before.space_fingerprint
    assert after.latent_space == before.latent_space and after.fingerprint != before.fingerprint
    card = (tmp_path / "run" / "codec" / "README.md").read_text()
    assert before.space_fingerprint in card and "Reconstruction by precision: float32" in card
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "codec")
    assert main(command) == 0
    assert LatentCodec.from_pretrained(tmp_path / "run").fingerprint == after.fingerprint


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        (UNTRAINED, {}, "and that of ConsistencyDecoderVAE is not: its decoder is a consistency model"),
        ("AutoencoderTiny", {"model": {"train": "all"}}, 'model.train=... "decoder" for AutoencoderTiny'),
        ("AutoencoderTiny", {"objective": {"kl_weight": 1.0}}, "which has no posterior"),
        (
            "AutoencoderKLWan",
            {"objective": {"activation_weight": 1.0}},
            "whose layers the penalty does not know",
        ),
        ("AutoencoderRAE", {"data": {"height": 64}}, "32, the only side that AutoencoderRAE takes, got 64"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(name, sections, message, photos, tmp_path, capsys):
    LatentCodec(build(name)).save_pretrained(tmp_path / "noisy")
    command = finetune(tmp_path, photos)
    changes = [f"{part}.{key}={value}" for part, values in sections.items() for key, value in values.items()]

    assert main([*command, *(word for change in changes for word in ("--set", change))]) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    for part in message.split("=... "):
        assert part in error
