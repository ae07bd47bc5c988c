"""Codecs trained for rate and distortion together, with the context model of their compressed files."""

import pytest
import torch
from helpers.training import tiny_config, write_images

from latent_codec import LatentCodec
from latent_codec.bitstream import LatentContextEntropy, compress, decompress
from latent_codec.errors import SettingError
from latent_codec.images.sources import open_source
from latent_codec.models.context_network import LatentContext, freeze_shifts
from latent_codec.training import autoencoder_task
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import ObjectiveConfig
from latent_codec.training.entropy_task import channel_units
from latent_codec.training.loop import train
from latent_codec.training.objective import AutoencoderObjective, ObjectiveTerms


def context_model(channels=2) -> LatentContext:
    torch.manual_seed(0)
    context = LatentContext(units=[0.5] * channels, coarsest=[0.4] * channels, num_steps=33, hidden=8)
    freeze_shifts(context)
    return context


def build(pipeline=None, **settings):
    config = ObjectiveConfig(posterior="mean", rate_weight=0.5, context="it", **settings)
    autoencoder = build_autoencoder(tiny_config())
    autoencoder.register_to_config(shift_factor=0.1)  # which StableDiffusionPipeline does not read
    objective = AutoencoderObjective(autoencoder, config, context=context_model(), pipeline=pipeline)
    return objective, ObjectiveTerms(objective), torch.rand(2, 3, 24, 32) * 2 - 1


@pytest.mark.parametrize("pipeline", [None, "StableDiffusionPipeline"])
def test_the_decoder_gets_what_a_file_would_hold_and_the_bits_are_the_context_models(pipeline):
    objective, terms_of, image = build(pipeline)
    torch.manual_seed(5)
    quality = int(torch.randint(33, ()))
    noise = torch.rand(2, 2, 12, 16) - 0.5
    torch.manual_seed(5)
    outputs = objective(image, None)
    loss, terms = terms_of.autoencoder_loss(image, outputs, 0)

    codec = LatentCodec(objective.autoencoder, pipeline=pipeline)
    assert (codec.latent_space.shift_factor == 0) == (pipeline is not None)
    step_size = 0.4 * 2 ** (-quality / 16)
    scaled = codec.latent_space.normalize(objective.autoencoder.encode(image).latent_dist.mean) / step_size
    raw_latents = codec.latent_space.denormalize(scaled.round() * step_size)
    torch.testing.assert_close(outputs["reconstruction"], objective.autoencoder.decode(raw_latents).sample)
    bits = objective.context(scaled + noise, torch.full((2, 2), step_size)).sum()
    torch.testing.assert_close(terms["bits_per_pixel"], bits / image[:, 0].numel())
    weight = 2 ** (quality / 8)
    whole = weight * terms["mse"] + 0.5 * terms["bits_per_pixel"]
    torch.testing.assert_close(loss, whole / 2 ** (quality / 16))


def test_step_sizes_are_those_of_the_qualities_asked_for():
    objective, _, image = build(rate_qualities=(5, 6))
    weights = {round(float(objective(image, None)["distortion_weight"]), 5) for _ in range(20)}
    assert weights == {round(2 ** (quality / 8), 5) for quality in (5, 6)}


def test_both_terms_reach_the_encoder_and_the_rate_the_context_model():
    objective, terms_of, image = build()
    _, terms = terms_of.autoencoder_loss(image, objective(image, None), 0)
    encoder, context = list(objective.autoencoder.encoder.parameters()), list(objective.context.parameters())
    for name, reached in (("mse", [encoder]), ("bits_per_pixel", [encoder, context])):
        for parameters in reached:
            found = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
            assert any(each is not None and each.abs().max() > 0 for each in found)


def test_until_rate_counts_only_the_context_model_learns_of_it():
    objective, terms_of, image = build()
    outputs = objective(image, None, quantizes=False)
    raw_latents = objective.autoencoder.encode(image).latent_dist.mean
    torch.testing.assert_close(outputs["reconstruction"], objective.autoencoder.decode(raw_latents).sample)
    loss, terms = terms_of.autoencoder_loss(image, outputs, 0)
    torch.testing.assert_close(loss, terms["mse"] + 0.5 * terms["bits_per_pixel"])
    terms["bits_per_pixel"].backward()
    assert all(each.grad is None for each in objective.autoencoder.parameters())
    assert any(each.grad is not None and each.grad.abs().max() > 0 for each in objective.context.parameters())


def test_rate_counts_from_its_first_step(tmp_path):
    write_images(tmp_path / "photos")
    asked = []

    class Noted(AutoencoderObjective):
        def forward(self, *inputs, quantizes):
            asked.append(quantizes)
            return super().forward(*inputs, quantizes=quantizes)

    config = tiny_config(
        objective={"posterior": "mean", "rate_weight": 0.5, "rate_start": 0.5}, run={"steps": 4}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder_task, "AutoencoderObjective", Noted)
        train(config, build_autoencoder(config), open_source(tmp_path / "photos"), tmp_path / "run")
    assert asked == [False, False, True, True]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rate_weight": 0.5, "rate_qualities": (9, 8)}, "rate_qualities: expected the lower quality first"),
        ({"rate_weight": 0.5, "rate_qualities": (9, 101)}, "rate_qualities: expected .* 100"),
        ({"context": "it"}, "rate_weight: expected above 0 with a context model"),
        ({"rate_weight": 0.5, "context": "it", "posterior": "sample"}, 'posterior: expected "mean"'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ObjectiveConfig(**{"posterior": "mean"} | settings)


@pytest.mark.parametrize("is_new", [False, True])
def test_a_run_resumes_and_leaves_the_context_model_that_compresses_with_its_codec(is_new, tmp_path):
    write_images(tmp_path / "photos")
    context_model().save_pretrained(tmp_path / "context")
    source = open_source(tmp_path / "photos")

    def run(name, steps):
        context = None if is_new else str(tmp_path / "context")
        config = tiny_config(
            objective={"posterior": "mean", "rate_weight": 0.5, "context": context},
            optimizer={"fan_in_reference": 72},  # of which networks without inputs have none
            run={"steps": 4, "checkpoint_every": 2},
        )
        network = build_autoencoder(config)
        return train(config, network, source, tmp_path / name, max_minutes=0 if steps == 1 else None)

    whole = run("whole", 4).network.state_dict()
    run("parts", 1)
    parts = run("parts", 4).network.state_dict()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    states = [
        LatentContext.from_pretrained(tmp_path / name / "entropy").state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if not is_new:
        before = context_model().state_dict()
        assert any(not torch.equal(states[0][key], before[key]) for key in before)
    contexts = [LatentContext.from_pretrained(tmp_path / name / "entropy") for name in ("whole", "parts")]
    assert contexts[0].config.coarsest == contexts[1].config.coarsest
    if is_new:
        freeze_shifts(contexts[0])  # which fit-entropy does
    codec = LatentCodec.from_pretrained(tmp_path / "whole")
    model = LatentContextEntropy.export(contexts[0], codec, rate_weight=0.0)
    image = torch.rand(3, 24, 32) * 2 - 1
    data = compress(codec, image, entropy_model=model, quality=20)
    assert decompress(codec, data, entropy_model=model, output_type="pt").shape == image.shape


def test_a_new_context_models_step_sizes_are_measured_of_the_network_that_it_begins_with(tmp_path):
    write_images(tmp_path / "photos")
    config = tiny_config(objective={"posterior": "mean", "rate_weight": 0.5}, run={"steps": 1})
    network, source = build_autoencoder(config), open_source(tmp_path / "photos")
    codec = LatentCodec(build_autoencoder(config))
    train(config, network, source, tmp_path / "run")
    context = LatentContext.from_pretrained(tmp_path / "run/entropy")
    latents = torch.cat([codec.encode(source.image(index)[None]) for index in range(len(source))])
    assert context.config.units == pytest.approx(channel_units(latents).tolist(), rel=0.3)
    assert all(0 < step < 64 * unit for step, unit in zip(context.config.coarsest, context.config.units))


def test_a_context_model_of_other_channels_is_refused_before_anything_is_written(tmp_path):
    write_images(tmp_path / "photos")
    context_model(3).save_pretrained(tmp_path / "context")
    config = tiny_config(
        objective={"posterior": "mean", "rate_weight": 0.5, "context": str(tmp_path / "context")}
    )
    with pytest.raises(
        SettingError, match=r"objective.context: expected a context model of 2 channels, which"
    ):
        train(config, build_autoencoder(config), open_source(tmp_path / "photos"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
