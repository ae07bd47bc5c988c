"""HierarchicalKL (NVAE): its mathematics against torch's, what it refuses, its family, and its training."""

import json
import math
import pickle

import pytest
import torch
from helpers.autoencoders import build
from helpers.commands import fails
from helpers.training import write_images
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from latent_codec import HierarchicalKL, LatentCodec
from latent_codec.analysis.groups import measure_groups, redraw_groups
from latent_codec.cli import main
from latent_codec.evaluation.latents import LatentMeter
from latent_codec.evaluation.meters import Batch
from latent_codec.images.sources import open_source
from latent_codec.models.likelihoods import GaussianLikelihood, LogisticMixtureLikelihood
from latent_codec.models.spectral_values import LargestSingularValues
from latent_codec.training.config import TrainingConfig
from latent_codec.training.hierarchical_kl_task import build_hierarchical_kl, kl_coefficients
from latent_codec.training.loop import train
from latent_codec.training.report import read_metrics


def tiny(seed: int = 0, **config) -> HierarchicalKL:
    """Three groups over two scales, of 2 px and 4 px, with all weights random: those that begin at 0, too."""
    torch.manual_seed(seed)
    sizes = {
        "block_out_channels": (8, 8),
        "groups_per_scale": (2, 1),
        "latent_channels": 2,
        "num_mixtures": 2,
    }
    model = HierarchicalKL(
        **{"in_channels": 1, "expansion": 2, "kernel_size": 3, "sample_size": 8} | sizes | config
    )
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> HierarchicalKL:
    return tiny()


@pytest.fixture(scope="module")
def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 1, 8, 12), generator=generator) / 127.5 - 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_latents_are_a_list_of_groups_top_first(model, image):
    latents = model.encode(image)
    assert [tuple(each.shape) for each in latents] == [(3, 2, 2, 3), (3, 2, 4, 6), (3, 2, 4, 6)]
    assert model.group_sides == [4, 2, 2] and model.multiple == 4
    assert model.decode(latents).sample.shape == image.shape
    torch.testing.assert_close(model(image).sample, model.decode(latents).sample)
    packed = model.pack(latents)
    assert packed.shape == (3, 6, 4, 6)
    assert all(torch.equal(ours, each) for ours, each in zip(model.unpack(packed), latents))
    assert torch.equal(model.decode(packed).sample, model.decode(latents).sample)


def test_noise_on_the_finest_grid_is_noise_in_every_group(model):
    noise = torch.randn(1, 6, 128, 128, generator=seeded())
    groups = model.unpack(noise)
    assert [float(each.std()) for each in groups] == pytest.approx([1] * 3, abs=0.02)
    latents = [torch.randn(each.shape, generator=seeded()) for each in groups]
    torch.testing.assert_close(
        model.pack(latents).norm(), torch.cat([each.flatten() for each in latents]).norm()
    )


@torch.no_grad()
def test_the_divergence_is_that_of_equation_2(model, image):
    """KL(N(mu + delta_mu, sigma delta_sigma) || N(mu, sigma)), as torch.distributions has it, from the group's own outputs."""
    features, hiddens = model._features(image), []
    hooks = [
        group.hidden_in.register_forward_hook(lambda module, inputs, output: hiddens.append(inputs[0]))
        for group in model.groups
    ]
    elbo = model.elbo(image, generator=seeded())
    for hook in hooks:
        hook.remove()
    positions = [i for i, each in enumerate(model.top_down) if each in model.groups]
    for number, (group, hidden, position) in enumerate(zip(model.groups, hiddens, positions)):
        mu, log_sigma = group.prior(hidden)
        joined = nn.functional.silu(features[position] + group.hidden_in(hidden))
        delta_mu, log_delta = group.posterior_out(joined).chunk(2, 1)
        delta_sigma = torch.exp(5 * torch.tanh(log_delta / 5))
        prior = Normal(mu, log_sigma.exp())
        posterior = Normal(mu + delta_mu, log_sigma.exp() * delta_sigma)
        expected = kl_divergence(posterior, prior).sum((1, 2, 3))
        torch.testing.assert_close(elbo.kl[:, number], expected, rtol=1e-4, atol=1e-4)
        if number == 0:
            assert not mu.any() and not log_sigma.any(), "the top group's prior is N(0, I)"
    assert (elbo.kl > 0).all()


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic_mixture"])
def test_the_elbo_bounds_the_likelihood_by_brute_force(likelihood):
    """Two groups of one value each, one pixel: p(x) is a double integral, and sums to 1 over all 256 values."""
    model = tiny(
        patch_size=1, block_out_channels=(8,), groups_per_scale=(2,), latent_channels=1, likelihood=likelihood
    )
    values = torch.arange(256).view(-1, 1, 1, 1) / 127.5 - 1
    grid = torch.linspace(-5, 5, 41)
    top, bottom = (each.reshape(-1, 1, 1, 1) for each in torch.meshgrid(grid, grid, indexing="ij"))
    weights = (Normal(0, 1).log_prob(top) + Normal(0, 1).log_prob(bottom)).flatten() + 2 * math.log(0.25)
    with torch.no_grad():
        for group in model.groups:  # near the prior, so that few draws suffice
            group.posterior_out.weight *= 0.2
            group.posterior_out.bias *= 0.2
        parameters = model._image_parameters([top, bottom], 0, None)
        nats = torch.stack(
            [
                torch.logsumexp(
                    weights + model.image_likelihood.log_prob(parameters, value.expand(len(top), 1, 1, 1)), 0
                )
                for value in values[:, None]
            ]
        )
        assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-3)
        chosen = values[::51]
        elbo = [
            model.elbo(chosen.repeat(2000, 1, 1, 1), generator=seeded()),
            model.elbo(chosen, num_groups=0),
        ]
        bound = -elbo[0].bits_per_dim.view(2000, -1).mean(0) * math.log(2)
        exact = nats[::51]
        assert (bound < exact + 0.02).all()

        # Weighted by p / q, draws of the posterior estimate the likelihood itself (arXiv:1509.00519, equation 8).
        found = model._infer(model._features(chosen.repeat(4000, 1, 1, 1)), sample=True, generator=seeded())
        log_q = sum(
            Normal(mean, (0.5 * log_variance).exp()).log_prob(value).flatten()
            for value, mean, log_variance in zip(found.latents, found.means, found.log_variances)
        )
        log_p = sum(Normal(0, 1).log_prob(value).flatten() for value in found.latents)
        nll = model.image_likelihood.log_prob(model.image_decoder(found.hidden), chosen.repeat(4000, 1, 1, 1))
        estimate = torch.logsumexp((nll + log_p - log_q).view(4000, -1), 0) - math.log(4000)
        torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    assert elbo[1].kl.eq(0).all()


def test_a_mixture_of_one_channel_after_another_sums_to_one():
    likelihood = LogisticMixtureLikelihood(2, 3)
    parameters = torch.randn(1, likelihood.num_parameters, 1, 1, generator=seeded())
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    pairs = torch.stack([first, second], -1).view(-1, 2, 1, 1) / 127.5 - 1
    probability = likelihood.log_prob(parameters.expand(len(pairs), -1, -1, -1), pairs).double().exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-4)
    mean = likelihood.mean(parameters)
    assert mean.shape == (1, 2, 1, 1) and mean.abs().max() <= 1


def test_fewer_groups_are_decoded_with_the_rest_from_the_prior(model, image):
    latents = model.encode(image)
    zeros = [torch.zeros_like(each) for each in latents]
    cold = model.decode(latents[:1]).sample
    assert torch.equal(cold, model.decode([latents[0], *zeros[1:]]).sample)
    drawn = [model.decode(latents[:2], temperature=0.7, generator=seeded(seed)).sample for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    noise = torch.randn(latents[2].shape, generator=seeded(3))
    torch.testing.assert_close(drawn[0], model.decode([*latents[:2], 0.7 * noise]).sample)


def test_samples_follow_from_the_generator(model):
    found = [model.sample(2, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].shape == (2, 1, 8, 8) and found[0].abs().max() <= 1
    assert model.sample(1, 0.5, size=(12, 4)).shape == (1, 1, 12, 4)
    cold = model.sample(3, 0.0)
    torch.testing.assert_close(cold, cold[:1].expand(3, -1, -1, -1))
    half = tiny().to(torch.bfloat16).sample(2, generator=seeded())
    torch.testing.assert_close(half.float(), found[0], rtol=0, atol=0.1)


def test_the_posterior_of_a_codec(model, image):
    codec = LatentCodec(model)
    assert torch.equal(codec.encode(image), model.pack(model.encode(image)))
    drawn = codec.encode(image, sample=True, generator=seeded(5))
    assert torch.equal(drawn, model.pack(model.encode(image, sample=True, generator=seeded(5))))
    posterior = codec.posterior(image)
    assert posterior.mode().shape == posterior.var.shape == (3, 6, 4, 6)
    meter = LatentMeter(6)
    meter.add(Batch(originals=image, encoding=codec.encode_all(image)))
    nats = torch.tensor(meter.result().kl).sum() * 24
    with torch.no_grad():
        by_group = sum(
            kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0, 1)).sum((1, 2, 3))
            for mean, log_variance in zip(*model._infer(model._features(image), sample=False)[2:])
        )
    torch.testing.assert_close(posterior.kl(), by_group)
    assert float(nats) == pytest.approx(float(by_group.mean()), rel=1e-4)


def test_odd_sizes_come_back(model):
    codec = LatentCodec(model)
    image = torch.rand(1, 7, 10, generator=seeded()) * 2 - 1
    latents = codec.encode(image)
    assert latents.shape == (1, 6, 4, 6) and codec.latent_space.downsampling_factor == 2
    assert codec.decode(latents, size=(7, 10), output_type="pt")[0].shape == (1, 7, 10)
    with pytest.raises(ValueError, match="sides are multiples of 4"):
        codec.decode(latents[..., :5])
    assert len(codec.fingerprint) == 16
    assert torch.equal(LatentCodec(pickle.loads(pickle.dumps(model))).encode(image), latents)


def test_a_scale_may_have_no_latents(image):
    model = tiny(block_out_channels=(8, 8, 8), groups_per_scale=(0, 0, 1))
    codec = LatentCodec(model)
    assert codec.latent_space.downsampling_factor == 8 and model.group_shapes(8, 8) == [(2, 1, 1)]
    padded = nn.functional.pad(image, (0, 4))
    assert model.elbo(padded).bits_per_dim.shape == (3,) and model(padded).sample.shape == padded.shape
    middle = tiny(block_out_channels=(8, 8, 8), groups_per_scale=(1, 0, 1))
    assert middle.group_sides == [8, 2] and middle(padded).sample.shape == padded.shape


def test_a_decoder_that_is_tuned_changes_no_latent(model, image):
    codec = LatentCodec(tiny())
    before, decoded = codec.encode(image), codec.decode(codec.encode(image), output_type="pt")
    with torch.no_grad():
        for key, parameter in codec.autoencoder.named_parameters():
            if codec.is_of_decoder(key):
                parameter.add_(0.1)
    assert torch.equal(codec.encode(image), before)
    assert not torch.equal(codec.decode(before, output_type="pt"), decoded)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"patch_size": 3}, "power of two as patch_size, got 3"),
        ({"groups_per_scale": (1,)}, "as many groups_per_scale as block_out_channels"),
        ({"groups_per_scale": (1, 0)}, "at least 0, and 1 at the last"),
        ({"kernel_size": 4}, "odd kernel_size, got 4"),
        ({"likelihood": "poisson"}, "logistic_mixture or gaussian, got 'poisson'"),
    ],
)
def test_networks_that_there_are_not(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_inputs_that_do_not_fit(model, image):
    latents = model.encode(image)
    for call, message in (
        (
            lambda: model.encode(image[..., :7]),
            "multiples of 4, the pixels of a position of the top group, got 8 x 7",
        ),
        (lambda: model.decode([]), "latents of 1 to 3 groups, top first, got 0"),
        (lambda: model.decode([latents[0], latents[0]]), r"latents of group 2 \(3, 2, 4, 6\), got"),
        (lambda: model.decode(latents[:1], temperature=-1), "temperature of at least 0, got -1"),
        (lambda: model.elbo(image, num_groups=4), "num_groups from 0 to 3, the model's, got 4"),
        (lambda: model.posterior(image).kl(model.posterior(image)), "divergence is from the prior"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_largest_singular_values():
    model = tiny()
    values = LargestSingularValues(model)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    expected = []
    for each in convolutions:
        matrix = each.weight.flatten(1)
        if each.groups > 1:
            matrix = torch.block_diag(*matrix.split(1))
        expected.append(torch.linalg.svdvals(matrix)[0])
    found = values(num_steps=200)
    torch.testing.assert_close(found.sort().values, torch.stack(expected).sort().values, rtol=1e-3, atol=1e-4)

    # Its gradient is that of the singular value: u v^T.
    found.sum().backward()
    weight = convolutions[1].weight
    u, _, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    torch.testing.assert_close(weight.grad.flatten(1), torch.outer(u[:, 0], v[0]), rtol=0, atol=1e-2)
    assert len(values.state_dict()) and not list(values.parameters())


def test_divergences_are_balanced_until_they_have_their_weight():
    kl, sizes = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([4.0, 16.0, 16.0])
    found = kl_coefficients(4, 10, kl, sizes)
    share = (kl + 0.01 / 3) / sizes
    torch.testing.assert_close(found, 0.5 * share / share.mean())
    assert float(found.mean()) == pytest.approx(0.5) and found[0] > found[1] > found[2] > 0
    assert kl_coefficients(4, 10, None, sizes).tolist() == [0.5] * 3
    assert (
        kl_coefficients(9, 10, kl, sizes).tolist() == kl_coefficients(0, 0, kl, sizes).tolist() == [1.0] * 3
    )


def config_of(**sections) -> TrainingConfig:
    arguments = {"block_out_channels": [8, 8], "groups_per_scale": [1, 1], "latent_channels": 2}
    arguments |= {"in_channels": 1, "expansion": 1, "kernel_size": 3, "num_mixtures": 2}
    table = {
        "model": {"class_name": "HierarchicalKL", "arguments": arguments},
        "data": {"height": 8, "held_out": 0.3},
        "optimizer": {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0},
        "run": {
            "steps": 3,
            "log_every": 1,
            "precision": "fp32",
            "calibration_images": 4,
            "checkpoint_every": 2,
        },
    }
    for name, values in sections.items():
        table.setdefault(name, {}).update(values)
    return TrainingConfig.from_dict(table)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, and its images."""
    folder = tmp_path_factory.mktemp("hierarchy")
    images = write_images(folder / "images", channels=1, size=(12, 10))
    config = config_of(hierarchy={"kl_warmup": 2})
    source = open_source(images)
    result = train(config, build_hierarchical_kl(config, source), source, folder / "run")
    finish = config.kind.load("finish")
    finish(config, result.network, source, folder / "run", data_name="images")
    return folder


def test_a_run_is_a_codec_and_resumes_to_the_same_weights(trained, tmp_path):
    lines = read_metrics(trained / "run")
    expected = {"loss", "nll", "kl", "kl_1", "kl_2", "bits_per_dim", "spectral", "gradient_norm"}
    assert expected <= lines[-1].keys() and lines[-1]["held_out_bits_per_dim"] > 0
    assert lines[-1]["kl"] == pytest.approx(lines[-1]["kl_1"] + lines[-1]["kl_2"])
    assert sorted(each.name for each in (trained / "run" / "samples").iterdir()) == [
        "00000003-drawn.png",
        "00000003.png",
    ]
    codec = LatentCodec.from_pretrained(trained / "run")
    assert codec.latent_space.scaling_factor == 1 and [each.side for each in codec.family.groups] == [4, 2]

    config, source = config_of(hierarchy={"kl_warmup": 2}), open_source(trained / "images")
    train(config, build_hierarchical_kl(config, source), source, tmp_path, max_minutes=1e-9)
    again = train(config, build_hierarchical_kl(config, source), source, tmp_path).network
    state = codec.autoencoder.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_checkpointed_gradients_are_the_same(image):
    gradients = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.elbo(image, generator=seeded()).bits_per_dim.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_random_latents_of_a_codec_are_its_samples(model, tmp_path, capsys):
    LatentCodec(model).save_pretrained(tmp_path / "mine")
    argv = ["sample", "--codec", str(tmp_path / "mine"), "--num", "2", "--out", str(tmp_path / "drawn.png")]
    assert main([*argv, "--size", "6x10", "--temperature", "0.7", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latent_shape"] == [6, 4, 6] and "N(0, I), as they are times 0.7" in facts["drawn"]


def test_settings_that_do_not_fit(trained, tmp_path):
    source = open_source(trained / "images")
    for config, message in (
        (config_of(data={"height": 10}), "data.height: expected a multiple of 4"),
        (config_of(data={"binarize": True}), "data.binarize: expected false for a HierarchicalKL"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, build_hierarchical_kl(config, source), source, tmp_path / "run")
    with pytest.raises(ValueError, match="only these kinds of training read it: hierarchical"):
        TrainingConfig.from_dict({"hierarchy": {"kl_weight": 2.0}})


def test_the_sheet_of_groups(trained, tmp_path, capsys):
    run, images, out = trained / "run", trained / "images", tmp_path / "groups.png"
    common = [str(images), "--codec", str(run), "--out", str(out), "--num", "3"]
    assert main(["groups", *common, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["side"] for each in facts["groups"]] == [4, 2] and facts["num_images"] == 6
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 60 and sheet.height > 3 * 60
    assert main(["groups", *common, "--image", str(images / "02.png")]) == 0
    assert "2 groups, KL" in capsys.readouterr().out
    assert "--temperature: expected a number of at least 0" in fails(
        capsys, "groups", *common, "--temperature", "-1"
    )
    assert "--codec: expected a codec with groups" in fails(capsys, "groups", images)
    LatentCodec(build("AutoencoderKL")).save_pretrained(tmp_path / "kl")
    words = fails(capsys, "groups", images, "--codec", tmp_path / "kl", "--out", out)
    assert (
        "needs a codec with groups of latents (HierarchicalKL), and kl is of the class AutoencoderKL" in words
    )


def test_groups_that_are_kept_and_redrawn(model):
    codec = LatentCodec(model)
    image = torch.rand(1, 8, 12, generator=seeded()) * 2 - 1
    rows = redraw_groups(codec, image, num=3, seed=2)
    assert len(rows) == 4 and all(row.shape == (3, 1, 8, 12) for row in rows)
    reconstruction = codec.roundtrip(image, output_type="pt")
    torch.testing.assert_close(rows[-1], reconstruction.expand(3, -1, -1, -1))
    assert not torch.equal(rows[0][0], rows[0][1])
    cold = redraw_groups(codec, image, num=1, temperature=0)
    expected = model.decode(model.encode(image[None])[:1]).sample.clamp(-1, 1)
    torch.testing.assert_close(cold[1], expected)


def test_shares_of_groups_are_those_of_the_elbo(model, tmp_path):
    codec = LatentCodec(model)
    source = open_source(write_images(tmp_path, 2, channels=1, size=(8, 8)))
    found = measure_groups(codec, source)
    images = torch.stack([source.image(index, 1) for index in range(2)])
    draws = seeded()
    with torch.no_grad():
        expected = [model.elbo(images, num_groups=count, generator=draws) for count in range(4)]
    assert [each.bits_per_dim for each in found.groups] == pytest.approx(
        [float(each.bits_per_dim.mean()) for each in expected[1:]], rel=1e-5
    )
    assert found.prior_bits_per_dim == pytest.approx(float(expected[0].bits_per_dim.mean()), rel=1e-5)
    assert [each.kl for each in found.groups] == pytest.approx(expected[3].kl.mean(0).tolist(), rel=1e-5)


def test_gaussian_likelihood_is_that_of_the_other_objectives():
    from latent_codec.training import losses

    likelihood = GaussianLikelihood(1)
    image = torch.randint(0, 256, (2, 1, 4, 4), generator=seeded()) / 127.5 - 1
    mean = torch.randn(2, 1, 4, 4, generator=seeded())
    nats = -likelihood.log_prob(mean, image).mean() / 16
    torch.testing.assert_close(nats, losses.gaussian_nll(image, mean, likelihood.log_std))
